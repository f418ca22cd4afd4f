// The row primitives on CUDA C++ as their operators see them. No torch and no CUDA headers.
#pragma once

#include "../rows.h"

namespace gac::cuda {

void launch_rows(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, void* stream);
void launch_rows(RowTask task, const RowsCall<double>& call, Element element, int64_t rows, void* stream);

// The same of bfloat16 and float16.
void launch_short_rows(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, void* stream);

// gradient *= *factor, rows as in RowsCall; nothing where the factor is 1. factor: float or, if wide, double.
void launch_scale(const Grid& gradient, Element element, int64_t rows, int64_t columns, const void* factor, bool wide, void* stream);

}  // namespace gac::cuda
