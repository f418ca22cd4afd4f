// The row primitives: a cluster of blocks holds a row of logits on chip, merges its moments through distributed shared
// memory, computes the token's slope in one warp of each block, and writes the gradient: one read and one write.
//
//     fetch        every thread asks for its part of the row, asynchronously
//     first pass   maximum and sums of the part while it arrives
//     merge        threads -> warp 0 -> (cluster barrier) -> warp 0 of every block reads all blocks' sums
//     token        warp 0: log-prob, entropy, slope, the same in every block; one of them writes what is one a row
//     second pass  the gradient of the part, from shared memory
//
// A row's result depends on nothing but the row and its token. In place: the target's logit is read before the cluster
// barrier, after which alone anything is written.
#pragma once

#include "lane.cuh"

#include "../math/row_slope.h"
#include "../rows.h"
#include "row_memory.cuh"
#include "row_moments.cuh"

namespace gac::cuda {

constexpr int kMostThreads = 256;

// How a launch shares out rows; see rows.cu.
struct RowPlan {
    int held;  // vectors a thread keeps
};

// What warp 0 tells the block of a row.
template <class T>
struct RowFacts {
    T top, log_sum;            // log_sum in units of Power
    T slope, bonus, entropy;   // dz = slope (t - p) - bonus p (log p + entropy), times dz / draw
    T natural_log_sum, k;
    T target;                  // the gradient at the target's column
    T base_top, base_log_sum, keep, uniform, inverse;  // GIFT's target
    int finite;                // else the gradient is nan everywhere
    T gain;                    // of the top under a soft cap; last, or it is loaded along with others where there is none
};

template <class T>
struct RowShared {
    SharedMoments<T> moments, base_moments;
    RowFacts<T> facts;
    RowToken<T> token;
    T raw;  // the target's logit
    double crossed;
    double crossed_warp[kMostThreads / kWarp];
    T top[kMostThreads / kWarp];
};

// Of a launch, in bytes: facts, scratch of merging, kept vectors.
template <class T>
constexpr size_t row_shared_bytes(int threads, int held) {
    return (sizeof(RowShared<T>) + 15) / 16 * 16 + 3 * sizeof(T) * threads + static_cast<size_t>(held) * threads * 16;
}

// One row of one call, as a thread of its cluster sees it.
template <class E, RowTask Task, bool Capped>
struct RowWork {
    using T = typename E::Sum;
    using Stored = typename E::Stored;
    using V = typename LaneOf<T>::Type;
    static constexpr bool kMeasures = Task != RowTask::kGradient, kWrites = Task != RowTask::kStatistics;

    const RowsCall<T>& c;
    const int64_t n;
    const int target, columns;
    const bool demonstration, here;  // here: the target is one of these columns
    RowShared<T>& shared;
    MergeScratch<T> scratch;
    RowPart<E> part;
    T by;
    Transform<T, Capped> transform;

    GAC_DEVICE RowWork(const RowsCall<T>& c, int64_t n, int64_t target, int held, char* memory)
        : c(c), n(n), target(static_cast<int>(target)), columns(static_cast<int>(c.columns)), demonstration(c.kind[n] == kDemonstration),
          here(target >= 0), shared(*reinterpret_cast<RowShared<T>*>(memory)), scratch(),
          part(reinterpret_cast<const Stored*>(c.logits.row(n)), nullptr, columns, held) {
        char* at = memory + (sizeof(RowShared<T>) + 15) / 16 * 16;
        T* const lanes = reinterpret_cast<T*>(at);
        scratch = {lanes, lanes + threads(), lanes + 2 * threads(), shared.top};
        part.kept = reinterpret_cast<Bytes16*>(at + 3 * sizeof(T) * threads());
        by = static_cast<T>(k() * Power<T>::kUnit);
        transform.doubled = static_cast<T>(doubled());
    }

    // z = k x, and dz / draw but for the cap's derivative. Computed anew where they are needed: registers are short.
    GAC_DEVICE double cool() const {
        return 1.0 / (c.temperature ? static_cast<double>(c.temperature[n]) : c.temperature_value);
    }
    GAC_DEVICE double slope_k() const { return bounded_factor<T>(c.scale * cool()); }
    GAC_DEVICE double k() const { return Capped ? bounded_factor<T>(c.softcap * cool()) : slope_k(); }
    GAC_DEVICE double doubled() const { return Capped ? bounded_factor<T>(2 * c.scale / c.softcap) : 0; }

    GAC_DEVICE bool gift() const { return c.base.data && demonstration && here; }

