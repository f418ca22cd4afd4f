// What a row of logits is to its gradient: moments, the soft cap, GIFT's target.
#pragma once

#include <stdint.h>

#include "config.h"

namespace GAC_NAMESPACE {

struct Moments {
    double top, log_sum, entropy, sum_sq;  // top: the maximum of z
};

template <class V>
struct Tanh {
    V value, slope;
};

// tanh x and its derivative 1 / cosh^2 x, both to full relative precision: with m = e^(2 |x|) - 1, m / (m + 2) and
// 4 (m + 1) / (m + 2)^2. Beyond 40 nothing changes that a float could show.
template <class V>
GAC_INLINE Tanh<V> tanh(V x) {
    const V m = exp_parts(lesser(V(80), V(2) * abs(x))).minus_one, r = reciprocal(m + V(2)), t = m * r;
    return {select(x < V(0), -t, t), (m + V(1)) * r * (V(4) * r)};
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
