// The row primitives over many rows: which passes a row takes, and the token's slope between them.
#pragma once

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "row_passes.h"
#include "row_terms.h"

namespace GAC_NAMESPACE {

using gac::Element;
using gac::Grid;
using gac::kDead;
using gac::kDemonstration;
using gac::kElsewhere;
using gac::kRollout;
using gac::RowsCall;

// Denormal numbers cost hundreds of cycles each and mean nothing here: probabilities below 1e-38.
struct WithoutDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    WithoutDenormals() { _mm_setcsr(before | 0x8040); }  // flush to zero, denormals are zero
    ~WithoutDenormals() { _mm_setcsr(before); }
#endif
};

// The term of a token is computed as token_loss does, inside such a region too.
struct WithDenormals {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();
    WithDenormals() { _mm_setcsr(before & ~0x8040u); }
    ~WithDenormals() { _mm_setcsr(before); }
#endif
};

template <class T>
GAC_INLINE int64_t target_of(const RowsCall<T>& c, int64_t n) {
    return c.wide_targets ? static_cast<const int64_t*>(c.targets)[n] : static_cast<const int32_t*>(c.targets)[n];
}

template <class V, class E>
struct Rows {
    using T = typename V::Scalar;
    using Stored = typename E::Stored;
    using Call = RowsCall<T>;

    static void statistics(const Call& c, int64_t begin, int64_t end, T* scratch) {
        c.softcap > 0 ? over<true, kStatistics>(c, begin, end, scratch)
                      : over<false, kStatistics>(c, begin, end, scratch);
    }
    static void gradient(const Call& c, int64_t begin, int64_t end, T* scratch) {
        c.softcap > 0 ? over<true, kGradient>(c, begin, end, scratch) : over<false, kGradient>(c, begin, end, scratch);
    }
    static void fused(const Call& c, int64_t begin, int64_t end, T* scratch) {
        c.softcap > 0 ? over<true, kFused>(c, begin, end, scratch) : over<false, kFused>(c, begin, end, scratch);
    }

    static void scale(char* data, int64_t count, double factor) {
        const V by(factor);
        Stored* const x = reinterpret_cast<Stored*>(data);
        for_each_group<E>(x, x, 0, count, [&](auto* from, auto* to, int64_t, int) __attribute__((always_inline)) {
            V v[E::Vectors];
            E::load(from, v);
            for (V& each : v) each = each * by;
            E::store(to, v);  // a nan in 16 bits widens to zeros below, which rounding does not carry over
        });
    }

private:
    enum Task { kStatistics, kGradient, kFused };

    // What one row is worked on with.
    template <bool Capped>
    struct Row {
        int64_t n, columns, target;
        const Stored* x;
        Stored* out;
        Transform<V, Capped> transform;
        T *block_top, *base_block;
        Moments m;
        double target_raw;   // the target's logit, kept because `out` may be `x`
        double target_logp;
        Gift gift;
    };

    template <bool Capped, Task task>
    static void over(const Call& c, int64_t begin, int64_t end, T* scratch) {
        const WithoutDenormals guard;
        for (int64_t n = begin; n < end; ++n) {
            if (c.kind[n] == kDead) {
                clear<task>(c, n, 0);
                continue;
            }
            const int64_t target = target_of(c, n);
            const bool elsewhere = task != kFused && target == kElsewhere;
            if (!elsewhere && (target < 0 || target >= c.columns)) {
                clear<task>(c, n, static_cast<T>(__builtin_nan("")));
                continue;
            }
            const double heat = c.temperature ? static_cast<double>(c.temperature[n]) : c.temperature_value;
            Row<Capped> row{
                n, c.columns, target, reinterpret_cast<const Stored*>(c.logits.row(n)),
                c.gradient.data ? reinterpret_cast<Stored*>(c.gradient.row(n)) : nullptr,
                Transform<V, Capped>(c.scale, c.softcap, heat), scratch, scratch + c.columns / kBlock<E> + 1,
                {}, 0, 0, {}};
            if (!elsewhere) row.target_raw = static_cast<double>(E::widen(row.x[target]));
            one<Capped, task>(c, row);
        }
    }