    GAC_DEVICE void run() {
        const bool second = kWrites || (gift() && kMeasures);
        if (!second) part.held = 0;
        if (thread() == 0) {  // before anything is written
            if (here) shared.raw = E::widen(part.row[target]);
            if constexpr (Task == RowTask::kFused) shared.token = row_token(c, n);
        }
        if constexpr (kMeasures) measure();
        if (gift() && kMeasures) measure_base();
        cluster_arrive();  // this block's moments are there, and its target is read
        cluster_wait();
        if (warp() == 0) conclude();
        cluster_arrive();  // nobody reads this block's moments any more
        barrier();         // the facts are there
        if (second) {
            if (gift()) {
                gradient_of_gift();
            } else if constexpr (kWrites) {
                (Task == RowTask::kFused ? c.term.entropy_coef != 0 && !demonstration : c.entropy_slope != nullptr)
                    ? gradient<true>()
                    : gradient<false>();
            }
        }
        cluster_wait();  // a block must not end, and its memory with it, before all have read it
        if (gift() && kMeasures) add_up_crossed();
    }

    GAC_DEVICE void measure() {
        ThreadMoments<T, Capped> mine;
        const auto add = [&](Bytes16 v, int vector) {
            T x[E::Width];
            load(v, vector, x);
            mine.add(x, by, transform);
        };
        if (part.held > 0) {
            part.fetch();
            part.first_pass(add);
        } else {
            part.rest(add);
        }
        merge_block(mine, by, transform, scratch, &shared.moments);
    }

    // The logits of a vector; beyond the row -inf, which none is under a cap.
    GAC_DEVICE void load(Bytes16 v, int vector, T (&x)[E::Width]) const {
        E::widen(v, x);
        if constexpr (Capped) {
#pragma unroll
            for (int i = 0; i < E::Width; ++i)
                x[i] = vector * E::Width + i < columns ? transform.finite(x[i]) : -static_cast<T>(__builtin_huge_val());
        }
    }

    // Base logits come in any type, element by element: GIFT's rows are the few demonstrations.
    GAC_DEVICE T base_at(int column) const {
        const char* const row = c.base.row(n);
        if constexpr (sizeof(T) == 8) return reinterpret_cast<const double*>(row)[column];
        if (c.base_element == Element::kFloat) return reinterpret_cast<const float*>(row)[column];
        const uint16_t stored = reinterpret_cast<const uint16_t*>(row)[column];
        return c.base_element == Element::kBfloat16 ? Bfloat16Elements::widen(stored) : HalfElements::widen(stored);
    }

    GAC_DEVICE void measure_base() {
        ThreadMoments<T, false> mine;
        constexpr T kUnit = static_cast<T>(Power<T>::kUnit);
        for (int vector = part.first + thread(); vector < part.last; vector += threads()) {
            T x[E::Width];
#pragma unroll
            for (int i = 0; i < E::Width; ++i) {
                const int column = vector * E::Width + i;
                x[i] = column < columns ? base_at(column) : -static_cast<T>(__builtin_huge_val());
            }
            mine.add(x, kUnit, Transform<T, false>{});
        }
        barrier();  // the first warp is done with the scratch of the row's own moments
        merge_block(mine, kUnit, Transform<T, false>{}, scratch, &shared.base_moments);
    }

    // Warp 0 of every block: everything that is one a row.
    GAC_DEVICE void conclude() {
        RowMoments<T> m;
        const double k = this->k();
        const int parts = c.base.data ? 4 : 2;
        if constexpr (kMeasures) {
            m = merge_cluster(&shared.moments, by, k, transform);
        } else {
            m.top = c.given_normalizer[n * parts];
            m.log_sum = static_cast<double>(c.given_normalizer[n * parts + 1]);
            m.entropy = static_cast<double>(c.given_entropy[n]);
            m.sum_sq = 0;
        }
        const T raw = transform.finite(here ? shared.raw : T(0));
        const double twice = doubled(), at = twice * static_cast<double>(raw), top = twice * static_cast<double>(m.top);
        const double fall = Capped ? capped_fall(at, top) : static_cast<double>(raw - m.top);
        const T logp = here ? static_cast<T>(fall * k - m.log_sum) : T(0);
        Gift g{};
        if (gift()) {
            gac::cuda::Moments base{0, 0, 0, 0};
            if constexpr (kMeasures) {
                const RowMoments<T> b = merge_cluster(
                    &shared.base_moments, static_cast<T>(Power<T>::kUnit), 1.0, Transform<T, false>{});
                base.top = static_cast<double>(b.top);
                base.log_sum = b.log_sum;
            } else {
                base.top = static_cast<double>(c.given_normalizer[n * 4 + 2]);
                base.log_sum = static_cast<double>(c.given_normalizer[n * 4 + 3]);
            }
            g = gift_target(base, static_cast<double>(base_at(target)), c.beta, c.smooth, columns);
        }
        if (kMeasures && cluster_rank() == 0 && lane() == 0) report(m, logp, g);
        if (lane() == 0) {
            shared.facts.gain = static_cast<T>(Capped ? capped_gain(top) : 0);
            tell(m, logp, Capped ? capped_slope(at) : 1, g);
        }
    }

