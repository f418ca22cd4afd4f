// exp, exp2, erf and atan of a Vec of floats as short polynomials (own minimax fits; the largest errors measured by
// tests/test_compiled.py are at most 2 ulp), in the operations that the including vec_*.h defines.
#pragma once

#include "../math/config.h"

namespace GAC_NAMESPACE {

struct ExpReduced {
    Vec n, biased, f;  // x = n ln 2 + f, |f| <= ln 2 / 2; `biased` holds n in its low bits
    Vec half;          // (e^f - 1 - f) / f^2
};

// |x| < 2^15. Adding 1.5 * 2^23 rounds to the nearest integer.
GAC_INLINE ExpReduced exp_reduce(Vec x) {
    const Vec shift(12582912.0);
    const Vec biased = fma(x, Vec(1.44269504088896341), shift);
    const Vec n = biased - shift;
    const Vec f = reduce_by_ln2(x, n);
    Vec p = fma(Vec(0.00139012875), f, Vec(0.00836314633));
    p = fma(p, f, Vec(0.0416668542));
    p = fma(p, f, Vec(0.166665778));
    return {n, biased, f, fma(p, f, Vec(0.5))};
}

GAC_INLINE Vec exp_moderate(Vec x) {
    const ExpReduced e = exp_reduce(x);
    return scale_by_power(fma(fma(e.half, e.f, Vec(1)), e.f, Vec(1)), e.n, e.biased);
}

// 2^(rate d) for -127 <= rate d <= 127, at most 1 where rate d <= 0, 1 at 0, and 0 at -127, where power_of_two is. Where fma
// is one, the product is never rounded.
GAC_INLINE Vec exp2_moderate(Vec d, Vec rate) {
    const Vec shift(12582912.0);
    const Vec biased = fma(d, rate, shift), less = shift - biased;
    const Vec f = fma(d, rate, less);
    Vec p = fma(Vec(0.00015353258641), f, Vec(0.00133990030731));
    p = fma(p, f, Vec(0.00961843878031));
    p = fma(p, f, Vec(0.0555033199489));
    p = fma(p, f, Vec(0.240226477385));
    p = fma(p, f, Vec(0.693147182465));
    return scale_by_power(fma(p, f, Vec(1)), -less, biased);
}

// Below `lowest`, e^x is 0: with gradual underflow the smallest denormal's half, else the smallest normal float.
GAC_INLINE Vec exp(Vec x) {
    const Vec lowest(kGradualUnderflow ? -104 : -87.33654), highest(88.9);
    const Vec y = exp_moderate(clamp(x, lowest, highest));
    return kGradualUnderflow ? y : select(x < lowest, Vec(0), y);
}

GAC_INLINE ExpParts<Vec> exp_parts(Vec x) {
    const ExpReduced e = exp_reduce(x);
    const Vec s = power_of_two(e.n, e.biased);
    const Vec tail = e.f * e.f * e.half, q = fma(e.f * e.f, e.half, e.f);
    const Vec minus_one = fma(s, q, s - Vec(1));
    return {fma(s, q, s), minus_one, select(e.n == Vec(0), tail, minus_one - x)};
}

// Near 0 an odd polynomial, which keeps the relative precision; beyond, 1 - e^(-x^2) erfcx(|x|).
GAC_INLINE Vec erf(Vec x, Vec gauss) {
    const Vec s = x * x, t = lesser(abs(x), Vec(4));
    Vec near = fma(Vec(-0.000586208247), s, Vec(0.00496750697));
    near = fma(near, s, Vec(-0.026748864));
    near = fma(near, s, Vec(0.112813205));
    near = fma(near, s, Vec(-0.376124471));
    near = fma(near, s, Vec(1.12837911));
    Vec far = fma(Vec(0.000137057679), t, Vec(-0.00235165888));
    far = fma(far, t, Vec(0.0180431008));
    far = fma(far, t, Vec(-0.0823088363));
    far = fma(far, t, Vec(0.250925779));
    far = fma(far, t, Vec(-0.546049595));
    far = fma(far, t, Vec(0.884957671));
    far = fma(far, t, Vec(-1.09003127));
    far = fma(far, t, Vec(0.994261265));
    return select(t < Vec(0.93), near * x, copysign(fma(-gauss, far, Vec(1)), x));
}

GAC_INLINE Vec atan(Vec x) {
    const Vec a = abs(x);
    const Mask large = a > Vec(1);
    const Vec z = select(large, Vec(-1) / a, a);
    const Vec s = z * z;
    Vec p = fma(Vec(0.00284989318), s, Vec(-0.016068643));
    p = fma(p, s, Vec(0.04269154));
    p = fma(p, s, Vec(-0.075042963));
    p = fma(p, s, Vec(0.106409349));
    p = fma(p, s, Vec(-0.142036453));
    p = fma(p, s, Vec(0.199926198));
    p = fma(p, s, Vec(-0.333330721));
    p = fma(p * s, z, z);
    return copysign(select(large, Vec(1.57079632679) + p, p), x);
}

}  // namespace GAC_NAMESPACE
