// Sums over gradients for any CPU.
#define GAC_NAMESPACE gac::moments_portable

#include "gradient_moments_kernels.h"

namespace gac {
const MomentKernels moment_kernels_portable = moments_portable::kMomentKernels;
}  // namespace gac
