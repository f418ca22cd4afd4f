// The stages of the token-level loss, written once for a lane type V: the body of every instruction set's unit.
#pragma once

#include "../math/terms.h"
#include "../token_loss.h"
#include "vector_loop.h"

namespace GAC_NAMESPACE {

using gac::SequenceCoupling;
using gac::TokenLoss;
using gac::TokenLossParameters;

template <class V>
GAC_INLINE V old_logprobs(const Streams<typename V::Scalar>& at, int64_t i, V logp) {
    return at.old ? V::load(at.old + i) : on_policy_old(logp);
}

// Where the token counts and what the engines returned of it is finite.
template <class V>
GAC_INLINE typename V::Mask scored(
    const Streams<typename V::Scalar>& at, int64_t i, typename V::Mask live, bool penalty) {
    if (at.old) live = live & finite(V::load(at.old + i));
    if (at.rollout) live = live & finite(V::load(at.rollout + i));
    if (penalty && at.reference) live = live & finite(V::load(at.reference + i));
    return live;
}

template <class V>
GAC_INLINE V advantage_of(const Streams<typename V::Scalar>& at, int64_t i, typename V::Mask live, V of_sequence) {
    return at.advantage ? V::load(at.advantage + i, live) : of_sequence;
}

// ||1_y - p||^2; 0 where masked.
template <class V>
GAC_INLINE V live_norm(const Streams<typename V::Scalar>& at, int64_t i, typename V::Mask live, V logp) {
    return select(live, squared_norm(logp, V::load(at.sum_sq + i)), V(0));
}

template <class T>
GAC_INLINE double sequence_advantage(const TokenLoss<T>& p, int64_t s) {
    return p.advantages ? static_cast<double>(p.advantages[s]) : __builtin_nan("");  // a demonstration-only batch has none
}

// Masked tokens, and sequences that have no other: zeros everywhere.
template <class T>
void write_zeros(const TokenLoss<T>& p, int64_t s) {
    T* const outputs[3] = {p.streams.logp_out, p.streams.slope, p.streams.entropy_slope};
    for (T* out : outputs)
        for (int64_t i = p.bounds[s]; out && i < p.bounds[s + 1]; ++i) out[i] = 0;
    for (int c = 0; c < kColumns; ++c) p.rows[s * kColumns + c] = 0;
    for (double& sum : p.sums[s]) sum = 0;
}

template <class V, bool Phi>
void evaluate_expert(const TokenLoss<typename V::Scalar>& p, int64_t s) {
    using T = typename V::Scalar;
    enum { Loss, Logp, Cs, Cs2, Norm, Sums, K };
    const V scale(p.scale[s]);
    LaneSums<V, Sums> sums;
    for_each_vector<V, K>(
        advance(p.streams, p.bounds[s]), p.bounds[s + 1] - p.bounds[s], sums,
        [=](const Streams<T>& at, int64_t i, V(&sum)[K]) __attribute__((always_inline)) {
            const auto live = V::live(at.mask + i);
            const V logp = V::load(at.logp + i, live);
            V cs = Phi ? phi_slope(exp(logp)) : select(live, V(-1), V(0));  // phi is 0 where logp = 0
            const V weight = at.rollout ? V::load(at.rollout + i, live) : V(1);
            if (at.rollout) cs = cs * weight;
            logp.store(at.logp_out + i);
            (scale * cs).store(at.slope + i);
            if (at.entropy_slope) V(0).store(at.entropy_slope + i);
            if (!Phi && at.supervised) {
                sum[Loss] = fma(weight, V::load(at.supervised + i, live), sum[Loss]);
            } else if (Phi) {
                sum[Loss] = add_supervised_loss(sum[Loss], cs, logp);
            } else {
                sum[Loss] = at.rollout ? add_where(sum[Loss], differs(weight, V(0)), cs * logp) : sum[Loss] - logp;
            }
            sum[Logp] = sum[Logp] + logp;
            sum[Cs] = sum[Cs] + cs;
            sum[Cs2] = fma(cs, cs, sum[Cs2]);
            if (at.sum_sq) sum[Norm] = fma(cs * cs, live_norm(at, i, live, logp), sum[Norm]);
        });
    const T row[kColumns] = {1, static_cast<T>(p.counts[s]), static_cast<T>(-sums[Logp]), 0, static_cast<T>(sums[Cs2]),
                             static_cast<T>(sums[Cs]), 0, static_cast<T>(sums[Cs2]), 0, 0, static_cast<T>(sums[Norm]),
                             static_cast<T>(sums[Norm])};
    for (int c = 0; c < kColumns; ++c) p.rows[s * kColumns + c] = row[c];
    for (double& sum : p.sums[s]) sum = 0;
    p.sums[s][kSumLoss] = sums[Loss];
}

// `Extras`: any of reference, rollout, entropy, sum_sq and one advantage a token is there. The plain loop does not look.
template <class V, class Policy, bool Extras>
void evaluate_rollout(const TokenLoss<typename V::Scalar>& p, int64_t s) {
    using T = typename V::Scalar;
    enum {
        Loss, Logp, Cs, Cr, Cs2, Cr2, CsCr, Disagreement, LogRatio, RatioMinusOne, Update, Clipped,
        Kl, Entropy, Advantage, OwnNorm, DiffNorm, All,
        Sums = Extras ? All : Kl, RatioMax = Sums, K
    };
    const TokenLossParameters& o = p.parameters;
    const Policy policy({o.p0, o.p1, o.p2});
    const bool phi = o.phi, kl_ratio_weighted = o.kl_ratio_weighted, penalty = o.kl_coef != 0;
    const int kl_estimator = o.kl_estimator;
    const double advantage_s = sequence_advantage(p, s);
    const V advantage_S(advantage_s), scale(p.scale[s]), kl_coef(o.kl_coef), entropy_slope(-p.scale[s] * o.entropy_coef);
    const Coupling<V> coupling = Policy::Coupled ? Coupling<V>{V(p.coupling[s].weight), V(p.coupling[s].gain)}
                                                 : Coupling<V>{V(0), V(0)};
    LaneSums<V, Sums> sums;
    const V ratio_max = for_each_vector<V, K>(
        advance(p.streams, p.bounds[s]), p.bounds[s + 1] - p.bounds[s], sums,
        [=](const Streams<T>& at, int64_t i, V(&sum)[K]) __attribute__((always_inline)) {
            const auto live = V::live(at.mask + i);
            const V logp = V::load(at.logp + i, live);
            const V advantage = Extras ? advantage_of(at, i, live, advantage_S) : advantage_S;
            const auto known = Extras ? scored<V>(at, i, live, penalty) : at.old ? live & finite(V::load(at.old + i)) : live;
            const Ratio<V> r = importance_ratio(logp, old_logprobs(at, i, logp), known);
            const PolicyTerm<V> term = policy(logp, advantage, r, coupling);

            V loss = term.loss, cr = term.slope;  // the slope is 0 where masked
            if constexpr (Extras) {
                if (at.rollout) {
                    const V weight = V::load(at.rollout + i, known);
                    loss = loss * weight;
                    if (!Policy::SlopeOfSequence) cr = cr * weight;
                }
                if (at.reference) {
                    const KlTerm<V> kl = kl_term(kl_estimator, kl_ratio_weighted, logp, V::load(at.reference + i), r);
                    if (penalty) cr = add_where(cr, known, kl_coef * kl.slope);
                    sum[Kl] = add_where(sum[Kl], known & finite(V::load(at.reference + i)), kl.loss);
                }
            }
            const V cs = phi ? phi_slope(exp(logp)) : select(live, V(-1), V(0));
            const V difference = cs - cr;

            logp.store(at.logp_out + i);
            (scale * cr).store(at.slope + i);

            sum[Loss] = add_where(sum[Loss], known, loss);
            sum[Logp] = sum[Logp] + logp;
            sum[Cs] = sum[Cs] + cs;
            sum[Cr] = sum[Cr] + cr;
            sum[Cs2] = fma(cs, cs, sum[Cs2]);
            sum[Cr2] = fma(cr, cr, sum[Cr2]);
            sum[CsCr] = fma(cs, cr, sum[CsCr]);
            sum[Disagreement] = fma(difference, difference, sum[Disagreement]);
            sum[LogRatio] = sum[LogRatio] + r.log;  // 0 where masked
            sum[RatioMinusOne] = sum[RatioMinusOne] + r.minus_one;
            if (!Policy::Coupled) sum[RatioMax] = greater_where(sum[RatioMax], live, r.value);
            if (Policy::Updates) sum[Update] = add_where(sum[Update], live, term.update);
            if (Policy::Clips) sum[Clipped] = add_where(sum[Clipped], live, select(term.clipped, V(1), V(0)));
            if constexpr (Extras) {
                if (at.entropy) {
                    sum[Entropy] = add_where(sum[Entropy], known, V::load(at.entropy + i));
                    select(known, entropy_slope, V(0)).store(at.entropy_slope + i);
                }
                if (at.advantage) sum[Advantage] = sum[Advantage] + advantage;
                if (at.sum_sq) {
                    const V norm = live_norm(at, i, live, logp);
                    sum[OwnNorm] = fma(norm, cr * cr, sum[OwnNorm]);
                    sum[DiffNorm] = fma(norm, difference * difference, sum[DiffNorm]);
                }
            }
        });

    const double count = static_cast<double>(p.counts[s]);
    double* const out = p.sums[s];
    const double row[kColumns] = {0, count, -sums[Logp], advantage_s, sums[Disagreement], sums[Cs], sums[Cr], sums[Cs2],
                                  sums[Cr2], sums[CsCr], 0, 0};
    for (int c = 0; c < kColumns; ++c) p.rows[s * kColumns + c] = static_cast<T>(row[c]);
    out[kSumLoss] = sums[Loss];
    out[kSumKl] = out[kSumEntropy] = 0;
    out[kSumApproxKl] = sums[RatioMinusOne] - sums[LogRatio];  // k3 = r - 1 - log r
    out[kSumClipped] = sums[Clipped];
    out[kSumUpdate] = Policy::Updates ? sums[Update] : count - sums[Clipped];
    if (Policy::Coupled) {
        out[kMaxRatio] = p.coupling[s].weight;
        out[kSumRatio] = p.coupling[s].weight * count;
    } else {
        T lane[V::Lanes];
        ratio_max.store(lane);
        T largest = lane[0];
        for (T x : lane) largest = x > largest ? x : largest;
        out[kSumRatio] = count + sums[RatioMinusOne];
        // The maximum above loses a nan, the sum cannot: ratios are bounded.
        out[kMaxRatio] = out[kSumRatio] == out[kSumRatio] ? static_cast<double>(largest) : out[kSumRatio];
    }
    if constexpr (Extras) {
        T* const extra = p.rows + s * kColumns;
        if (p.streams.advantage) extra[kColAdvantage] = static_cast<T>(sums[Advantage] / count);
        extra[kColOwnNorm] = static_cast<T>(sums[OwnNorm]);
        extra[kColDiffNorm] = static_cast<T>(sums[DiffNorm]);
        out[kSumKl] = sums[Kl];
        out[kSumEntropy] = sums[Entropy];
    }
}

template <class V, class Policy>
void evaluate_policy(const TokenLoss<typename V::Scalar>& p, int64_t begin, int64_t end) {
    const auto& t = p.streams;
    const bool extras = t.reference || t.rollout || t.entropy || t.sum_sq || t.advantage;
    for (int64_t s = begin; s < end; ++s) {
        if (p.counts[s] == 0) {
            write_zeros(p, s);
        } else if (p.expert[s]) {
            p.parameters.phi ? evaluate_expert<V, true>(p, s) : evaluate_expert<V, false>(p, s);
        } else {
            extras ? evaluate_rollout<V, Policy, true>(p, s) : evaluate_rollout<V, Policy, false>(p, s);
        }
    }
}

template <class V>
struct Stages {
    using T = typename V::Scalar;

