// The row primitives for any CPU, and in float64.
#define GAC_NAMESPACE gac::portable
#include "vec_double.h"
#include "vec_portable.h"

#include "vec_math.h"

#include "elements_portable.h"
#include "row_kernels.h"

namespace gac {
using portable::Rows;
using portable::Vec;
using Floats = Rows<Vec, portable::FloatElements>;
using Bfloats = Rows<Vec, portable::Bfloat16Elements>;
using Halves = Rows<Vec, portable::HalfElements>;
using Doubles = Rows<portable::VecDouble, portable::DoubleElements>;
const FloatRowKernels row_kernels_portable = {
    {Floats::statistics, Floats::gradient, Floats::fused},
    {Bfloats::statistics, Bfloats::gradient, Bfloats::fused},
    {Halves::statistics, Halves::gradient, Halves::fused},
    Bfloats::scale,
    Halves::scale,
};
const RowKernels<double> row_kernels_double = {Doubles::statistics, Doubles::gradient, Doubles::fused};
}  // namespace gac
