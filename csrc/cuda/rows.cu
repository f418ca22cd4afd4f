// The row primitives for float32 and float64; for 16 bits see rows_short.cu, which compiles beside this.
#include "rows_kernels.h"
#include "rows_launch.cuh"

namespace gac::cuda {

void launch_rows(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, void* stream) {
    element == Element::kFloat ? launch_elements<FloatElements>(task, call, rows, stream)
                               : launch_short_rows(task, call, element, rows, stream);
}

void launch_rows(RowTask task, const RowsCall<double>& call, Element, int64_t rows, void* stream) {
    launch_elements<DoubleElements>(task, call, rows, stream);
}

}  // namespace gac::cuda
