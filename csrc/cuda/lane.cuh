// The lane types of csrc/math on a GPU: one float, one double. exp, erf and atan are the CPU's polynomials (vec_math.h), so
// that every backend shares their tests; built with -fmad=false, so that only what says fma is one.
#pragma once

#include "device.cuh"

#include "../cpu/vec_double.h"

namespace gac::cuda {

struct Vec {
    using Scalar = float;
    static constexpr int Lanes = 1;

    struct Mask {
        bool bits;
    };
    float v;

    Vec() = default;
    explicit GAC_INLINE Vec(double x) : v(static_cast<float>(x)) {}
    explicit GAC_INLINE Vec(float x) : v(x) {}
    explicit GAC_INLINE Vec(int x) : v(static_cast<float>(x)) {}
};
using Mask = Vec::Mask;

GAC_INLINE double first_lane(Vec a) { return static_cast<double>(a.v); }
GAC_INLINE double first_lane(VecDouble a) { return a.v; }

// The lane type of sums in T.
template <class T>
struct LaneOf {
    using Type = Vec;
};
template <>
struct LaneOf<double> {
    using Type = VecDouble;
};

GAC_INLINE uint32_t bits_of(Vec a) {
    uint32_t bits;
    memcpy(&bits, &a.v, sizeof bits);
    return bits;
}
GAC_INLINE Vec of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return Vec(x);
}

GAC_INLINE Vec operator+(Vec a, Vec b) { return Vec(a.v + b.v); }
GAC_INLINE Vec operator-(Vec a, Vec b) { return Vec(a.v - b.v); }
GAC_INLINE Vec operator*(Vec a, Vec b) { return Vec(a.v * b.v); }
GAC_INLINE Vec operator/(Vec a, Vec b) { return Vec(a.v / b.v); }
GAC_INLINE Vec operator-(Vec a) { return Vec(-a.v); }
GAC_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
GAC_INLINE Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
GAC_INLINE Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
GAC_INLINE Mask operator&(Mask a, Mask b) { return {a.bits && b.bits}; }
GAC_INLINE Mask operator|(Mask a, Mask b) { return {a.bits || b.bits}; }
GAC_INLINE Mask without(Mask a, Mask b) { return {a.bits && !b.bits}; }
GAC_INLINE Mask differs(Vec a, Vec b) { return {a.v < b.v || a.v > b.v}; }
GAC_INLINE Vec select(Mask m, Vec a, Vec b) { return m.bits ? a : b; }
GAC_INLINE Vec lesser(Vec a, Vec b) { return a.v < b.v ? a : b; }
GAC_INLINE Vec greater(Vec a, Vec b) { return a.v > b.v ? a : b; }
GAC_INLINE Vec fma(Vec a, Vec b, Vec c) { return Vec(::fmaf(a.v, b.v, c.v)); }
GAC_INLINE Vec abs(Vec a) { return Vec(::fabsf(a.v)); }
GAC_INLINE Vec sqrt(Vec a) { return Vec(::sqrtf(a.v)); }
GAC_INLINE Vec copysign(Vec magnitude, Vec sign) { return Vec(::copysignf(magnitude.v, sign.v)); }
GAC_INLINE Vec add_where(Vec sum, Mask m, Vec x) { return m.bits ? sum + x : sum; }
GAC_INLINE Vec greater_where(Vec largest, Mask m, Vec x) { return m.bits ? greater(largest, x) : largest; }
GAC_INLINE Vec times_one_less(Vec a) { return a * (a - Vec(1)); }
GAC_INLINE Vec reciprocal(Vec a) { return Vec(1) / a; }

// x = n ln 2 + f.
GAC_INLINE Vec reduce_by_ln2(Vec x, Vec n) { return fma(n, Vec(2.12194440e-4), fma(n, Vec(-0.693359375), x)); }

constexpr bool kGradualUnderflow = false;  // of scale_by_power

// 2^n for the integer n in the low bits of `biased` (see vec_math.h); -126 <= n <= 127, and infinity for 128.
GAC_INLINE Vec power_of_two(Vec, Vec biased) { return of_bits((bits_of(biased) << 23) + (127u << 23)); }
GAC_INLINE Vec scale_by_power(Vec a, Vec n, Vec biased) { return a * power_of_two(n, biased); }

}  // namespace gac::cuda

#include "../cpu/vec_math.h"
