// Sums over gradients for AVX-512. Compiled with flags of its own (setup.py); entered only where the CPU has them.
#if defined(__x86_64__)

#define GAC_NAMESPACE gac::moments_avx512

#include "gradient_moments_kernels.h"

namespace gac {
const MomentKernels moment_kernels_avx512 = moments_avx512::kMomentKernels;
}  // namespace gac

#endif
