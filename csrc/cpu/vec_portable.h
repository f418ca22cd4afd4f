// Four floats in the vector extension of GCC and Clang, which becomes SSE2, NEON, VSX or plain scalar code.
#pragma once

#include <stdint.h>
#include <string.h>

#include "../math/config.h"

namespace GAC_NAMESPACE {

struct Vec {
    using Scalar = float;
    static constexpr int Lanes = 4;

    typedef float Floats __attribute__((vector_size(16)));
    typedef int32_t Ints __attribute__((vector_size(16)));
    struct Mask {
        Ints bits;  // -1 or 0 in a lane
    };
    Floats v;

    Vec() = default;
    explicit GAC_INLINE Vec(double x) : v(Floats{} + static_cast<float>(x)) {}
    GAC_INLINE Vec(const Floats& x) : v(x) {}

    // The lanes of a bool mask that are set.
    static GAC_INLINE Mask live(const uint8_t* m) {
        const Ints wide = {m[0], m[1], m[2], m[3]};
        return {wide != Ints{}};
    }
    static GAC_INLINE Vec load(const float* x) {
        Vec out;
        memcpy(&out.v, x, sizeof out.v);
        return out;
    }
    static GAC_INLINE Vec load(const float* x, Mask m);
    GAC_INLINE void store(float* x) const { memcpy(x, &v, sizeof v); }

    // total[lane] += this[lane] in double precision.
    GAC_INLINE void add_to(double* total) const {
        for (int lane = 0; lane < Lanes; ++lane) total[lane] += static_cast<double>(v[lane]);
    }
};
using Mask = Vec::Mask;
using Floats = Vec::Floats;
using Ints = Vec::Ints;

GAC_INLINE Ints bits_of(Vec a) { return reinterpret_cast<Ints>(a.v); }
GAC_INLINE Vec of_bits(Ints a) { return reinterpret_cast<Floats>(a); }

GAC_INLINE Vec operator+(Vec a, Vec b) { return a.v + b.v; }
GAC_INLINE Vec operator-(Vec a, Vec b) { return a.v - b.v; }
GAC_INLINE Vec operator*(Vec a, Vec b) { return a.v * b.v; }
GAC_INLINE Vec operator/(Vec a, Vec b) { return a.v / b.v; }
GAC_INLINE Vec operator-(Vec a) { return -a.v; }
GAC_INLINE Mask operator<(Vec a, Vec b) { return {a.v < b.v}; }
GAC_INLINE Mask operator>(Vec a, Vec b) { return {a.v > b.v}; }
GAC_INLINE Mask operator==(Vec a, Vec b) { return {a.v == b.v}; }
GAC_INLINE Mask operator&(Mask a, Mask b) { return {a.bits & b.bits}; }
GAC_INLINE Mask operator|(Mask a, Mask b) { return {a.bits | b.bits}; }
GAC_INLINE Mask without(Mask a, Mask b) { return {a.bits & ~b.bits}; }
GAC_INLINE Mask differs(Vec a, Vec b) { return (a < b) | (a > b); }
GAC_INLINE Vec select(Mask m, Vec a, Vec b) { return of_bits((m.bits & bits_of(a)) | (~m.bits & bits_of(b))); }
GAC_INLINE Vec lesser(Vec a, Vec b) { return select(a < b, a, b); }
GAC_INLINE Vec greater(Vec a, Vec b) { return select(a > b, a, b); }
GAC_INLINE Vec fma(Vec a, Vec b, Vec c) { return a.v * b.v + c.v; }  // two roundings: not every machine has an FMA
GAC_INLINE Vec abs(Vec a) { return of_bits(bits_of(a) & INT32_MAX); }
GAC_INLINE Vec sqrt(Vec a) {
    for (int lane = 0; lane < Vec::Lanes; ++lane) a.v[lane] = __builtin_sqrtf(a.v[lane]);
    return a;
}
GAC_INLINE Vec copysign(Vec magnitude, Vec sign) {
    return of_bits((bits_of(magnitude) & INT32_MAX) | (bits_of(sign) & INT32_MIN));
}
GAC_INLINE Vec add_where(Vec sum, Mask m, Vec x) { return sum + of_bits(m.bits & bits_of(x)); }
GAC_INLINE Vec Vec::load(const float* x, Mask m) { return of_bits(m.bits & bits_of(load(x))); }

GAC_INLINE Vec greater_where(Vec largest, Mask m, Vec x) { return greater(largest, select(m, x, largest)); }
GAC_INLINE Vec times_one_less(Vec a) { return a * (a - Vec(1)); }
GAC_INLINE Vec reciprocal(Vec a) { return Vec(1) / a; }

// x = n ln 2 + f. The high part of ln 2 has so few bits that n times it is exact: no fused multiply-add is needed.
GAC_INLINE Vec reduce_by_ln2(Vec x, Vec n) { return (x - n * Vec(0.693359375)) + n * Vec(2.12194440e-4); }

constexpr bool kGradualUnderflow = false;  // of scale_by_power

// 2^n for the integer n in the low bits of `biased` (see vec_math.h); -126 <= n <= 127, and infinity for 128.
GAC_INLINE Vec power_of_two(Vec, Vec biased) {
    typedef uint32_t Words __attribute__((vector_size(16)));
    return of_bits(reinterpret_cast<Ints>((reinterpret_cast<Words>(biased.v) << 23) + (127u << 23)));
}
GAC_INLINE Vec scale_by_power(Vec a, Vec n, Vec biased) { return a * power_of_two(n, biased); }

GAC_INLINE int64_t count_live(const uint8_t* mask, int64_t n) {
    int64_t count = 0;
    for (int64_t i = 0; i < n; ++i) count += mask[i] != 0;
    return count;
}

}  // namespace GAC_NAMESPACE
