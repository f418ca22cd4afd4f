// The moments of a row: a thread's, merged to the block's by one warp, to the cluster's through its shared memory.
//
// With x the raw logit, or tanh of it with a soft cap, z = k x: exponentials are of k (x - x(top)), top the largest raw logit,
// so that large logits lose nothing and no exponent is above 0. A
// thread sums in T relative to a maximum of its own; threads and blocks are summed in float64, in an order that depends
// on the row's length alone.
#pragma once

#include "lane.cuh"

#include "../math/rows.h"
#include "elements.cuh"

namespace gac::cuda {

// x = raw, or tanh(doubled raw / 2), by how far it lies below that of an origin: at most 0, and 0 at the origin. The
// derivative is that of x with tanh' = 1 at 0.
template <class T, bool Capped>
struct Transform {
    using V = typename LaneOf<T>::Type;
    static constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
    static constexpr T kMost = sizeof(T) == 8 ? static_cast<T>(1.7976931348623157e308) : static_cast<T>(3.4028234663852886e38);
    T doubled;

    struct Origin {
        T raw, gain;
    };
    struct Point {
        T fall, derivative;
    };

    // A raw logit as it may become a row's top: a cap makes infinities finite. nan stays.
    static GAC_DEVICE T finite(T raw) { return !Capped ? raw : raw < -kMost ? -kMost : raw > kMost ? kMost : raw; }

    GAC_DEVICE Origin from(T top) const {
        if constexpr (Capped) {
            return {top, (V(T(2)) / (V(T(1)) + exp_moderate(clamp(V(-doubled * top), V(T(-80)), V(T(80)))))).v};
        } else {
            return {top, T(0)};
        }
    }
    GAC_DEVICE Point at(T raw, const Origin& o) const {
        if constexpr (Capped) {
            const auto c = capped_point(V(doubled * raw), V(doubled * (raw - o.raw)), V(o.gain));
            return {c.fall.v, c.slope.v};
        } else {
            return {raw - o.raw, T(1)};
        }
    }
    // From one top to a higher one, finite; 0 where nothing, or nan alone, was summed.
    GAC_DEVICE T between(T below, const Origin& o) const {
        return below == -kInfinity ? T(0) : largest(at(below, o).fall, T(-1e30));
    }
};

// Factors beyond are not told apart: they take any two neighbouring logits to probabilities of 1 and 0. nan stays.
template <class T>
GAC_DEVICE double bounded_factor(double factor) {
    constexpr double kLargest = sizeof(T) == 8 ? 1e308 : 2e38;
    return factor > kLargest ? kLargest : factor;
}

// A thread's, of d = x - x(top) and e = power(d by): sums of e, e^2 and e d. Under a cap -infinity stands for no column.
template <class T, bool Capped>
struct ThreadMoments {
    static constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
    T top = -kInfinity, sum = 0, square = 0, moment = 0;
    typename Transform<T, Capped>::Origin origin{T(0), T(0)};

    template <int Width>
    GAC_DEVICE void add(const T (&x)[Width], T by, const Transform<T, Capped>& transform) {
        T high = x[0];
#pragma unroll
        for (int i = 1; i < Width; ++i) high = largest(high, x[i]);
        if (high > top) {
            origin = transform.from(high);
            const T fall = transform.between(top, origin), shrink = Power<T>::at(fall * by);
            moment = shrink * multiply_add(sum, fall, moment);
            sum *= shrink;
            square *= shrink * shrink;
            top = high;
        }
#pragma unroll
        for (int i = 0; i < Width; ++i) {
            const T d = transform.at(x[i], origin).fall, power = Power<T>::at(d * by);
            const T e = Capped && x[i] == -kInfinity ? T(0) : power;
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
template <class T, bool Capped>
GAC_DEVICE void merge_block(
    const ThreadMoments<T, Capped>& mine, T by, const Transform<T, Capped>& transform, const MergeScratch<T>& scratch,
    SharedMoments<T>* to) {
    const T warp_top = over_warp(mine.top, Largest());
    const T fall = transform.between(mine.top, transform.from(warp_top)), shrink = Power<T>::at(fall * by);
    scratch.sum[thread()] = shrink * mine.sum;
    scratch.square[thread()] = shrink * shrink * mine.square;
    scratch.moment[thread()] = shrink * multiply_add(mine.sum, fall, mine.moment);
    if (lane() == 0) scratch.top[warp()] = warp_top;
    barrier();  // the first warp adds up what all have left
    if (warp() != 0) return;
    const int warps = threads() / kWarp;
    const T below = lane() < warps ? scratch.top[lane()] : -static_cast<T>(__builtin_huge_val());
    const T top = over_warp(below, Largest());
    const T my_fall = transform.between(below, transform.from(top)), my_shrink = Power<T>::at(my_fall * by);
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

// The row's moments from those of the cluster's blocks, in every lane of the warp that asks; z = k x. The top itself adds 1 to
// the sum: log_sum >= 0.
template <class T>
struct RowMoments {
    T top;  // raw
    double log_sum, entropy, sum_sq;
};

template <class T, bool Capped>
GAC_DEVICE RowMoments<T> merge_cluster(const SharedMoments<T>* own, T by, double k, const Transform<T, Capped>& transform) {
    constexpr T kInfinity = static_cast<T>(__builtin_huge_val());
    SharedMoments<T> part{-kInfinity, 0, 0, 0};
    if (lane() < cluster_size()) part = read_remote(own, lane());
    const T top = over_warp(part.top, Largest());
    const T down = transform.between(part.top, transform.from(top));
    const double fall = static_cast<double>(down), shrink = static_cast<double>(Power<T>::at(down * by));
    const double sum = over_warp(shrink * part.sum, Add());
    const double square = over_warp(shrink * shrink * part.square, Add());
    const double moment = over_warp(shrink * (part.moment + fall * part.sum), Add());
    // Of a row without a finite logit, or with a nan, everything is nan.
    if (!(top > -kInfinity)) return {top, __builtin_nan(""), __builtin_nan(""), __builtin_nan("")};
    const double log_sum = ::log(sum), entropy = log_sum - k * (moment / sum), sum_sq = square / (sum * sum);
    return {top, log_sum, entropy > 0 || entropy != entropy ? entropy : 0, sum_sq > 1 ? 1 : sum_sq};
}

}  // namespace gac::cuda
