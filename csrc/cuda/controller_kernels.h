// The controller's step on CUDA C++ as its operator sees it. No torch and no CUDA headers.
#pragma once

#include "../controller.h"

namespace gac::cuda {

// Doubles that ControllerCall::scratch must hold.
int64_t controller_scratch(const ControllerCall& call);
void launch_controller(const ControllerCall& call, void* stream);

}  // namespace gac::cuda
