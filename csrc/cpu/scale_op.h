#pragma once

#include "../tensors.h"

namespace gac {

// gac_kernels::scale_: gradient *= factor, and nothing at all where factor is 1.
void scale_(Tensor gradient, Tensor factor);

}  // namespace gac
