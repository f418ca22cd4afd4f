// Elements in memory to and from four floats, or one double, on any CPU. See elements_avx512.h.
#pragma once

#include "../rows.h"
#include "vec_double.h"
#include "vec_portable.h"

namespace GAC_NAMESPACE {

struct FloatElements {
    using Stored = float;
    static constexpr int Vectors = 1, Group = 4;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = -__builtin_huge_valf(), kNan = __builtin_nanf("");

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) { v[0] = Vec::load(x); }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) { v[0].store(x); }
    static GAC_INLINE float widen(Stored x) { return x; }
};

struct DoubleElements {
    using Stored = double;
    static constexpr int Vectors = 1, Group = 1;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = -__builtin_huge_val(), kNan = __builtin_nan("");

    static GAC_INLINE void load(const Stored* x, VecDouble (&v)[1]) { v[0] = VecDouble(*x); }
    static GAC_INLINE void store(Stored* x, const VecDouble (&v)[1]) { *x = v[0].v; }
    static GAC_INLINE double widen(Stored x) { return x; }
};

typedef uint32_t Words __attribute__((vector_size(16)));
GAC_INLINE Words words_of(Floats x) { return reinterpret_cast<Words>(x); }
GAC_INLINE Floats floats_of(Words x) { return reinterpret_cast<Floats>(x); }
GAC_INLINE Words where(Ints mask, Words a, Words b) {
    const Words m = reinterpret_cast<Words>(mask);
    return (m & a) | (~m & b);
}

// 16-bit elements; Convert has widen and narrow (to nearest), of words that hold an element each.
template <class Convert>
struct SmallElements : Convert {
    using Stored = uint16_t;
    static constexpr int Vectors = 1, Group = 4;
    static constexpr bool Interleaved = false;
    typedef uint16_t Packed __attribute__((vector_size(8)));

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) {
        Packed packed;
        memcpy(&packed, x, sizeof packed);
        v[0] = Convert::wider(__builtin_convertvector(packed, Words));
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) {
        const Packed packed = __builtin_convertvector(Convert::narrower(v[0].v), Packed);
        memcpy(x, &packed, sizeof packed);
    }
    static GAC_INLINE float widen(Stored x) { return Convert::wider(Words{x, x, x, x})[0]; }
};

struct Bfloat16Convert {
    static constexpr uint16_t kLowest = 0xff80, kNan = 0x7fc0;

    static GAC_INLINE Floats wider(Words x) { return floats_of(x << 16); }
    // Ties go away from zero. Not for nan: see row_kernels.h.
    static GAC_INLINE Words narrower(Floats x) { return (words_of(x) + 0x8000u) >> 16; }
};

struct HalfConvert {
    static constexpr uint16_t kLowest = 0xfc00, kNan = 0x7e00;

    static GAC_INLINE Floats wider(Words x) {
        const Words sign = (x & 0x8000u) << 16, body = (x & 0x7fffu) << 13, moved = body + (112u << 23);
        // Below the smallest normal number the leading one that `moved` now implies has to go.
        const Words small = words_of(floats_of(moved + (1u << 23)) - 0x1p-14f);
        const Words finite = where(body < 0x00800000u, small, moved);
        return floats_of(sign | where(body >= 0x0f800000u, moved + (112u << 23), finite));
    }
    static GAC_INLINE Words narrower(Floats x) {
        const Words sign = words_of(x) >> 16 & 0x8000u, size = words_of(x) & 0x7fffffffu, moved = size - (112u << 23);
        const Words normal = (moved + 0xfffu + (moved >> 13 & 1u)) >> 13;
        // Below 2^-14, adding 2^-1 aligns the last place with float16's and rounds.
        const Words small = words_of(floats_of(size) + 0.5f) - 0x3f000000u;
        const Words large = where(size > 0x7f800000u, Words{} + kNan, Words{} + 0x7c00u);  // from 2^16 on
        return sign | where(size >= 0x47800000u, large, where(size < 0x38800000u, small, normal));
    }
};

using Bfloat16Elements = SmallElements<Bfloat16Convert>;
using HalfElements = SmallElements<HalfConvert>;

GAC_INLINE float largest_lane(Vec v) {
    float lane[Vec::Lanes], largest;
    v.store(lane);
    largest = lane[0];
    for (float each : lane) largest = each > largest ? each : largest;
    return largest;
}
GAC_INLINE double largest_lane(VecDouble v) { return v.v; }

// 2^(rate d) to about 1 ulp for -127 <= rate d <= 0: 1 at 0, 0 at -127.
GAC_INLINE Vec exp2_floored(Vec d, Vec rate) { return exp2_moderate(d, rate); }

// factor 2^t with a relative error below 8e-5, for gradients that are rounded to 16 bits; 0 for t below -126.5.
struct ShortExp2 {
    Vec c0, c1, c2, c3;

    explicit GAC_INLINE ShortExp2(double factor)
        : c0(0.999928057 * factor), c1(0.693260968 * factor), c2(0.242611125 * factor), c3(0.0551716685 * factor) {}

    GAC_INLINE Vec operator()(Vec t) const {
        const Vec shift(12582912.0), bounded = greater(Vec(-127), t);
        const Vec biased = bounded + shift, n = biased - shift, f = bounded - n;
        return scale_by_power(fma(fma(fma(c3, f, c2), f, c1), f, c0), n, biased);
    }
};

}  // namespace GAC_NAMESPACE
