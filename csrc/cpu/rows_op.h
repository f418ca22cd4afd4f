#pragma once

#include "../rows_ops.h"

namespace gac {

struct CpuRows {
    static constexpr bool on_cpu = true;

    static void run(RowTask task, const RowsCall<float>& c, Element element, int64_t rows, Device);
    static void run(RowTask task, const RowsCall<double>& c, Element element, int64_t rows, Device);
};
using CpuRowOps = RowOps<CpuRows>;

}  // namespace gac
