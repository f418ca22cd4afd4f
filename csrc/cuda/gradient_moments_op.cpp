#include "gradient_moments_op.h"

#include "../gradient_moments_ops.h"
#include "gradient_moments_kernels.h"
#include "stream.h"

namespace gac::cuda {
namespace {

void run(const MomentsCall& call, Device device) {
    const OnDevice at(device);
    launch_moments(call, at.stream);
}

}  // namespace

Tensor gradient_moments(std::vector<Tensor> supervised, std::vector<Tensor> policy) {
    STD_TORCH_CHECK(!supervised.empty(), "gradient_moments: supervised must not be empty");
    const Inputs in{"gradient_moments", &supervised[0]};
    return sum_moments(in, "supervised", supervised, "policy", policy, false, run);
}

Tensor accumulate_moments_(std::vector<Tensor> sums, std::vector<Tensor> gradients) {
    STD_TORCH_CHECK(!sums.empty(), "accumulate_moments_: sums must not be empty");
    const Inputs in{"accumulate_moments_", &sums[0]};
    return sum_moments(in, "gradients", gradients, "sums", sums, true, run);
}

}  // namespace gac::cuda
