#include "gradient_moments.cuh"

#include "gradient_moments_kernels.h"
#include "launch.cuh"

namespace gac::cuda {
namespace {

using Kernel = void (*)(MomentsTable);

Kernel accumulating(Element element, bool wide) {
    switch (element) {
        case Element::kFloat:
            return wide ? accumulate_gradients<FloatElements, DoubleElements> : accumulate_gradients<FloatElements, FloatElements>;
        case Element::kBfloat16:
            return wide ? accumulate_gradients<Bfloat16Elements, DoubleElements>
                        : accumulate_gradients<Bfloat16Elements, FloatElements>;
        case Element::kHalf:
            return wide ? accumulate_gradients<HalfElements, DoubleElements> : accumulate_gradients<HalfElements, FloatElements>;
        default: return accumulate_gradients<DoubleElements, DoubleElements>;
    }
}

Kernel comparing(Element element) {
    switch (element) {
        case Element::kFloat: return compare_gradients<FloatElements>;
        case Element::kBfloat16: return compare_gradients<Bfloat16Elements>;
        case Element::kHalf: return compare_gradients<HalfElements>;
        default: return compare_gradients<DoubleElements>;
    }
}

// A launch for every kTablePairs pairs of one kind, and for every 2^30 blocks.
void launch_kind(const MomentsCall& call, Element element, bool wide, int threads, void* stream) {
    const Kernel kernel = call.accumulate ? accumulating(element, wide) : comparing(element);
    const Grid1 grid{0, threads, sums_bytes(threads)};
    MomentsTable table{};
    table.partials = call.partials;
    const auto flush = [&] {
        Grid1 filled = grid;
        filled.blocks = table.block[table.pairs];
        launch("gradient moments", kernel, filled, stream, table);
        table.pairs = 0;
    };
    for (int64_t i = 0; i < call.count; ++i) {
        const GradientPair& pair = call.pairs[i];
        if (pair.element != element || (call.accumulate && pair.wide_sum != wide)) continue;
        const int64_t blocks = moments_chunks(pair.size);
        if (table.pairs == kTablePairs || (table.pairs > 0 && table.block[table.pairs] + blocks > int64_t(1) << 30)) flush();
        table.gradient[table.pairs] = pair.gradient;
        table.other[table.pairs] = pair.other;
        table.size[table.pairs] = pair.size;
        table.first[table.pairs] = pair.first;
        table.block[table.pairs + 1] = table.block[table.pairs] + static_cast<int>(blocks);
        ++table.pairs;
    }
    if (table.pairs > 0) flush();
}

}  // namespace

void launch_moments(const MomentsCall& call, void* stream) {
    const int threads = machine().threads < kMomentsThreads ? machine().threads : kMomentsThreads;
    for (const Element element : {Element::kFloat, Element::kBfloat16, Element::kHalf, Element::kDouble})
        for (const bool wide : {false, true})
            if (call.accumulate || !wide) launch_kind(call, element, wide, threads, stream);
    const Grid1 one{1, threads, sums_bytes(threads)};
    if (call.accumulate) launch("gradient moments' sums", add_partials<1>, one, stream, call.partials, call.chunks, call.out);
    else launch("gradient moments' sums", add_partials<3>, one, stream, call.partials, call.chunks, call.out);
}

}  // namespace gac::cuda
