// The row primitives on the CPU: rows shared out among threads.
#include "rows_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"

namespace gac {
namespace {

template <class T>
const RowKernels<T>& kernels(Element element) {
    if constexpr (std::is_same_v<T, double>) {
        return row_kernels_double;
    } else {
        const FloatRowKernels* of = &row_kernels_portable;
#if defined(__x86_64__)
        if (isa() == Isa::kAvx2) of = &row_kernels_avx2;
        if (isa() == Isa::kAvx512) of = &row_kernels_avx512;
#endif
        return element == Element::kFloat ? of->of_float : element == Element::kBfloat16 ? of->of_bfloat16 : of->of_half;
    }
}

// function(begin, end, scratch) over the rows. Threads take the next few rows when they have done some: dead rows cost
// next to nothing. What a row yields depends on no other.
template <class T, class F>
void over_rows(int64_t rows, int64_t columns, const F& function) {
    constexpr int64_t kElementsWorthAThread = 32768;
    const int64_t scratch = columns / (kBlockBytes / 8) + 1 + kBlockBytes / 2;  // elements of 2 to 8 bytes
    const int64_t worth = rows * columns / kElementsWorthAThread;
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), rows, worth});
    if (threads <= 1) {
        std::vector<T> own(static_cast<size_t>(scratch));
        return function(0, rows, own.data());
    }
    const int64_t range = std::max<int64_t>(1, std::min(rows / (8 * threads), kElementsWorthAThread / columns));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        std::vector<T> own(static_cast<size_t>(scratch));
        for (int64_t begin; (begin = next.fetch_add(range)) < rows;)
            function(begin, std::min(begin + range, rows), own.data());
    });
}

template <class T>
void run_rows(RowTask task, const RowsCall<T>& c, Element element, int64_t rows) {
    const RowKernels<T>& of = kernels<T>(element);
    const auto kernel = task == RowTask::kStatistics ? of.statistics : task == RowTask::kGradient ? of.gradient : of.fused;
    over_rows<T>(rows, c.columns, [&](int64_t begin, int64_t end, T* scratch) { kernel(c, begin, end, scratch); });
}

}  // namespace

void CpuRows::run(RowTask task, const RowsCall<float>& c, Element element, int64_t rows, Device) {
    run_rows(task, c, element, rows);
}
void CpuRows::run(RowTask task, const RowsCall<double>& c, Element element, int64_t rows, Device) {
    run_rows(task, c, element, rows);
}

}  // namespace gac
