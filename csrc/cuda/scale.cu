// The backward of a loss whose forward pass made the gradient: every block reads the factor and leaves at once where it is 1.
#include "launch.cuh"
#include "row_memory.cuh"
#include "rows_kernels.h"

namespace gac::cuda {

namespace {

constexpr int kThreads = 256;
constexpr int64_t kPiece = 1 << 15;  // elements of a row that a block takes at a time

template <class E>
GAC_KERNEL(kThreads, 4) scale_kernel(Grid gradient, int64_t rows, int64_t columns, const void* factor, bool wide) {
    using T = typename E::Sum;
    const double by = wide ? *static_cast<const double*>(factor) : static_cast<double>(*static_cast<const float*>(factor));
    if (by == 1) return;
    const int64_t pieces = (columns - 1) / kPiece + 1;
    for (int64_t work = block(); work < rows * pieces; work += blocks()) {
        const int64_t begin = work % pieces * kPiece, size = columns - begin < kPiece ? columns - begin : kPiece;
        auto* const row = reinterpret_cast<typename E::Stored*>(gradient.row(work / pieces)) + begin;
        const RowPart<E> part(row, nullptr, static_cast<int>(size), 0);
        const RowOut<E> out(row, static_cast<int>(size));
        part.rest([&](Bytes16 v, int vector) {
            T x[E::Width];
            E::widen(v, x);
#pragma unroll
            for (T& each : x) each *= static_cast<T>(by);
            out.write(vector, x);
        });
    }
}

template <class E>
void launch_of(const Grid& gradient, int64_t rows, int64_t columns, const void* factor, bool wide, void* stream) {
    const int64_t work = rows * ((columns - 1) / kPiece + 1), most = 8 * machine().multiprocessors;
    launch("scale_kernel", scale_kernel<E>, Grid1{work < most ? work : most, kThreads}, stream, gradient, rows, columns, factor, wide);
}

}  // namespace

void launch_scale(const Grid& gradient, Element element, int64_t rows, int64_t columns, const void* factor, bool wide, void* stream) {
    switch (element) {
        case Element::kFloat: return launch_of<FloatElements>(gradient, rows, columns, factor, wide, stream);
        case Element::kBfloat16: return launch_of<Bfloat16Elements>(gradient, rows, columns, factor, wide, stream);
        case Element::kHalf: return launch_of<HalfElements>(gradient, rows, columns, factor, wide, stream);
        case Element::kDouble: return launch_of<DoubleElements>(gradient, rows, columns, factor, wide, stream);
    }
}

}  // namespace gac::cuda
