// The row primitives for AVX-512 (F, BW, DQ, VL). Compiled with flags of its own (setup.py); entered only where the CPU has them.
#if defined(__x86_64__)

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // inside GCC 12's own AVX-512 header (GCC PR 105593)
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#define GAC_NAMESPACE gac::avx512
#include "vec_avx512.h"

#include "vec_math.h"

#include "elements_avx512.h"
#include "row_kernels.h"

namespace gac {
using avx512::Rows;
using avx512::Vec;
using Floats = Rows<Vec, avx512::FloatElements>;
using Bfloats = Rows<Vec, avx512::Bfloat16Elements>;
using Halves = Rows<Vec, avx512::HalfElements>;
extern const FloatRowKernels row_kernels_avx512;
const FloatRowKernels row_kernels_avx512 = {
    {Floats::statistics, Floats::gradient, Floats::fused},
    {Bfloats::statistics, Bfloats::gradient, Bfloats::fused},
    {Halves::statistics, Halves::gradient, Halves::fused},
    Bfloats::scale,
    Halves::scale,
};
}  // namespace gac

#endif