    template <bool Capped, Task task>
    static void one(const Call& c, Row<Capped>& row) {
        const int64_t n = row.n;
        const bool gift = c.base.data && c.kind[n] == kDemonstration && row.target >= 0;
        const bool bonus = task == kFused ? c.term.entropy_coef != 0 && c.kind[n] == kRollout
                                          : task == kGradient && c.entropy_slope;
        constexpr bool kCanStore = task == kFused && !Capped && sizeof(Stored) == sizeof(T);
        const bool store = kCanStore && !bonus && !gift;
        if constexpr (task == kGradient) {
            const T* const given = c.given_normalizer + n * (c.base.data ? 4 : 2);
            row.m = {static_cast<double>(given[0]), static_cast<double>(given[1]), static_cast<double>(c.given_entropy[n]), 0};
        } else if (kCanStore && store) {
            row.m = measure_row<V, E, Capped, kCanStore>(row.x, row.columns, row.transform, row.out, row.block_top);
        } else {
            row.m = measure_row<V, E, Capped, false>(row.x, row.columns, row.transform, nullptr, nullptr);
        }
        const Transform<V, Capped>& f = row.transform;
        if (row.target >= 0) row.target_logp = f.k * f.fall(row.target_raw, row.m.top) - row.m.log_sum;
        if (gift) row.gift = gift_of(c, row, task == kGradient ? c.given_normalizer + 4 * n + 2 : nullptr);
        if constexpr (task != kGradient) {
            c.logprobs[n] = static_cast<T>(row.target_logp);
            c.entropy[n] = static_cast<T>(row.m.entropy);
            c.sum_sq[n] = static_cast<T>(row.m.sum_sq);
            if (c.normalizer) {
                T* const to = c.normalizer + n * (c.base.data ? 4 : 2);
                to[0] = static_cast<T>(row.m.top);
                to[1] = static_cast<T>(row.m.log_sum);
                if (c.base.data) {
                    to[2] = gift ? static_cast<T>(row.gift.top) : T(0);
                    to[3] = gift ? static_cast<T>(row.gift.log_sum) : T(0);
                }
            }
            if (c.supervised) c.supervised[n] = gift ? static_cast<T>(cross_entropy(c, row)) : T(0);
        }
        if constexpr (task == kStatistics) return;
        Slopes slopes;
        if constexpr (task == kFused) {
            const WithDenormals region;
            slopes = token_slopes<V>(c, n, static_cast<T>(row.target_logp));
        } else {
            slopes = {static_cast<double>(c.slope[n]), bonus ? static_cast<double>(c.entropy_slope[n]) : 0};
        }
        if (!(row.m.log_sum - row.m.log_sum == 0) || !(slopes.logp - slopes.logp == 0)) {
            fill(row.out, row.columns, __builtin_nan(""));  // what is not finite anywhere is nan everywhere
            return;
        }
        write<Capped, task>(c, row, slopes, bonus, gift, store);
    }

    template <bool Capped, Task task>
    static void write(const Call& c, Row<Capped>& row, Slopes slopes, bool bonus, bool gift, bool store) {
        const double coefficient = -slopes.logp * row.transform.slope;
        bool written = false;
        if constexpr (!Capped) {
            if (store) {
                gradient_of_stored<V, E>(row.out, row.columns, coefficient, row.m, row.transform.k, row.block_top);
                written = true;
            } else if (sizeof(Stored) == 2 && !bonus && !gift) {
                if constexpr (sizeof(Stored) == 2)
                    short_gradient<V, E>(row.x, row.out, row.columns, coefficient, row.m, row.transform);
                written = true;
            }
        }
        if (!written) gift ? general<Capped, true>(c, row, slopes) : general<Capped, false>(c, row, slopes);
        if (row.target < 0) return;  // in another shard
        // The target's own column, which has the other part of t - p.
        const double p = __builtin_exp(row.target_logp), away = -__builtin_expm1(row.target_logp);
        const double own = gift ? row.gift.target - p : away;
        const double log_p = row.target_logp > -1e30 ? row.target_logp : 0;
        const double value = slopes.logp * own - slopes.entropy * (p * (log_p + row.m.entropy));
        put(row.out, row.target, value * row.transform.derivative(row.target_raw));
    }

