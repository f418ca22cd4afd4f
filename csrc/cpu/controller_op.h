#pragma once

#include "../controller_ops.h"

namespace gac {

struct CpuController {
    static constexpr bool on_cpu = true;

    static int64_t scratch_numbers(const ControllerCall& call);
    static void run(const ControllerCall& call, Device);
};

}  // namespace gac
