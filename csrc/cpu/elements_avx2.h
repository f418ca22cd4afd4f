// Elements in memory to and from AVX2 lanes (with F16C). See elements_avx512.h.
#pragma once

#include "../rows.h"
#include "vec_avx2.h"

namespace GAC_NAMESPACE {

struct FloatElements {
    using Stored = float;
    static constexpr int Vectors = 1, Group = 8;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = -__builtin_huge_valf(), kNan = __builtin_nanf("");

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) { v[0] = Vec::load(x); }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) { v[0].store(x); }
    static GAC_INLINE float widen(Stored x) { return x; }
};

struct Bfloat16Elements {
    using Stored = uint16_t;
    static constexpr int Vectors = 2, Group = 16;
    static constexpr bool Interleaved = true;
    static constexpr Stored kLowest = 0xff80, kNan = 0x7fc0;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[2]) {
        const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
        v[0] = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
        v[1] = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(static_cast<int>(0xffff0000))));
    }
    // To nearest; ties, one in 65,536 of what is computed in float32, go away from zero. Not for nan.
    static GAC_INLINE __m256i rounded(Vec v) {
        return _mm256_add_epi32(_mm256_castps_si256(v.v), _mm256_set1_epi32(0x8000));
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[2]) {
        const __m256i even = _mm256_srli_epi32(rounded(v[0]), 16);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), _mm256_blend_epi16(even, rounded(v[1]), 0xaa));
    }
    static GAC_INLINE float widen(Stored x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float out;
        __builtin_memcpy(&out, &bits, sizeof out);
        return out;
    }
};

struct HalfElements {
    using Stored = uint16_t;
    static constexpr int Vectors = 1, Group = 8;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = 0xfc00, kNan = 0x7e00;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) {
        v[0] = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) {
        const __m128i half = _mm256_cvtps_ph(v[0].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(x), half);
    }
    static GAC_INLINE float widen(Stored x) { return _cvtsh_ss(x); }
};

GAC_INLINE float largest_lane(Vec v) {
    float lane[Vec::Lanes], largest;
    v.store(lane);
    largest = lane[0];
    for (float each : lane) largest = each > largest ? each : largest;
    return largest;
}

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
