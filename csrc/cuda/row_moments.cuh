// The moments of a row: a thread's, merged to the block's by one warp, to the cluster's through its shared memory.
//
// With x the raw logit, or the capped one, z = k x: exponentials are of k (x - top), so that large logits lose nothing. A
// thread sums in T relative to a maximum of its own; threads and blocks are summed in float64, in an order that depends
// on the row's length alone.
#pragma once

#include "lane.cuh"

#include "../math/rows.h"
#include "elements.cuh"

namespace gac::cuda {

// x = raw, or cap tanh(inner raw); the derivative is that of x / (cap inner).
template <class T, bool Capped>
struct Transform {
    T inner, cap;

    struct Point {
        T x, derivative;
    };
    GAC_DEVICE Point at(T raw) const {
        if constexpr (Capped) {
            const auto t = tanh(typename LaneOf<T>::Type(raw * inner));
            return {cap * t.value.v, t.slope.v};
        } else {
            return {raw, T(1)};
        }
    }
};

template <class T>
GAC_DEVICE T fall_to(T top, T below) {  // below - top; 0 where nothing, or nan alone, was summed
    return below == -static_cast<T>(__builtin_huge_val()) ? T(0) : below - top;
}

// A thread's, of x on which `e` = power((x - top) by): sums of e, e^2 and e (x - top).
template <class T>
struct ThreadMoments {
    T top = -static_cast<T>(__builtin_huge_val()), origin = 0, sum = 0, square = 0, moment = 0;

    template <int Width>
    GAC_DEVICE void add(const T (&x)[Width], T by) {
        T high = x[0];
#pragma unroll
        for (int i = 1; i < Width; ++i) high = largest(high, x[i]);
        if (high > top) {
            const T fall = fall_to(high, top), shrink = Power<T>::at(fall * by);
            moment = shrink * multiply_add(sum, fall, moment);
            sum *= shrink;
            square *= shrink * shrink;
            top = origin = high;
        }
#pragma unroll
        for (int i = 0; i < Width; ++i) {
            const T d = x[i] - origin, e = Power<T>::at(d * by);
            sum += e;
            square = multiply_add(e, e, square);
            moment = multiply_add(e, largest(d, T(-1e30)), moment);  // 0 times -inf is nothing
        }
    }
};

// Of many threads; what a block leaves for its cluster.
template <class T>
struct alignas(8) SharedMoments {
    T top;
    double sum, square, moment;
};

// Scratch of merging, `threads()` numbers each and one a warp.
template <class T>
struct MergeScratch {
    T *sum, *square, *moment, *top;
};

struct Add {
    template <class T>
    GAC_DEVICE T operator()(T a, T b) const {
        return a + b;
    }
};
struct Largest {
    template <class T>
    GAC_DEVICE T operator()(T a, T b) const {
        return largest(a, b);
    }
};

// The block's moments into *to, which the first thread writes; others see it after a barrier.
template <class T>
GAC_DEVICE void merge_block(const ThreadMoments<T>& mine, T by, const MergeScratch<T>& scratch, SharedMoments<T>* to) {
    const T warp_top = over_warp(mine.top, Largest());
    const T fall = fall_to(warp_top, mine.top), shrink = Power<T>::at(fall * by);
    scratch.sum[thread()] = shrink * mine.sum;
    scratch.square[thread()] = shrink * shrink * mine.square;
    scratch.moment[thread()] = shrink * multiply_add(mine.sum, fall, mine.moment);
    if (lane() == 0) scratch.top[warp()] = warp_top;
    barrier();  // the first warp adds up what all have left
    if (warp() != 0) return;
    const int warps = threads() / kWarp;
    const T below = lane() < warps ? scratch.top[lane()] : -static_cast<T>(__builtin_huge_val());
    const T top = over_warp(below, Largest());
    const T my_fall = fall_to(top, below), my_shrink = Power<T>::at(my_fall * by);
    double sum = 0, square = 0, moment = 0;
    for (int w = 0; w < warps; ++w) {
        const T f = shuffle(my_shrink, w), down = shuffle(my_fall, w);
        const int at = w * kWarp + lane();
        const T s = scratch.sum[at];
        sum += static_cast<double>(f * s);
        square += static_cast<double>(f * f * scratch.square[at]);
        moment += static_cast<double>(f * multiply_add(s, down, scratch.moment[at]));
    }
    sum = over_warp(sum, Add());
    square = over_warp(square, Add());
    moment = over_warp(moment, Add());
    if (lane() == 0) *to = {top, sum, square, moment};
}

// The row's moments from those of the cluster's blocks, in every lane of the warp that asks; z = k x.
template <class T>
struct RowMoments {
    T top;  // of x
    double log_sum, entropy, sum_sq;
};

template <class T>
GAC_DEVICE RowMoments<T> merge_cluster(const SharedMoments<T>* own, T by, double k) {
    constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
    SharedMoments<T> part{-kInfinity, 0, 0, 0};
    if (lane() < cluster_size()) part = read_remote(own, lane());
    const T top = over_warp(part.top, Largest());
    const T down = fall_to(top, part.top);
    const double fall = static_cast<double>(down), shrink = static_cast<double>(Power<T>::at(down * by));
    const double sum = over_warp(shrink * part.sum, Add());
    const double square = over_warp(shrink * shrink * part.square, Add());
    const double moment = over_warp(shrink * (part.moment + fall * part.sum), Add());
    // Of a row without a finite logit, or with a nan, everything is nan.
    if (!(top > -kInfinity)) return {top, __builtin_nan(""), __builtin_nan(""), __builtin_nan("")};
    const double log_sum = ::log(sum), entropy = log_sum - k * (moment / sum);
    return {top, log_sum, entropy > 0 || entropy != entropy ? entropy : 0, square / (sum * sum)};
}

}  // namespace gac::cuda
