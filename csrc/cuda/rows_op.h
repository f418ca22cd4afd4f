#pragma once

#include "../rows_ops.h"

namespace gac::cuda {

struct Rows {
    static constexpr bool on_cpu = false;

    static void run(RowTask task, const RowsCall<float>& call, Element element, int64_t rows, Device device);
    static void run(RowTask task, const RowsCall<double>& call, Element element, int64_t rows, Device device);
};
using RowOps = gac::RowOps<Rows>;

void scale_(Tensor gradient, Tensor factor);

}  // namespace gac::cuda
