#pragma once

#include <vector>

#include "../tensors.h"

namespace gac::cuda {

Tensor gradient_moments(std::vector<Tensor> supervised, std::vector<Tensor> policy);
Tensor accumulate_moments_(std::vector<Tensor> sums, std::vector<Tensor> gradients);

}  // namespace gac::cuda
