// Every objective as a function of one token that returns (loss, slope), slope = d loss / d logp.
#pragma once

#include "codes.h"
#include "gates.h"

namespace GAC_NAMESPACE {

// Static parameters of the policy term, as gac_kernels.library.encode lays them out.
struct PolicyParameters {
    double p0, p1, p2;
};

// The importance ratio of a token, from log_ratio = clamp(logp - old, -20, 20); 1 in lanes that are not live.
template <class V>
struct Ratio {
    V log, value, minus_one;
    MaskOf<V> live, alive;  // where the token counts; where, of these, the clamp lets the slope through
};

// Of what engines return: a value that is nan or infinite at a token means that it was not scored. The token's RL term is
// then nothing at all, and its log-ratio 0 in its sequence's mean.
template <class V>
GAC_INLINE MaskOf<V> finite(V x) {
    return x - x == V(0);
}

template <class V>
GAC_INLINE Ratio<V> importance_ratio(V logp, V old, MaskOf<V> live) {
    const V raw = select(live, logp - old, V(0));
    const V log = clamp(raw, V(-20), V(20));
    const ExpParts<V> e = exp_parts(log);
    return {log, e.exp, e.minus_one, live, without(live, differs(raw, log))};
}

// Without old log-probs: old = logp held constant, so r = 1 with its slope alive; an infinite logp meets the clamp.
template <class V>
GAC_INLINE V on_policy_old(V logp) {
    return select(abs(logp) == V(__builtin_huge_val()), V(0), logp);
}

// What the sequence-coupled terms were given for the sequence: GSPO: weight = s, gain = d (sum of the sequence's loss)
// / d log_ratio of any one token. DFPO: weight = w, gain = the transformed weight.
template <class V>
struct Coupling {
    V weight, gain;
};

template <class V>
struct PolicyTerm {
    V loss, slope;          // the slope is 0 in lanes that are not live, the loss is not
    V update;           // f'(r) of a gate, 1 where nothing was clipped, 0 where something was
    MaskOf<V> clipped;  // where a clip acts
};

template <class V>
GAC_INLINE MaskOf<V> never(V x) {
    return x < x;
}

// Each term is built once a sequence and called once a token. `Coupled`: needs sums over the sequence first.
// `SlopeOfSequence`: the slope already holds the rollout weights of the sequence's tokens.
template <class V, class Gate>
struct SapoTerm {
    static constexpr bool Coupled = false, SlopeOfSequence = false, Clips = false, Updates = true;
    V tau_pos, tau_neg;

    explicit GAC_INLINE SapoTerm(const PolicyParameters& p) : tau_pos(p.p0), tau_neg(p.p1) {}

    GAC_INLINE PolicyTerm<V> operator()(V, V advantage, const Ratio<V>& r, const Coupling<V>&) const {
        const GateValue<V> f = Gate::at(r.minus_one, select(advantage > V(0), tau_pos, tau_neg));
        const V slope = select(r.alive, -advantage * (f.slope * r.value), V(0));
        return {-advantage * f.value, slope, f.slope, never(r.value)};
    }
};

// -min(r A, clip(r) A), its first r bounded by `bound`, and where the clip has taken the gradient away.
template <class V>
struct ClippedSurrogate {
    V low, high, bound;

    GAC_INLINE V loss(V ratio, V advantage) const {
        const V first = lesser(bound, ratio) * advantage, second = clamp(ratio, low, high) * advantage;
        return -lesser(first, second);
    }
    GAC_INLINE MaskOf<V> clipped(V ratio, V advantage) const {
        return ((advantage > V(0)) & (ratio > high)) | ((advantage < V(0)) & ((ratio < low) | (ratio > bound)));
    }
};

template <class V>
struct GrpoTerm {
    static constexpr bool Coupled = false, SlopeOfSequence = false, Clips = true, Updates = false;
    ClippedSurrogate<V> surrogate;

    explicit GAC_INLINE GrpoTerm(const PolicyParameters& p)
        : surrogate{V(1 - p.p0), V(1 + p.p1), V(p.p2 > 0 ? p.p2 : __builtin_huge_val())} {}

    GAC_INLINE PolicyTerm<V> operator()(V, V advantage, const Ratio<V>& r, const Coupling<V>&) const {
        const MaskOf<V> clipped = surrogate.clipped(r.value, advantage);
        const V slope = select(without(r.alive, clipped), -advantage * r.value, V(0));
        return {surrogate.loss(r.value, advantage), slope, V(0), clipped};
    }
};

template <class V>
struct CispoTerm {
    static constexpr bool Coupled = false, SlopeOfSequence = false, Clips = true, Updates = false;
    V high;

