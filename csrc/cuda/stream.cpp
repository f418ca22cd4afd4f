#include "stream.h"

#ifndef GAC_EMULATE

#include <dlfcn.h>

namespace gac::cuda {

// The stable ABI's way to the CUDA stream lies in a library that a build against torch for the CPU does not have to link
// with; whoever calls a CUDA operator has loaded it.
void* OnDevice::current_stream(int32_t device) {
    using Get = AOTITorchError (*)(int32_t, void**);
    static const Get get = [] {
        void* const library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
        STD_TORCH_CHECK(library, "gac_kernels: torch's CUDA library is not loaded");
        void* const symbol = dlsym(library, "aoti_torch_get_current_cuda_stream");
        STD_TORCH_CHECK(symbol, "gac_kernels: this torch has no aoti_torch_get_current_cuda_stream");
        return reinterpret_cast<Get>(symbol);
    }();
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(get(device, &stream));
    return stream;
}

}  // namespace gac::cuda

#endif
