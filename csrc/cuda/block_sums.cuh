// Sums over the threads of a block, in float64 and in a fixed order.
#pragma once

#include "device.cuh"

namespace gac::cuda {

constexpr int kMostSums = 16;

// Of shared memory, for everything here.
constexpr size_t sums_bytes(int threads) {
    return sizeof(double) * static_cast<size_t>(threads / kWarp + 1) * kMostSums;
}

// Gives away those `Half` values that the partner goes on with, and takes its others, down to one value.
template <int Half, int K>
GAC_DEVICE void halve(double (&value)[K]) {
    if constexpr (Half > 0) {
        const bool upper = lane() & Half;
#pragma unroll
        for (int i = 0; i < Half; ++i) {
            const double mine = upper ? value[i + Half] : value[i], theirs = upper ? value[i] : value[i + Half];
            value[i] = mine + shuffle_xor(theirs, Half);
        }
        halve<Half / 2>(value);
    }
}

// The warp's sum of value[l % K] in lane l; 16 sums take 16 exchanges and not 80.
template <int K>
GAC_DEVICE double warp_sums(double (&value)[K]) {
    static_assert((K & (K - 1)) == 0 && K <= kMostSums);
    halve<K / 2>(value);
    double sum = value[0];
#pragma unroll
    for (int by = kWarp / 2; by >= K; by /= 2) sum += shuffle_xor(sum, by);
    return sum;
}

// Every value becomes its sum over the block's threads, the same bits in each. The barrier inside also orders whatever
// the threads wrote before it. One call may follow another: each has read its totals before any thread can write new
// ones.
template <int K>
GAC_DEVICE void block_sums(double (&value)[K], double* shared) {
    double* const totals = shared + threads() / kWarp * kMostSums;
    const double own = warp_sums(value);
    if (lane() < K) shared[warp() * kMostSums + lane()] = own;
    barrier();
    if (thread() < K) {
        double sum = 0;
        for (int w = 0; w < threads() / kWarp; ++w) sum += shared[w * kMostSums + thread()];
        totals[thread()] = sum;
    }
    barrier();
#pragma unroll
    for (int k = 0; k < K; ++k) value[k] = totals[k];
}

// What `merge`, which does not depend on its arguments' order, makes of the values of all threads.
template <class F>
GAC_DEVICE double over_block(double value, const F& merge, double* shared) {
    double* const total = shared + threads() / kWarp * kMostSums;
    value = over_warp(value, merge);
    if (lane() == 0) shared[warp() * kMostSums] = value;
    barrier();
    if (thread() == 0) {
        for (int w = 1; w < threads() / kWarp; ++w) value = merge(value, shared[w * kMostSums]);
        *total = value;
    }
    barrier();
    return *total;
}

// nan wins in both, as in torch.
GAC_DEVICE double smaller(double a, double b) { return a != a || a < b ? a : b; }
GAC_DEVICE double larger(double a, double b) { return a != a || a > b ? a : b; }

}  // namespace gac::cuda