    // Any gradient: soft cap, entropy bonus, GIFT.
    template <bool Capped, bool WithGift>
    static __attribute__((noinline)) void general(const Call& c, const Row<Capped>& row, Slopes slopes) {
        constexpr int K = E::Vectors;
        const Transform<V, Capped> f = row.transform;
        const Exponential<V> exponential(f.k), natural(1);
        const auto origin = f.from(row.m.top);
        const V k_V(f.k), less(-row.m.log_sum), entropy(row.m.entropy), slope(slopes.logp), bonus(slopes.entropy),
            factor(slopes.logp * row.gift.inverse);
        for (int64_t block = (row.columns - 1) / kBlock<E>; block >= 0; --block) {
            const int64_t begin = block * kBlock<E>;
            const int64_t end = begin + kBlock<E> < row.columns ? begin + kBlock<E> : row.columns;
            if constexpr (WithGift) base_probabilities(c, row, begin, end);
            for_each_group<E>(
                row.x, row.out, begin, end, [&](auto* from, auto* to, int64_t i, int) __attribute__((always_inline)) {
                    V v[K], q[WithGift ? K : 1];
                    E::load(from, v);
                    if constexpr (WithGift) place<E>(row.base_block + (i - begin), q);
                    for (int k = 0; k < K; ++k) {
                        const auto z = f.at(v[k], origin);
                        const V log_p = fma(exponential.floor(z.fall), k_V, less);
                        const V p = natural.at(natural.floor(log_p));
                        V g = -p * (slope + bonus * (log_p + entropy));
                        if constexpr (WithGift) g = fma(factor, q[k], g);
                        v[k] = g * z.derivative;
                    }
                    E::store(to, v);
                });
        }
    }

    // -sum q log p, with q = p0 / D off the target.
    template <bool Capped>
    static __attribute__((noinline)) double cross_entropy(const Call& c, const Row<Capped>& row) {
        constexpr int K = E::Vectors, L = V::Lanes;
        const Transform<V, Capped> f = row.transform;
        const auto origin = f.from(row.m.top);
        const V k_V(f.k), less(-row.m.log_sum);
        double lanes[L] = {}, total = 0;
        for (int64_t begin = 0; begin < row.columns; begin += kBlock<E>) {
            const int64_t end = begin + kBlock<E> < row.columns ? begin + kBlock<E> : row.columns;
            base_probabilities(c, row, begin, end);
            for (int64_t run = begin; run < end; run += kRunGroups * E::Group) {
                const int64_t stop = run + kRunGroups * E::Group < end ? run + kRunGroups * E::Group : end;
                V sum[K];
                for (int k = 0; k < K; ++k) sum[k] = V(0);
                for_each_group<E>(
                    row.x, nullptr, run, stop, [&](auto* from, auto*, int64_t i, int) __attribute__((always_inline)) {
                        V v[K], q[K];
                        E::load(from, v);
                        place<E>(row.base_block + (i - begin), q);
                        for (int k = 0; k < K; ++k)
                            sum[k] = sum[k] + select(q[k] > V(0), q[k] * fma(f.fall(v[k], origin), k_V, less), V(0));
                    });
                for (int k = 0; k < K; ++k) sum[k].add_to(lanes);
            }
        }
        for (double lane : lanes) total += lane;
        const double excess = row.gift.excess == 0 ? 0 : row.gift.excess * row.target_logp;
        return -(row.gift.inverse * total + excess);
    }

