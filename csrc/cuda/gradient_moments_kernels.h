// Sums over lists of gradients on CUDA C++ as their operators see them. No torch and no CUDA headers.
#pragma once

#include "../gradient_moments.h"

namespace gac::cuda {

void launch_moments(const MomentsCall& call, void* stream);

}  // namespace gac::cuda
