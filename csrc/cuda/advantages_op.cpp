#include "advantages_op.h"

#include "../advantages_ops.h"
#include "stream.h"

namespace gac::cuda {

Tensor group_advantages(
    Tensor rewards, OptionalTensor groups, int64_t group_size, bool adjacent, int64_t baseline, int64_t scale,
    double eps) {
    return gac::group_advantages(
        Inputs{"group_advantages", &rewards}, rewards, groups, group_size, adjacent, baseline, scale, eps,
        [&](const auto& call) {
            const OnDevice at(device_of(rewards));
            launch_group_advantages(call, at.stream);
        });
}

}  // namespace gac::cuda
