#include "controller_op.h"

#include "controller_kernels.h"
#include "stream.h"

namespace gac::cuda {

int64_t Controller::scratch_numbers(const ControllerCall& call) { return controller_scratch(call); }

void Controller::run(const ControllerCall& call, Device device) {
    const OnDevice at(device);
    launch_controller(call, at.stream);
}

}  // namespace gac::cuda
