#pragma once

#include "../tensors.h"

namespace gac::cuda {

// gac_kernels::group_advantages_cuda; the schema and what is returned stand in gac_kernels/schemas.py.
Tensor group_advantages(
    Tensor rewards, OptionalTensor groups, int64_t group_size, bool adjacent, int64_t baseline, int64_t scale,
    double eps);

}  // namespace gac::cuda
