#pragma once

#include "../controller_ops.h"

namespace gac::cuda {

struct Controller {
    static constexpr bool on_cpu = false;

    static int64_t scratch_numbers(const ControllerCall& call);
    static void run(const ControllerCall& call, Device device);
};

}  // namespace gac::cuda