    GAC_DEVICE void report(const RowMoments<T>& m, T logp, const Gift& g) const {
        c.logprobs[n] = logp;
        c.entropy[n] = static_cast<T>(m.entropy);
        c.sum_sq[n] = static_cast<T>(m.sum_sq);
        if (c.supervised && !gift()) c.supervised[n] = 0;
        if (!c.normalizer) return;
        const int parts = c.base.data ? 4 : 2;
        c.normalizer[n * parts] = m.top;
        c.normalizer[n * parts + 1] = static_cast<T>(m.log_sum);
        if (parts == 4) {
            c.normalizer[n * 4 + 2] = gift() ? static_cast<T>(g.top) : T(0);
            c.normalizer[n * 4 + 3] = gift() ? static_cast<T>(g.log_sum) : T(0);
        }
    }

    GAC_DEVICE void tell(const RowMoments<T>& m, T logp, double derivative, const Gift& g) {
        Slopes slopes{0, 0};
        if constexpr (Task == RowTask::kFused) slopes = row_slopes<V>(c.term, shared.token, logp);
        if constexpr (Task == RowTask::kGradient)
            slopes = {static_cast<double>(c.slope[n]), c.entropy_slope ? static_cast<double>(c.entropy_slope[n]) : 0};
        const double slope_k = this->slope_k();
        RowFacts<T>& f = shared.facts;
        f.top = m.top;
        f.natural_log_sum = static_cast<T>(m.log_sum);
        f.log_sum = static_cast<T>(m.log_sum * Power<T>::kUnit);
        f.k = static_cast<T>(k());
        f.entropy = static_cast<T>(m.entropy);
        f.slope = static_cast<T>(slopes.logp * slope_k);
        f.bonus = static_cast<T>(slopes.entropy * slope_k);
        f.base_top = static_cast<T>(g.top);
        f.base_log_sum = static_cast<T>(g.log_sum * Power<T>::kUnit);
        f.keep = static_cast<T>(g.keep);
        f.uniform = static_cast<T>(g.uniform);
        f.inverse = static_cast<T>(g.inverse);
        f.finite = m.log_sum - m.log_sum == 0 && slopes.logp - slopes.logp == 0;
        // The target's own column, from where 1 - p loses no digits.
        const double log_p = static_cast<double>(logp), p = ::exp(log_p);
        const double own = gift() ? g.target - p : -::expm1(log_p);
        const double value = slopes.logp * own - slopes.entropy * (p * ((p > 0 ? log_p : 0) + m.entropy));
        f.target = static_cast<T>(value * slope_k * derivative);
        if (gift()) {  // what the cross entropy needs beside its sum
            shared.crossed = g.excess == 0 ? 0 : g.excess * log_p;
        }
    }

    GAC_DEVICE typename Transform<T, Capped>::Point at(const RowFacts<T>& f, T raw) const {
        return transform.at(transform.finite(raw), {f.top, f.gain});
    }
    GAC_DEVICE T probability(const RowFacts<T>& f, T fall) const { return Power<T>::at(multiply_add(fall, by, -f.log_sum)); }
    GAC_DEVICE T log_probability(const RowFacts<T>& f, T fall) const { return multiply_add(fall, f.k, -f.natural_log_sum); }
    GAC_DEVICE T entropy_part(const RowFacts<T>& f, T p, T fall) const {
        return f.bonus * (p * ((p > T(0) ? log_probability(f, fall) : T(0)) + f.entropy));
    }

    template <bool Bonus>
    GAC_DEVICE void gradient() {
        const RowFacts<T> f = shared.facts;
        const RowOut<E> out(c.gradient.row(n), columns);
        if (!f.finite) return fill(out, static_cast<T>(__builtin_nan("")));
        part.second_pass([&](Bytes16 v, int vector) {
            T x[E::Width];
            E::widen(v, x);
#pragma unroll
            for (int i = 0; i < E::Width; ++i) {
                const auto at = this->at(f, x[i]);
                const T p = probability(f, at.fall);
                T g = p * -f.slope;
                if constexpr (Bonus) g -= entropy_part(f, p, at.fall);
                x[i] = Capped ? g * at.derivative : g;
            }
            out.write(vector, x);
        });
        write_target(out, f);
    }

