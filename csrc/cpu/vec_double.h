// One double, with the functions of the C library: float64 input is computed in full float64, speed comes second.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../math/config.h"

namespace GAC_NAMESPACE {

struct VecDouble {
    using Scalar = double;
    static constexpr int Lanes = 1;

    struct Mask {
        bool bits;
    };
    double v;

    VecDouble() = default;
    explicit GAC_INLINE VecDouble(double x) : v(x) {}

    static GAC_INLINE Mask live(const uint8_t* mask) { return {*mask != 0}; }
    static GAC_INLINE VecDouble load(const double* x) { return VecDouble(*x); }
    static GAC_INLINE VecDouble load(const double* x, Mask m) { return VecDouble(m.bits ? *x : 0.0); }
    GAC_INLINE void store(double* x) const { *x = v; }
    GAC_INLINE void add_to(double* total) const { *total += v; }
};
using MaskDouble = VecDouble::Mask;

GAC_INLINE VecDouble operator+(VecDouble a, VecDouble b) { return VecDouble(a.v + b.v); }
GAC_INLINE VecDouble operator-(VecDouble a, VecDouble b) { return VecDouble(a.v - b.v); }
GAC_INLINE VecDouble operator*(VecDouble a, VecDouble b) { return VecDouble(a.v * b.v); }
GAC_INLINE VecDouble operator/(VecDouble a, VecDouble b) { return VecDouble(a.v / b.v); }
GAC_INLINE VecDouble operator-(VecDouble a) { return VecDouble(-a.v); }
GAC_INLINE MaskDouble operator<(VecDouble a, VecDouble b) { return {a.v < b.v}; }
GAC_INLINE MaskDouble operator>(VecDouble a, VecDouble b) { return {a.v > b.v}; }
GAC_INLINE MaskDouble operator==(VecDouble a, VecDouble b) { return {a.v == b.v}; }
GAC_INLINE MaskDouble operator&(MaskDouble a, MaskDouble b) { return {a.bits && b.bits}; }
GAC_INLINE MaskDouble operator|(MaskDouble a, MaskDouble b) { return {a.bits || b.bits}; }
GAC_INLINE MaskDouble without(MaskDouble a, MaskDouble b) { return {a.bits && !b.bits}; }
GAC_INLINE MaskDouble differs(VecDouble a, VecDouble b) { return {a.v < b.v || a.v > b.v}; }
GAC_INLINE VecDouble select(MaskDouble m, VecDouble a, VecDouble b) { return m.bits ? a : b; }
GAC_INLINE VecDouble lesser(VecDouble a, VecDouble b) { return a.v < b.v ? a : b; }
GAC_INLINE VecDouble greater(VecDouble a, VecDouble b) { return a.v > b.v ? a : b; }
GAC_INLINE VecDouble fma(VecDouble a, VecDouble b, VecDouble c) { return VecDouble(a.v * b.v + c.v); }
GAC_INLINE VecDouble abs(VecDouble a) { return VecDouble(::fabs(a.v)); }
GAC_INLINE VecDouble times_one_less(VecDouble a) { return VecDouble(a.v * (a.v - 1)); }
GAC_INLINE VecDouble reciprocal(VecDouble a) { return VecDouble(1 / a.v); }
GAC_INLINE VecDouble sqrt(VecDouble a) { return VecDouble(::sqrt(a.v)); }
GAC_INLINE VecDouble exp(VecDouble a) { return VecDouble(::exp(a.v)); }
GAC_INLINE VecDouble exp_moderate(VecDouble a) { return VecDouble(::exp(a.v)); }
GAC_INLINE VecDouble erf(VecDouble a, VecDouble) { return VecDouble(::erf(a.v)); }
GAC_INLINE VecDouble atan(VecDouble a) { return VecDouble(::atan(a.v)); }
GAC_INLINE VecDouble add_where(VecDouble sum, MaskDouble m, VecDouble x) { return m.bits ? sum + x : sum; }

GAC_INLINE VecDouble greater_where(VecDouble largest, MaskDouble m, VecDouble x) {
    return m.bits ? greater(largest, x) : largest;
}

GAC_INLINE ExpParts<VecDouble> exp_parts(VecDouble x) {
    const double minus_one = ::expm1(x.v);
    return {VecDouble(::exp(x.v)), VecDouble(minus_one), VecDouble(minus_one - x.v)};
}

}  // namespace GAC_NAMESPACE