    explicit GAC_INLINE CispoTerm(const PolicyParameters& p) : high(p.p0) {}

    GAC_INLINE PolicyTerm<V> operator()(V logp, V advantage, const Ratio<V>& r, const Coupling<V>&) const {
        const V slope = select(r.live, -lesser(high, r.value) * advantage, V(0));
        return {slope * logp, slope, V(0), r.value > high};
    }
};

template <class V>
struct GspoTerm {
    static constexpr bool Coupled = true, SlopeOfSequence = true, Clips = true, Updates = false;
    ClippedSurrogate<V> surrogate;

    explicit GAC_INLINE GspoTerm(const PolicyParameters& p)
        : surrogate{V(1 - p.p0), V(1 + p.p1), V(__builtin_huge_val())} {}

    GAC_INLINE PolicyTerm<V> operator()(V, V advantage, const Ratio<V>& r, const Coupling<V>& c) const {
        const V slope = select(r.alive, c.gain, V(0));
        return {surrogate.loss(c.weight, advantage), slope, V(0), surrogate.clipped(c.weight, advantage)};
    }
};

template <class V>
struct DfpoTerm {
    static constexpr bool Coupled = true, SlopeOfSequence = false, Clips = false, Updates = false;

    explicit GAC_INLINE DfpoTerm(const PolicyParameters&) {}

    GAC_INLINE PolicyTerm<V> operator()(V logp, V advantage, const Ratio<V>& r, const Coupling<V>& c) const {
        const V slope = select(r.live, -c.gain * advantage, V(0));
        return {slope * logp, slope, V(0), never(r.value)};
    }
};

template <class V>
struct KlTerm {
    V loss, slope;
};

// The KL penalty, d = clamp(ref - logp, -20, 20) (http://joschu.net/blog/kl-approx.html). The input is clamped, not the
// output, so that the slope stays finite. `ratio_weighted` multiplies by r, with r's gradient.
template <class V>
GAC_INLINE KlTerm<V> kl_term(int estimator, bool ratio_weighted, V logp, V reference, const Ratio<V>& r) {
    const V raw = select(r.live, reference - logp, V(0));
    const V d = clamp(raw, V(-20), V(20));
    V loss, slope;
    if (estimator == kK1) {
        loss = -d;
        slope = V(1);
    } else if (estimator == kK2) {
        loss = d * d * V(0.5);
        slope = -d;
    } else {
        const ExpParts<V> e = exp_parts(d);
        loss = e.minus_one_minus_x;
        slope = -e.minus_one;
    }
    slope = select(differs(raw, d), V(0), slope);
    if (ratio_weighted) {
        slope = r.value * (slope + select(r.alive, loss, V(0)));
        loss = loss * r.value;
    }
    return {loss, slope};
}

// c_s = -phi, phi = p (1 - p) (CHORD, arXiv 2508.11408), in a form that keeps its relative precision at p -> 1.
template <class V>
GAC_INLINE V phi_slope(V p) {
    return times_one_less(p);
}

// n = ||1_y - p||^2, the squared norm of a token's logit gradient, from sum p^2: (1 - p_y)^2 and what is left of the sum for
// all others, which is not below 0 and, their p adding up to 1 - p_y, not above (1 - p_y)^2. Where rounding takes it
// beyond, the bound stands, so that n is never below 0 and within a factor of 2 where p_y -> 1. A log-prob above 0 counts as
// 0; what no sum of squares can be, nan or less than 0, gives nan.
template <class V>
GAC_INLINE V squared_norm(V logp, V sum_sq) {
    const ExpParts<V> e = exp_parts(clamp(logp, V(-80), V(0)));
    const V away = e.minus_one * e.minus_one, others = sum_sq - e.exp * e.exp, size = abs(others);
    const V norm = away + select(size < V(__builtin_huge_val()), clamp(others, V(0), away), size);
    return select(sum_sq < V(0), V(__builtin_nan("")), norm);
}

// sum + c_s logp. At logp = -inf, where c_s = -phi is 0, the term is 0 and not nan.
template <class V>
GAC_INLINE V add_supervised_loss(V sum, V slope, V logp) {
    return fma(slope, greater(V(-3.4e38), logp), sum);
}

}  // namespace GAC_NAMESPACE
