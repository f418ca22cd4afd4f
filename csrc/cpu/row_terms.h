// The slope of a row's token, by the formulas that token_loss uses.
#pragma once

#include "../math/terms.h"
#include "row_passes.h"
#include "../rows.h"

namespace GAC_NAMESPACE {

using gac::kDemonstration;
using gac::kRollout;
using gac::RowsCall;
using gac::TokenLossParameters;

struct Slopes {
    double logp, entropy;  // d loss / d logp and d loss / d entropy, rounded to T
};

// Of a rollout's token, by the formulas that token_loss uses, in one lane.
template <class V, class Policy>
double policy_slope(const RowsCall<typename V::Scalar>& c, int64_t n, typename V::Scalar logp) {
    static constexpr uint8_t kLive[64] = {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1};
    const auto of = [n](const auto* tokens) { return V(static_cast<double>(tokens[n])); };
    const auto live = V::live(kLive);
    const TokenLossParameters& o = c.term;
    const Policy policy({o.p0, o.p1, o.p2});
    const V x(static_cast<double>(logp)), advantage = c.advantage ? of(c.advantage) : V(__builtin_nan(""));
    const Ratio<V> r = importance_ratio(x, c.old ? of(c.old) : on_policy_old(x), live);
    V slope = policy(x, advantage, r, Coupling<V>{V(0), V(0)}).slope;
    if (c.rollout) slope = slope * of(c.rollout);
    if (c.reference && o.kl_coef != 0)
        slope = slope + V(o.kl_coef) * kl_term(o.kl_estimator, o.kl_ratio_weighted, x, of(c.reference), r).slope;
    return first_lane(of(c.weight) * slope);
}

template <class V>
__attribute__((noinline)) Slopes token_slopes(const RowsCall<typename V::Scalar>& c, int64_t n, typename V::Scalar logp) {
    const V weight(static_cast<double>(c.weight[n]));
    if (c.kind[n] == kDemonstration) {
        const V cs = c.term.phi ? phi_slope(exp(V(static_cast<double>(logp)))) : V(-1);
        return {first_lane(weight * cs), 0};
    }
    const double bonus = first_lane(weight * V(-c.term.entropy_coef));
    switch (c.term.policy) {
        case kSigmoid: return {policy_slope<V, SapoTerm<V, SigmoidGate>>(c, n, logp), bonus};
        case kErf: return {policy_slope<V, SapoTerm<V, ErfGate>>(c, n, logp), bonus};
        case kArctan: return {policy_slope<V, SapoTerm<V, ArctanGate>>(c, n, logp), bonus};
        case kSoftsign: return {policy_slope<V, SapoTerm<V, SoftsignGate>>(c, n, logp), bonus};
        case kGrpo: return {policy_slope<V, GrpoTerm<V>>(c, n, logp), bonus};
        default: return {policy_slope<V, CispoTerm<V>>(c, n, logp), bonus};
    }
}

}  // namespace GAC_NAMESPACE
