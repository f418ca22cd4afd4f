// The passes over one row of logits, written once for a lane type V and an element type E.
//
// A row is read in blocks that stay in the first-level cache. The statistics keep a running maximum: a block's exponentials
// are taken relative to the maximum so far, and sums made before are rescaled when it rises, so that memory is read
// once. Lanes are summed in V over a run of columns and in float64 over runs: what an element adds to depends on its column
// alone, and nothing on threads, neighbours or strides.
#pragma once

#include "row_transform.h"

namespace GAC_NAMESPACE {

// Columns of a block.
template <class E>
constexpr int64_t kBlock = gac::kBlockBytes / sizeof(typename E::Stored);

// Additions to one lane in float32: equal terms, whose rounding errors do not cancel, cost 2e-7 of their sum.
constexpr int64_t kRunGroups = 32;

// Asks for a group of columns, which may lie beyond the row: memory brings the next block while this one is computed, where
// it would rest otherwise.
template <class E>
GAC_INLINE void prefetch(const typename E::Stored* x, int64_t column) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(x) + column * sizeof(*x);
    for (uintptr_t byte = 0; byte < E::Group * sizeof(*x); byte += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(at + byte));
}

// step(from, to, i, size) for every group of the columns [begin, end) of x, to be written to `out` (which may be x, or
// null). The last one, if it is not whole, stands in a buffer filled up with -infinity.
template <class E, class Step>
GAC_INLINE void for_each_group(
    const typename E::Stored* x, typename E::Stored* out, int64_t begin, int64_t end, const Step& step) {
    int64_t i = begin;
    for (; i + E::Group <= end; i += E::Group) step(x + i, out ? out + i : nullptr, i, E::Group);
    if (i == end) return;
    typename E::Stored buffer[E::Group];
    for (int k = 0; k < E::Group; ++k) buffer[k] = i + k < end ? x[i + k] : E::kLowest;
    step(static_cast<const typename E::Stored*>(buffer), buffer, i, static_cast<int>(end - i));
    for (int k = 0; out && i + k < end; ++k) out[i + k] = buffer[k];
}

// Where element i of a group lies among its vectors.
template <class E, class V>
GAC_INLINE void place(const typename V::Scalar* natural, V (&v)[E::Vectors]) {
    if constexpr (!E::Interleaved) {
        for (int k = 0; k < E::Vectors; ++k) v[k] = V::load(natural + k * V::Lanes);
    } else {
        typename V::Scalar lanes[E::Vectors][V::Lanes];
        for (int i = 0; i < E::Group; ++i) lanes[i % E::Vectors][i / E::Vectors] = natural[i];
        for (int k = 0; k < E::Vectors; ++k) v[k] = V::load(lanes[k]);
    }
}

// 1 in the lanes of a group's first `size` elements, else 0.
template <class E, class V>
GAC_INLINE void inside(int size, V (&v)[E::Vectors]) {
    typename V::Scalar natural[E::Group];
    for (int i = 0; i < E::Group; ++i) natural[i] = i < size;
    place<E>(natural, v);
}

// The largest element of the columns [begin, end).
template <class V, class E>
GAC_INLINE typename V::Scalar largest_of(const typename E::Stored* x, int64_t begin, int64_t end) {
    constexpr int K = E::Vectors, Chains = 4;  // a maximum takes four cycles, and two can start in each
    V largest[Chains][K], v[K];
    for (auto& chain : largest)
        for (V& each : chain) each = V(-__builtin_huge_val());
    int64_t i = begin;
    for (; i + Chains * E::Group <= end; i += Chains * E::Group)
        for (int c = 0; c < Chains; ++c) {
            E::load(x + i + c * E::Group, v);
            for (int k = 0; k < K; ++k) largest[c][k] = greater(largest[c][k], v[k]);
        }
    for_each_group<E>(x, nullptr, i, end, [&](auto* at, auto*, int64_t, int) __attribute__((always_inline)) {
        E::load(at, v);
        for (int k = 0; k < K; ++k) largest[0][k] = greater(largest[0][k], v[k]);
    });
    V all = largest[0][0];
    for (const auto& chain : largest)
        for (const V& each : chain) all = greater(all, each);
    return largest_lane(all);
}

