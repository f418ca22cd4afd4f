// Sums over lists of gradients: a block takes a chunk of a tensor that it finds in a table of the launch's arguments; a
// second kernel adds the chunks' partial sums up in their order.
#pragma once

#include "block_sums.cuh"
#include "elements.cuh"

#include "../gradient_moments.h"

namespace gac::cuda {

constexpr int kMomentsThreads = 256;
constexpr int kTablePairs = 96;  // the arguments of a launch stay below 4 KiB

// Pairs of one kind. Block b works on the pair with block[pair] <= b < block[pair + 1].
struct MomentsTable {
    const void* gradient[kTablePairs];
    void* other[kTablePairs];
    int64_t size[kTablePairs], first[kTablePairs];
    int block[kTablePairs + 1];
    int pairs;
    double* partials;
};

constexpr int kGroup = 8;  // elements that a thread takes at a time, whatever the address

template <class Elements>
GAC_DEVICE void load_group(
    const typename Elements::Stored* x, bool whole, int64_t count, typename Elements::Sum (&v)[kGroup]) {
    if (whole) {
#pragma unroll
        for (int i = 0; i < kGroup; i += Elements::Width) {
            typename Elements::Sum part[Elements::Width];
            Elements::widen(load_once(x + i), part);
#pragma unroll
            for (int j = 0; j < Elements::Width; ++j) v[i + j] = part[j];
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i) v[i] = i < count ? Elements::widen(x[i]) : 0;
}

template <class Elements>
GAC_DEVICE void store_group(
    typename Elements::Stored* x, bool whole, int64_t count, const typename Elements::Sum (&v)[kGroup]) {
    if (whole) {
#pragma unroll
        for (int i = 0; i < kGroup; i += Elements::Width) {
            typename Elements::Sum part[Elements::Width];
#pragma unroll
            for (int j = 0; j < Elements::Width; ++j) part[j] = v[i + j];
            store_once(x + i, Elements::narrow(part));
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
        if (i < count) x[i] = Elements::narrow(v[i]);
}

GAC_DEVICE bool aligned(const void* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; }

// visit(first element, how many up to kGroup) for this thread's groups of this block's chunk; gives the pair's number and
// the chunk's.
struct MomentsChunk {
    int pair;
    int64_t number, begin, end;

    template <class F>
    GAC_DEVICE void groups(const F& visit) const {
        for (int64_t i = begin + thread() * kGroup; i < end; i += threads() * kGroup)
            visit(i, end - i < kGroup ? end - i : kGroup);
    }
};
GAC_DEVICE MomentsChunk moments_chunk(const MomentsTable& table) {
    int low = 0, high = table.pairs;
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (table.block[middle] <= block()) low = middle;
        else high = middle;
    }
    const int64_t chunk = block() - table.block[low], begin = chunk * kMomentsChunk, size = table.size[low];
    return {low, table.first[low] + chunk, begin, begin + kMomentsChunk < size ? begin + kMomentsChunk : size};
}

template <class Elements>
GAC_KERNEL(kMomentsThreads, 4) compare_gradients(MomentsTable table) {
    using Stored = typename Elements::Stored;
    const MomentsChunk chunk = moments_chunk(table);
    const Stored* const a = static_cast<const Stored*>(table.gradient[chunk.pair]);
    const Stored* const b = static_cast<const Stored*>(table.other[chunk.pair]);
    const bool by_16_bytes = aligned(a) && aligned(b);
    double total[4] = {0, 0, 0, 0};
    chunk.groups([&](int64_t i, int64_t count) {
        typename Elements::Sum x[kGroup], y[kGroup];
        const bool whole = by_16_bytes && count == kGroup;
        load_group<Elements>(a + i, whole, count, x);
        load_group<Elements>(b + i, whole, count, y);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const double p = x[j], q = y[j];
            total[0] = ::fma(p, p, total[0]);
            total[1] = ::fma(q, q, total[1]);
            total[2] = ::fma(p, q, total[2]);
        }
    });
    block_sums(total, reinterpret_cast<double*>(shared_memory()));
    if (thread() != 0) return;
#pragma unroll
    for (int n = 0; n < 3; ++n) table.partials[3 * chunk.number + n] = total[n];
}

template <class Elements, class Sums>
GAC_KERNEL(kMomentsThreads, 4) accumulate_gradients(MomentsTable table) {
    const MomentsChunk chunk = moments_chunk(table);
    const auto* const g = static_cast<const typename Elements::Stored*>(table.gradient[chunk.pair]);
    auto* const sums = static_cast<typename Sums::Stored*>(table.other[chunk.pair]);
    const bool by_16_bytes = aligned(g) && aligned(sums);
    double total[1] = {0};
    chunk.groups([&](int64_t i, int64_t count) {
        typename Elements::Sum x[kGroup];
        typename Sums::Sum sum[kGroup];
        const bool whole = by_16_bytes && count == kGroup;
        load_group<Elements>(g + i, whole, count, x);
        load_group<Sums>(sums + i, whole, count, sum);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
            const double p = x[j];
            total[0] = ::fma(p, p, total[0]);
            sum[j] += static_cast<typename Sums::Sum>(x[j]);
        }
        store_group<Sums>(sums + i, whole, count, sum);
    });
    block_sums(total, reinterpret_cast<double*>(shared_memory()));
    if (thread() == 0) table.partials[chunk.number] = total[0];
}

// One block. Width: partial sums a chunk.
template <int Width>
GAC_KERNEL(kMomentsThreads, 1) add_partials(const double* partials, int64_t chunks, double* out) {
    double total[Width == 1 ? 1 : 4] = {};
    for (int64_t i = thread(); i < chunks; i += threads())
#pragma unroll
        for (int n = 0; n < Width; ++n) total[n] += partials[Width * i + n];
    block_sums(total, reinterpret_cast<double*>(shared_memory()));
    if (thread() != 0) return;
#pragma unroll
    for (int n = 0; n < Width; ++n) out[n] = total[n];
}

}  // namespace gac::cuda
