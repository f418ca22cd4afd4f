// The device and the stream that an operator works on, through the stable ABI.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"

namespace gac::cuda {

// Makes the tensors' device the current one for a while; `stream` is torch's current stream there.
class OnDevice {
public:
#ifdef GAC_EMULATE
    explicit OnDevice(Device) : stream(nullptr) {}
#else
    explicit OnDevice(Device device) : guard_(device.index), stream(current_stream(device.index)) {}

private:
    static void* current_stream(int32_t device);
    torch::stable::accelerator::DeviceGuard guard_;

public:
#endif
    void* const stream;
};

}  // namespace gac::cuda