// Maximum, log of the sum of exponentials, entropy and sum of p^2 of a row. `Store`: also leaves e^(z - z(block_top)) in
// `out`, which may be the row itself, for gradient_of_stored. The top itself adds exactly 1 to the sum, and nothing adds
// more to the sum of squares than to the sum: log_sum >= 0 and 0 <= sum p^2 <= 1, rounded too.
template <class V, class E, bool Capped, bool Store>
__attribute__((noinline)) Moments measure_row(
    const typename E::Stored* x, int64_t columns, const Transform<V, Capped>& transform, typename E::Stored* out,
    typename V::Scalar* block_top) {
    using T = typename V::Scalar;
    constexpr double kInfinity = __builtin_huge_val();
    constexpr int K = E::Vectors, L = V::Lanes;
    const Transform<V, Capped> f = transform;
    const Exponential<V> exponential(f.k);
    double sum[L] = {}, square[L] = {}, moment[L] = {};  // of e, e^2 and e (x - x(top))
    double top = -kInfinity;
    for (int64_t begin = 0, block = 0; begin < columns; begin += kBlock<E>, ++block) {
        const int64_t end = begin + kBlock<E> < columns ? begin + kBlock<E> : columns;
        const T highest = largest_of<V, E>(x, begin, end);
        const double rise = f.finite(static_cast<double>(highest));  // the transform is increasing
        if (rise > top) {
            const double fall = f.fall(top, rise), shrink = __builtin_exp(f.k * fall);
            for (int l = 0; l < L && top > -kInfinity; ++l) {
                moment[l] = shrink * (moment[l] + fall * sum[l]);
                sum[l] *= shrink;
                square[l] *= shrink * shrink;
            }
            top = rise;
        }
        if (Store) block_top[block] = static_cast<T>(top);
        const auto origin = f.from(top > -kInfinity ? top : 0.0);  // a block of -infinities alone: all exponentials are 0
        for (int64_t run = begin; run < end; run += kRunGroups * E::Group) {
            V s[K], s2[K], sd[K];
            for (int k = 0; k < K; ++k) s[k] = s2[k] = sd[k] = V(0);
            const auto step = [&](auto* from, auto* to, int64_t i, int size) __attribute__((always_inline)) {
                V v[K];
                E::load(from, v);
                prefetch<E>(x, i + kBlock<E>);
                for (int k = 0; k < K; ++k) {
                    const V d = exponential.floor(f.fall(v[k], origin));
                    v[k] = exponential.at(d);
                    if (Capped && size < E::Group) {  // the cap has made -infinity finite
                        V in[K];
                        inside<E>(size, in);
                        v[k] = select(in[k] > V(0), v[k], V(0));
                    }
                    s[k] = s[k] + v[k];
                    s2[k] = fma(v[k], v[k], s2[k]);
                    sd[k] = fma(v[k], d, sd[k]);
                }
                if constexpr (Store) E::store(to, v);
            };
            const int64_t stop = run + kRunGroups * E::Group < end ? run + kRunGroups * E::Group : end;
            for_each_group<E>(x, Store ? out : nullptr, run, stop, step);
            for (int k = 1; k < K; ++k) {
                s[0] = s[0] + s[k];
                s2[0] = s2[0] + s2[k];
                sd[0] = sd[0] + sd[k];
            }
            s[0].add_to(sum);
            s2[0].add_to(square);
            sd[0].add_to(moment);
        }
    }
    double total = 0, squares = 0, moments = 0;
    for (int l = 0; l < L; ++l) {
        total += sum[l];
        squares += square[l];
        moments += moment[l];
    }
    const double log_sum = __builtin_log(total);
    // Of a row without a finite logit, or with a nan, everything is nan.
    if (!(top > -kInfinity)) return {top, __builtin_nan(""), __builtin_nan(""), __builtin_nan("")};
    const double entropy = log_sum - f.k * (moments / total);
    return {top, log_sum, entropy > 0 || entropy != entropy ? entropy : 0, squares / (total * total)};
}

// The gradient from exponentials that measure_row left in `x`: -slope p.
template <class V, class E>
__attribute__((noinline)) void gradient_of_stored(
    typename E::Stored* x, int64_t columns, double coefficient, const Moments& m, double k, const typename V::Scalar* block_top) {
    constexpr int K = E::Vectors;
    for (int64_t block = (columns - 1) / kBlock<E>; block >= 0; --block) {  // backwards, to meet the cache
        const int64_t begin = block * kBlock<E>;
        const int64_t end = begin + kBlock<E> < columns ? begin + kBlock<E> : columns;
        const double shift = k * (static_cast<double>(block_top[block]) - m.top) - m.log_sum;
        const V factor(coefficient * __builtin_exp(shift));
        for_each_group<E>(x, x, begin, end, [&](auto* from, auto* to, int64_t, int) __attribute__((always_inline)) {
            V v[K];
            E::load(from, v);
            for (int k = 0; k < K; ++k) v[k] = v[k] * factor;
            E::store(to, v);
        });
    }
}

// The same from the logits, for elements of 16 bits: a short exponential is far below their rounding.
template <class V, class E>
__attribute__((noinline)) void short_gradient(
    const typename E::Stored* x, typename E::Stored* out, int64_t columns, double coefficient, const Moments& m,
    const Transform<V, false>& transform) {
    constexpr int K = E::Vectors;
    const V origin(m.top), rate(transform.k * Exponential<V>::kUnit), shift(-m.log_sum * Exponential<V>::kUnit);
    const ShortExp2 scaled_exp2(coefficient);
    const auto group = [&](const auto* from, auto* to) __attribute__((always_inline)) {
        V v[K];
        E::load(from, v);
        for (int k = 0; k < K; ++k) v[k] = scaled_exp2(fma(v[k] - origin, rate, shift));
        E::store(to, v);
    };
    int64_t whole = columns - columns % E::Group;
    for_each_group<E>(x, out, whole, columns, [&](auto* from, auto* to, int64_t, int) __attribute__((always_inline)) {
        group(from, to);
    });
    while ((whole -= E::Group) >= 0) group(x + whole, out + whole);
}

}  // namespace GAC_NAMESPACE