    // GIFT: the gradient, and with the statistics the cross entropy -sum q log p.
    GAC_DEVICE void gradient_of_gift() {
        const RowFacts<T> f = shared.facts;
        const RowOut<E> out(kWrites ? c.gradient.row(n) : nullptr, columns);
        double crossed = 0;
        part.second_pass([&](Bytes16 v, int vector) {
            T x[E::Width], sum = 0;
            E::widen(v, x);
#pragma unroll
            for (int i = 0; i < E::Width; ++i) {
                const int column = vector * E::Width + i;
                T q = 0;
                if (column < columns)
                    q = multiply_add(
                        f.keep, Power<T>::at(multiply_add(base_at(column) - f.base_top, static_cast<T>(Power<T>::kUnit), -f.base_log_sum)),
                        f.uniform);
                const auto at = this->at(f, x[i]);  // not before q, across which a register would be spilled
                if (q > T(0)) sum += q * log_probability(f, at.fall);
                const T p = probability(f, at.fall);
                T g = (f.inverse * q - p) * f.slope;
                if (f.bonus != T(0)) g -= entropy_part(f, p, at.fall);
                x[i] = Capped ? g * at.derivative : g;
            }
            crossed += static_cast<double>(sum);
            if constexpr (kWrites)
                if (f.finite) out.write(vector, x);
        });
        if constexpr (kWrites) f.finite ? write_target(out, f) : fill(out, static_cast<T>(__builtin_nan("")));
        if constexpr (kMeasures) {
            crossed = over_warp(crossed, Add());
            if (lane() == 0) shared.crossed_warp[warp()] = crossed;
        }
    }

    GAC_DEVICE void add_up_crossed() {
        const double excess = shared.crossed;
        const RowFacts<T> f = shared.facts;
        barrier();
        if (thread() == 0) {
            double sum = 0;
            for (int w = 0; w < threads() / kWarp; ++w) sum += shared.crossed_warp[w];
            shared.crossed = sum;
        }
        cluster_barrier();
        if (cluster_rank() == 0 && thread() == 0) {
            double total = 0;
            for (int rank = 0; rank < cluster_size(); ++rank) total += read_remote(&shared.crossed, rank);
            // D may be infinite, and a cross entropy too.
            const double rest = f.inverse == T(0) ? 0 : static_cast<double>(f.inverse) * total;
            c.supervised[n] = static_cast<T>(-(rest + excess));
        }
        cluster_barrier();
    }

    GAC_DEVICE void write_target(const RowOut<E>& out, const RowFacts<T>& f) const {
        if (here && part.owns(target)) out.row[target] = E::narrow(f.target);
    }

    GAC_DEVICE void fill(const RowOut<E>& out, T value) const {
        T x[E::Width];
#pragma unroll
        for (T& each : x) each = value;
        for (int vector = part.first + thread(); vector < part.last; vector += threads()) out.write(vector, x);
    }

    // Of a dead row, or one whose target is nowhere.
    GAC_DEVICE void clear(T value) const {
        if (kMeasures && cluster_rank() == 0 && thread() == 0) {
            const int parts = c.base.data ? 4 : 2;
            c.logprobs[n] = c.entropy[n] = c.sum_sq[n] = value;
            for (int i = 0; c.normalizer && i < parts; ++i) c.normalizer[n * parts + i] = value;
            if (c.supervised) c.supervised[n] = demonstration ? value : T(0);
        }
        if constexpr (kWrites) fill(RowOut<E>(c.gradient.row(n), columns), value);
    }
};

template <class E, RowTask Task, bool Capped>
GAC_KERNEL(kMostThreads, (sizeof(typename E::Sum) == 8 ? 1 : Capped ? 2 : 3)) row_kernel(RowsCall<typename E::Sum> c, RowPlan plan) {
    using T = typename E::Sum;
    const int64_t n = block() / cluster_size();
    const int64_t target = c.wide_targets ? static_cast<const int64_t*>(c.targets)[n] : static_cast<const int32_t*>(c.targets)[n];
    const bool elsewhere = Task != RowTask::kFused && target == kElsewhere;
    RowWork<E, Task, Capped> row(c, n, target, plan.held, shared_memory());
    if (c.kind[n] == kDead) {
        row.clear(T(0));
    } else if (!elsewhere && (target < 0 || target >= c.columns)) {
        row.clear(static_cast<T>(__builtin_nan("")));
    } else {
        row.run();
    }
}

}  // namespace gac::cuda
