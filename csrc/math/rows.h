// What a row of logits is to its gradient: moments, the soft cap, GIFT's target.
#pragma once

#include <stdint.h>

#include "config.h"

namespace GAC_NAMESPACE {

struct Moments {
    double top, log_sum, entropy, sum_sq;  // top: the largest raw logit; log_sum: of e^(z - z(top)), so not below 0
};

// The soft cap tanh a, by how far it lies below that of a larger b, and its derivative 1 / cosh^2 a:
//
//     tanh a - tanh b = gain (e^(2a - 2b) - 1) / (e^2a + 1),  gain = 2 / (1 + e^-2b)
//
// A difference of two tanh would keep the rounding of both, which a cap of 30 and a temperature below 1 multiply; this
// keeps full relative precision, is never above 0, and is 0 at a = b. `doubled`: 2a; `below`: 2a - 2b.
template <class V>
struct CappedPoint {
    V fall, slope;
};

template <class V>
GAC_INLINE CappedPoint<V> capped_point(V doubled, V below, V gain) {
    const V m = exp_parts(greater(V(-80), below)).minus_one, e = exp_moderate(clamp(doubled, V(-80), V(80)));
    const V r = reciprocal(e + V(1));
    return {gain * (m * r), (V(4) * e * r) * r};
}

// The same in double precision, for what is one a row.
GAC_INLINE double capped_gain(double doubled_top) { return 2 / (1 + GAC_LIBM(exp)(-doubled_top)); }
GAC_INLINE double capped_fall(double doubled, double doubled_top) {
    return capped_gain(doubled_top) * GAC_LIBM(expm1)(doubled - doubled_top) / (GAC_LIBM(exp)(doubled) + 1);
}
GAC_INLINE double capped_slope(double doubled) {
    const double e = GAC_LIBM(exp)(doubled < 0 ? doubled : -doubled);
    return 4 * e / ((1 + e) * (1 + e));
}

// GIFT's target q ~ p0 e^(beta 1[k = y]) with p0 smoothed by lam (arXiv 2601.09233): q_k = p0_k / D off the target.
struct Gift {
    bool on;
    double top, log_sum;          // of the base row
    double keep, uniform;         // p0_k = keep softmax(base)_k + uniform
    double inverse, target;       // 1 / D, and q_y
    double excess;                // q_y - p0_y / D
};

// `base_y`: the target's base logit.
GAC_INLINE Gift gift_target(const Moments& base, double base_y, double beta, double smooth, int64_t columns) {
    const double keep = 1 - smooth, uniform = smooth / static_cast<double>(columns);
    const double log_p = base_y - base.top - base.log_sum;
    const double p = keep * GAC_LIBM(exp)(log_p) + uniform;
    // In log space: e^beta overflows, and p may be far below its rounding.
    const double log_p0 = smooth > 0 ? GAC_LIBM(log)(p) : log_p;
    const double raised = log_p0 + beta, rest = GAC_LIBM(log1p)(-(p < 1 ? p : 1));
    const double high = raised > rest ? raised : rest, low = raised > rest ? rest : raised;
    const double log_d = high + GAC_LIBM(log1p)(GAC_LIBM(exp)(low - high));
    const double inverse = GAC_LIBM(exp)(-log_d), target = GAC_LIBM(exp)(raised - log_d);
    const double excess = target - p * inverse;  // not below 0 but for rounding, which an infinite logit would meet
    return {true, base.top, base.log_sum, keep, uniform, inverse, target, excess > 0 ? excess : 0};
}

}  // namespace GAC_NAMESPACE
