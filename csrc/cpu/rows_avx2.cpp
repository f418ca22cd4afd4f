// The row primitives for AVX2, FMA and F16C. Compiled with flags of its own (setup.py); entered only where the CPU has them.
#if defined(__x86_64__)

#define GAC_NAMESPACE gac::avx2
#include "vec_avx2.h"

#include "vec_math.h"

#include "elements_avx2.h"
#include "row_kernels.h"

namespace gac {
using avx2::Rows;
using avx2::Vec;
using Floats = Rows<Vec, avx2::FloatElements>;
using Bfloats = Rows<Vec, avx2::Bfloat16Elements>;
using Halves = Rows<Vec, avx2::HalfElements>;
extern const FloatRowKernels row_kernels_avx2;
const FloatRowKernels row_kernels_avx2 = {
    {Floats::statistics, Floats::gradient, Floats::fused},
    {Bfloats::statistics, Bfloats::gradient, Bfloats::fused},
    {Halves::statistics, Halves::gradient, Halves::fused},
    Bfloats::scale,
    Halves::scale,
};
}  // namespace gac

#endif