    static void count(const TokenLoss<T>& p, int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; ++s)
            p.counts[s] = count_live(p.streams.mask + p.bounds[s], p.bounds[s + 1] - p.bounds[s]);
    }

    // weight = exp of the mean (or, bounded, of the sum) of the log-ratios; GSPO's gain follows from it.
    static void couple(const TokenLoss<T>& p, int64_t begin, int64_t end) {
        const TokenLossParameters& o = p.parameters;
        const bool product = o.policy == kDfpo && o.p1 != 0;
        for (int64_t s = begin; s < end; ++s) {
            SequenceCoupling& c = p.coupling[s];
            c = {0, 0, 0};
            if (p.expert[s] || p.counts[s] == 0) continue;
            enum { LogRatio, Advantage, Sums, K };
            LaneSums<V, Sums> sums;
            const bool penalty = o.kl_coef != 0;
            for_each_vector<V, K>(
                inputs(p, s), p.bounds[s + 1] - p.bounds[s], sums,
                [=](const Streams<T>& at, int64_t i, V(&sum)[K]) __attribute__((always_inline)) {
                    const auto live = V::live(at.mask + i);
                    const V logp = V::load(at.logp + i, live);
                    const V raw = select(scored<V>(at, i, live, penalty), logp - old_logprobs(at, i, logp), V(0));
                    sum[LogRatio] = sum[LogRatio] + clamp(raw, V(-20), V(20));
                    if (at.advantage) sum[Advantage] = sum[Advantage] + V::load(at.advantage + i, live);
                });
            const double count = static_cast<double>(p.counts[s]), total = sums[LogRatio];
            const double bounded = total > 20 ? 20 : total < -20 ? -20 : total;
            c.weight = __builtin_exp(product ? bounded : total / count);
            c.advantage = p.streams.advantage ? sums[Advantage] / count : sequence_advantage(p, s);
            if (o.policy == kGspo) c.gain = c.weight / count * gspo_force(p, s);
        }
    }

