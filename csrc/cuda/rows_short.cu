// The row primitives for elements of 16 bits.
#include "rows_kernels.h"
#include "rows_launch.cuh"

namespace gac::cuda {

void launch_short_rows(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, void* stream) {
    element == Element::kBfloat16 ? launch_elements<Bfloat16Elements>(task, call, rows, stream)
                                  : launch_elements<HalfElements>(task, call, rows, stream);
}

}  // namespace gac::cuda
