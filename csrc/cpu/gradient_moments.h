// Partial sums over pieces of gradients, for each instruction set. No std templates here, because the units of all of
// them include this file.
#pragma once

#include "../gradient_moments.h"

namespace gac {

// Of the chunk of `count` elements that begins at element `offset`; `out` gets MomentsCall::sums() numbers.
struct MomentKernels {
    void (*compare)(const GradientPair& pair, int64_t offset, int64_t count, double* out);
    void (*accumulate)(const GradientPair& pair, int64_t offset, int64_t count, double* out);
};

extern const MomentKernels moment_kernels_portable;
#if defined(__x86_64__)
extern const MomentKernels moment_kernels_avx2;
extern const MomentKernels moment_kernels_avx512;
#endif

}  // namespace gac