    // Sum over the sequence's tokens of -rollout_weight A where the clip lets the slope through: d loss / d s.
    static double gspo_force(const TokenLoss<T>& p, int64_t s) {
        const GspoTerm<V> policy({p.parameters.p0, p.parameters.p1, 0});
        const bool penalty = p.parameters.kl_coef != 0;
        const V weight(p.coupling[s].weight), advantage_S(sequence_advantage(p, s));
        LaneSums<V, 1> force;
        for_each_vector<V, 2>(
            inputs(p, s), p.bounds[s + 1] - p.bounds[s], force,
            [=](const Streams<T>& at, int64_t i, V(&sum)[2]) __attribute__((always_inline)) {
                const auto live = V::live(at.mask + i);
                const V advantage = advantage_of(at, i, live, advantage_S);
                const auto known = scored<V>(at, i, live, penalty);
                const V rollout = at.rollout ? V::load(at.rollout + i, known) : V(1);
                const auto through = without(known, policy.surrogate.clipped(weight, advantage));
                sum[0] = add_where(sum[0], through, -advantage * rollout);
            });
        return force[0];
    }

    static Streams<T> inputs(const TokenLoss<T>& p, int64_t s) {
        Streams<T> only = p.streams;
        only.logp_out = only.slope = only.entropy_slope = nullptr;
        return advance(only, p.bounds[s]);
    }

    static void evaluate(const TokenLoss<T>& p, int64_t begin, int64_t end) {
        switch (p.parameters.policy) {
            case kSigmoid: return evaluate_policy<V, SapoTerm<V, SigmoidGate>>(p, begin, end);
            case kErf: return evaluate_policy<V, SapoTerm<V, ErfGate>>(p, begin, end);
            case kArctan: return evaluate_policy<V, SapoTerm<V, ArctanGate>>(p, begin, end);
            case kSoftsign: return evaluate_policy<V, SapoTerm<V, SoftsignGate>>(p, begin, end);
            case kGrpo: return evaluate_policy<V, GrpoTerm<V>>(p, begin, end);
            case kCispo: return evaluate_policy<V, CispoTerm<V>>(p, begin, end);
            case kGspo: return evaluate_policy<V, GspoTerm<V>>(p, begin, end);
            default: return evaluate_policy<V, DfpoTerm<V>>(p, begin, end);
        }
    }
};

}  // namespace GAC_NAMESPACE
