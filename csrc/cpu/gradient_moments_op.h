#pragma once

#include <vector>

#include "../tensors.h"

namespace gac {

// gac_kernels::gradient_moments and accumulate_moments_; schemas and shapes stand in gac_kernels/schemas.py.
Tensor gradient_moments(std::vector<Tensor> supervised, std::vector<Tensor> policy);
Tensor accumulate_moments_(std::vector<Tensor> sums, std::vector<Tensor> gradients);

}  // namespace gac