    // The block's smoothed base probabilities into row.base_block, 0 beyond the last column.
    template <bool Capped>
    static void base_probabilities(const Call& c, const Row<Capped>& row, int64_t begin, int64_t end) {
        const int64_t padded = (end - begin + V::Lanes - 1) / V::Lanes * V::Lanes;
        T* const to = row.base_block;
        widen(c, row.n, begin, end, to);
        const Exponential<V> natural(1);
        const V top(row.gift.top), log_sum(row.gift.log_sum), keep(row.gift.keep), uniform(row.gift.uniform);
        for (int64_t i = end - begin; i < padded; ++i) to[i] = static_cast<T>(-__builtin_huge_val());
        for (int64_t i = 0; i < padded; i += V::Lanes) {
            const V log_p = natural.floor((V::load(to + i) - top) - log_sum);
            fma(keep, natural.at(log_p), uniform).store(to + i);
        }
        for (int64_t i = end - begin; i < kBlock<E> && i < end - begin + E::Group; ++i) to[i] = 0;
    }

    static void widen(const Call& c, int64_t n, int64_t begin, int64_t end, T* to) {
        const auto convert = [&](auto element) {
            using B = decltype(element);
            const auto* const from = reinterpret_cast<const typename B::Stored*>(c.base.row(n)) + begin;
            for (int64_t i = 0; i < end - begin; ++i) to[i] = static_cast<T>(B::widen(from[i]));
        };
        with_base(c, convert);
    }

    template <bool Capped>
    static Gift gift_of(const Call& c, const Row<Capped>& row, const T* given) {
        Gift out;
        with_base(c, [&](auto element) {
            using B = decltype(element);
            const auto* const base = reinterpret_cast<const typename B::Stored*>(c.base.row(row.n));
            Moments m{0, 0, 0, 0};
            if (given) {
                m.top = static_cast<double>(given[0]);
                m.log_sum = static_cast<double>(given[1]);
            } else {
                m = measure_row<V, B, false, false>(base, row.columns, Transform<V, false>(1, 0, 1), nullptr, nullptr);
            }
            out = gift_target(m, static_cast<double>(B::widen(base[row.target])), c.beta, c.smooth, row.columns);
        });
        return out;
    }

    template <class F>
    static void with_base(const Call& c, const F& f) {
        if constexpr (sizeof(T) == 8) {
            f(E());
        } else {
            if (c.base_element == Element::kBfloat16) return f(Bfloat16Elements());
            if (c.base_element == Element::kHalf) return f(HalfElements());
            f(FloatElements());
        }
    }

    template <Task task>
    static void clear(const Call& c, int64_t n, T value) {
        if constexpr (task != kGradient) {
            c.logprobs[n] = c.entropy[n] = c.sum_sq[n] = value;
            for (int k = 0; c.normalizer && k < (c.base.data ? 4 : 2); ++k)
                c.normalizer[n * (c.base.data ? 4 : 2) + k] = value;
            if (c.supervised) c.supervised[n] = c.kind[n] == kDemonstration ? value : T(0);
        }
        if constexpr (task != kStatistics)
            fill(reinterpret_cast<Stored*>(c.gradient.row(n)), c.columns, static_cast<double>(value));
    }

    static void fill(Stored* to, int64_t columns, double value) {
        const Stored stored = narrow(value);
        for (int64_t i = 0; i < columns; ++i) to[i] = stored;
    }
    static void put(Stored* to, int64_t column, double value) { to[column] = narrow(value); }
    static Stored narrow(double value) {
        if (value != value) return E::kNan;
        V v[E::Vectors];
        for (V& each : v) each = V(value);
        Stored group[E::Group];
        E::store(group, v);
        return group[0];
    }
};

}  // namespace GAC_NAMESPACE
