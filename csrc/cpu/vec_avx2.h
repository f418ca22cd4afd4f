// Eight floats in an AVX2 register, with FMA.
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "../math/config.h"

namespace GAC_NAMESPACE {

struct Vec {
    using Scalar = float;
    static constexpr int Lanes = 8;

    struct Mask {
        __m256 bits;  // all ones or all zeros in a lane
    };
    __m256 v;

    Vec() = default;
    explicit GAC_INLINE Vec(double x) : v(_mm256_set1_ps(static_cast<float>(x))) {}
    GAC_INLINE Vec(__m256 x) : v(x) {}

    // The lanes of a bool mask that are set.
    static GAC_INLINE Mask live(const uint8_t* mask) {
        const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(mask)));
        return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(wide, _mm256_setzero_si256()))};
    }
    static GAC_INLINE Vec load(const float* x) { return _mm256_loadu_ps(x); }
    static GAC_INLINE Vec load(const float* x, Mask m) { return _mm256_and_ps(_mm256_loadu_ps(x), m.bits); }
    GAC_INLINE void store(float* x) const { _mm256_storeu_ps(x, v); }

    // total[lane] += this[lane] in double precision.
    GAC_INLINE void add_to(double* total) const {
        const __m128 high = _mm256_extractf128_ps(v, 1), low = _mm256_castps256_ps128(v);
        _mm256_storeu_pd(total, _mm256_add_pd(_mm256_loadu_pd(total), _mm256_cvtps_pd(low)));
        _mm256_storeu_pd(total + 4, _mm256_add_pd(_mm256_loadu_pd(total + 4), _mm256_cvtps_pd(high)));
    }
};
using Mask = Vec::Mask;

GAC_INLINE Vec operator+(Vec a, Vec b) { return _mm256_add_ps(a.v, b.v); }
GAC_INLINE Vec operator-(Vec a, Vec b) { return _mm256_sub_ps(a.v, b.v); }
GAC_INLINE Vec operator*(Vec a, Vec b) { return _mm256_mul_ps(a.v, b.v); }
GAC_INLINE Vec operator/(Vec a, Vec b) { return _mm256_div_ps(a.v, b.v); }
GAC_INLINE Vec operator-(Vec a) { return _mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f)); }
GAC_INLINE Mask operator<(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
GAC_INLINE Mask operator>(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
GAC_INLINE Mask operator==(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
GAC_INLINE Mask operator&(Mask a, Mask b) { return {_mm256_and_ps(a.bits, b.bits)}; }
GAC_INLINE Mask operator|(Mask a, Mask b) { return {_mm256_or_ps(a.bits, b.bits)}; }
GAC_INLINE Mask without(Mask a, Mask b) { return {_mm256_andnot_ps(b.bits, a.bits)}; }
GAC_INLINE Mask differs(Vec a, Vec b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_OQ)}; }
GAC_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm256_blendv_ps(b.v, a.v, m.bits); }
GAC_INLINE Vec lesser(Vec a, Vec b) { return _mm256_min_ps(a.v, b.v); }
GAC_INLINE Vec greater(Vec a, Vec b) { return _mm256_max_ps(a.v, b.v); }
GAC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
GAC_INLINE Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v); }
GAC_INLINE Vec sqrt(Vec a) { return _mm256_sqrt_ps(a.v); }
GAC_INLINE Vec copysign(Vec magnitude, Vec sign) {
    const __m256 bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_andnot_ps(bit, magnitude.v), _mm256_and_ps(bit, sign.v));
}
GAC_INLINE Vec add_where(Vec sum, Mask m, Vec x) { return _mm256_add_ps(sum.v, _mm256_and_ps(x.v, m.bits)); }

GAC_INLINE Vec greater_where(Vec largest, Mask m, Vec x) { return greater(largest, select(m, x, largest)); }
GAC_INLINE Vec times_one_less(Vec a) { return _mm256_fmsub_ps(a.v, a.v, a.v); }
GAC_INLINE Vec reciprocal(Vec a) { return Vec(1) / a; }

// x = n ln 2 + f. ln 2 in one piece: with a fused multiply-add its rounding costs 3e-9 |x| of e^x.
GAC_INLINE Vec reduce_by_ln2(Vec x, Vec n) { return _mm256_fnmadd_ps(n.v, _mm256_set1_ps(0.693147182f), x.v); }

constexpr bool kGradualUnderflow = false;  // of scale_by_power

// 2^n for the integer n in the low bits of `biased` (see vec_math.h); -126 <= n <= 127, and infinity for 128.
GAC_INLINE Vec power_of_two(Vec, Vec biased) {
    const __m256i shifted = _mm256_slli_epi32(_mm256_castps_si256(biased.v), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(shifted, _mm256_set1_epi32(127 << 23)));
}
GAC_INLINE Vec scale_by_power(Vec a, Vec n, Vec biased) { return a * power_of_two(n, biased); }

GAC_INLINE int64_t count_live(const uint8_t* mask, int64_t n) {
    int64_t count = 0, i = 0;
    for (; i + 32 <= n; i += 32) {
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(mask + i));
        const int zeros = _mm256_movemask_epi8(_mm256_cmpeq_epi8(bytes, _mm256_setzero_si256()));
        count += 32 - __builtin_popcount(static_cast<unsigned>(zeros));
    }
    for (; i < n; ++i) count += mask[i] != 0;
    return count;
}

}  // namespace GAC_NAMESPACE
