// The slope of a row's token, by the formulas that token_loss uses.
#pragma once

#include "../rows.h"
#include "terms.h"

namespace GAC_NAMESPACE {

struct Slopes {
    double logp, entropy;  // d loss / d logp and d loss / d entropy, rounded to T
};

// What the slope of one token is made of; an input that is absent has the value under which it has no part.
template <class T>
struct RowToken {
    bool demonstration, on_policy, has_reference, scored;
    T weight, advantage, old, reference, rollout;
};

// Inputs of the policy are not read for demonstrations.
template <class T>
GAC_INLINE RowToken<T> row_token(const gac::RowsCall<T>& c, int64_t n) {
    RowToken<T> token{c.kind[n] == gac::kDemonstration, true, false, true, c.weight[n], 0, 0, 0, 1};
    if (token.demonstration) return token;
    token.on_policy = !c.old;
    token.has_reference = c.reference && c.term.kl_coef != 0;
    token.advantage = c.advantage ? c.advantage[n] : static_cast<T>(__builtin_nan(""));
    if (c.old) token.old = c.old[n];
    if (token.has_reference) token.reference = c.reference[n];
    if (c.rollout) token.rollout = c.rollout[n];
    token.scored = token.old - token.old == 0 && token.reference - token.reference == 0 && token.rollout - token.rollout == 0;
    return token;
}

template <class V, class Policy, class T>
GAC_INLINE double policy_slope(const gac::TokenLossParameters& o, const RowToken<T>& token, T logp) {
    const auto of = [](T value) { return V(static_cast<double>(value)); };
    const Policy policy({o.p0, o.p1, o.p2});
    const V x = of(logp);
    const auto live = V(0) < V(1);
    const Ratio<V> r = importance_ratio(x, token.on_policy ? on_policy_old(x) : of(token.old), live);
    V slope = of(token.rollout) * policy(x, of(token.advantage), r, Coupling<V>{V(0), V(0)}).slope;
    if (token.has_reference)
        slope = slope + V(o.kl_coef) * kl_term(o.kl_estimator, o.kl_ratio_weighted, x, of(token.reference), r).slope;
    return first_lane(of(token.weight) * slope);
}

template <class V, class T>
GAC_INLINE Slopes row_slopes(const gac::TokenLossParameters& o, const RowToken<T>& token, T logp) {
    const V weight(static_cast<double>(token.weight));
    if (token.demonstration) {
        const V cs = o.phi ? phi_slope(exp(V(static_cast<double>(logp)))) : V(-1);
        return {first_lane(weight * cs), 0};
    }
    if (!token.scored) return {0, 0};
    const double bonus = first_lane(weight * V(-o.entropy_coef));
    switch (o.policy) {
        case gac::kSigmoid: return {policy_slope<V, SapoTerm<V, SigmoidGate>>(o, token, logp), bonus};
        case gac::kErf: return {policy_slope<V, SapoTerm<V, ErfGate>>(o, token, logp), bonus};
        case gac::kArctan: return {policy_slope<V, SapoTerm<V, ArctanGate>>(o, token, logp), bonus};
        case gac::kSoftsign: return {policy_slope<V, SapoTerm<V, SoftsignGate>>(o, token, logp), bonus};
        case gac::kGrpo: return {policy_slope<V, GrpoTerm<V>>(o, token, logp), bonus};
        default: return {policy_slope<V, CispoTerm<V>>(o, token, logp), bonus};
    }
}

}  // namespace GAC_NAMESPACE
