// The SAPO gates f(u; tau), u = r - 1, and their derivatives f'(u): arXiv 2511.20347 Eq. 4 (sigmoid), 2602.19345v2.
#pragma once

#include "config.h"

namespace GAC_NAMESPACE {

template <class V>
struct GateValue {
    V value, slope;
};

struct SigmoidGate {
    // With e = e^-x, x = tau u: f = 4/tau sigmoid(x) = 4/tau / (1 + e), f' = sech^2(x / 2) = 4 e / (1 + e)^2. Beyond the
    // clamp both have reached their limits in any precision that a loss has.
    template <class V>
    static GAC_INLINE GateValue<V> at(V u, V tau) {
        const V e = exp_moderate(clamp(-tau * u, V(-87), V(80)));
        const V v = reciprocal(V(1) + e);
        return {V(4) / tau * v, V(4) * e * v * v};
    }
};

struct ErfGate {
    template <class V>
    static GAC_INLINE GateValue<V> at(V u, V tau) {
        const V x = tau * u * V(0.70710678118654752440);
        const V gauss = exp(-x * x);
        return {fma(V(1.25331413731550025121) / tau, erf(x, gauss), V(1)), gauss};  // sqrt(pi / 2)
    }
};

struct ArctanGate {
    template <class V>
    static GAC_INLINE GateValue<V> at(V u, V tau) {
        const V x = tau * u;
        return {fma(V(1) / tau, atan(x), V(1)), V(1) / fma(x, x, V(1))};
    }
};

struct SoftsignGate {
    template <class V>
    static GAC_INLINE GateValue<V> at(V u, V tau) {
        const V x = tau * u;
        const V root = V(1) / sqrt(fma(x, x, V(1)));
        return {fma(u, root, V(1)), root * root * root};
    }
};

}  // namespace GAC_NAMESPACE
