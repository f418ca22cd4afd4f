// One loop for every pass over a sequence: whole vectors, tails, and sums whose order does not depend on anything else.
#pragma once

#include "../math/config.h"
#include "../token_loss.h"

namespace GAC_NAMESPACE {

using gac::Streams;

// Lanes are summed in V over this many vectors, then flushed into float64: the order is fixed by a token's place in its
// sequence alone, so that neither threads nor neighbours nor padding on the right change a bit of a sequence's results.
constexpr int64_t kBlockVectors = 32;

template <class T>
GAC_INLINE Streams<T> advance(const Streams<T>& s, int64_t i) {
    auto at = [i](auto* p) { return p ? p + i : p; };
    return {at(s.mask), at(s.logp), at(s.old), at(s.reference), at(s.rollout), at(s.entropy), at(s.sum_sq),
            at(s.supervised), at(s.advantage), at(s.logp_out), at(s.slope), at(s.entropy_slope)};
}

// The last tokens of a sequence, too few for a vector, copied to where a whole vector can be read and written; the
// lanes beyond them are masked.
template <class V>
struct Tail {
    using T = typename V::Scalar;
    static constexpr int L = V::Lanes;
    uint8_t mask[L];
    T in[8][L], out[3][L] = {};

    Streams<T> gather(const Streams<T>& s, int64_t n) {
        auto copy = [n](const auto* from, auto* to) {
            for (int i = 0; i < L; ++i) to[i] = from && i < n ? from[i] : 0;
            return from ? to : nullptr;
        };
        return {copy(s.mask, mask), copy(s.logp, in[0]), copy(s.old, in[1]), copy(s.reference, in[2]),
                copy(s.rollout, in[3]), copy(s.entropy, in[4]), copy(s.sum_sq, in[5]), copy(s.supervised, in[6]),
                copy(s.advantage, in[7]), s.logp_out ? out[0] : nullptr, s.slope ? out[1] : nullptr, s.entropy_slope ? out[2] : nullptr};
    }
    void scatter(const Streams<T>& s, int64_t n) const {
        T* const to[3] = {s.logp_out, s.slope, s.entropy_slope};
        for (int k = 0; k < 3; ++k)
            for (int64_t i = 0; to[k] && i < n; ++i) to[k][i] = out[k][i];
    }
};

// Sums of K quantities over a sequence: lanes of V inside a block, lanes of double over the blocks.
template <class V, int K>
struct LaneSums {
    double lanes[K][V::Lanes];

    LaneSums() : lanes{} {}
    void flush(const V* block) {
        for (int k = 0; k < K; ++k) block[k].add_to(lanes[k]);
    }
    double operator[](int k) const {
        double sum = 0;
        for (int i = 0; i < V::Lanes; ++i) sum += lanes[k][i];
        return sum;
    }
};

// f(0), ..., f(K - 1) with constant arguments, so that arrays indexed by them become registers.
template <int K, class F>
GAC_INLINE void unroll(const F& f) {
    if constexpr (K > 0) {
        unroll<K - 1>(f);
        f(K - 1);
    }
}

// The hot loop: whole vectors of one block. A function of its own, so that `step` is instantiated once for blocks and
// tails, and works on copies that no store can alias.
template <class V, int K, class Step>
__attribute__((noinline)) void sum_vectors(
    const Streams<typename V::Scalar>& streams, int64_t begin, int64_t end, V (&sums)[K], const Step& step) {
    const Streams<typename V::Scalar> at = streams;
    const Step local = step;
    V sum[K];
    unroll<K>([&](int k) __attribute__((always_inline)) { sum[k] = sums[k]; });
    for (int64_t i = begin; i < end; i += V::Lanes) local(at, i, sum);
    unroll<K>([&](int k) __attribute__((always_inline)) { sums[k] = sum[k]; });
}

// Calls step(streams, i, sums) for the vectors of n tokens, in order. The last of the K sums is not summed over the blocks
// but handed on, which suits a maximum; it is returned.
template <class V, int K, class Step>
V for_each_vector(const Streams<typename V::Scalar>& s, int64_t n, LaneSums<V, K - 1>& sums, const Step& step) {
    constexpr int64_t kBlock = kBlockVectors * V::Lanes;
    const int64_t whole = n - n % V::Lanes;
    V block_sums[K];
    block_sums[K - 1] = V(0);
    for (int64_t block = 0; block < n; block += kBlock) {
        for (int k = 0; k < K - 1; ++k) block_sums[k] = V(0);
        const bool last = n - block <= kBlock;
        sum_vectors<V, K>(s, block, last ? whole : block + kBlock, block_sums, step);
        if (last && whole < n) {
            Tail<V> tail;
            const Streams<typename V::Scalar> rest = advance(s, whole);
            sum_vectors<V, K>(tail.gather(rest, n - whole), 0, V::Lanes, block_sums, step);
            tail.scatter(rest, n - whole);
        }
        sums.flush(block_sums);
    }
    return block_sums[K - 1];
}

}  // namespace GAC_NAMESPACE
