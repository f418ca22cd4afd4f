// Sixteen floats in an AVX-512 register (F, BW, DQ, VL).
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "../math/config.h"

namespace GAC_NAMESPACE {

struct Vec {
    using Scalar = float;
    static constexpr int Lanes = 16;

    struct Mask {
        __mmask16 bits;
    };
    __m512 v;

    Vec() = default;
    explicit GAC_INLINE Vec(double x) : v(_mm512_set1_ps(static_cast<float>(x))) {}
    GAC_INLINE Vec(__m512 x) : v(x) {}

    // The lanes of a bool mask that are set.
    static GAC_INLINE Mask live(const uint8_t* mask) {
        const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(mask));
        return {_mm_test_epi8_mask(bytes, bytes)};
    }
    static GAC_INLINE Vec load(const float* x) { return _mm512_loadu_ps(x); }
    static GAC_INLINE Vec load(const float* x, Mask m) { return _mm512_maskz_loadu_ps(m.bits, x); }
    GAC_INLINE void store(float* x) const { _mm512_storeu_ps(x, v); }

    // total[lane] += this[lane] in double precision.
    GAC_INLINE void add_to(double* total) const {
        const __m256 high = _mm512_extractf32x8_ps(v, 1), low = _mm512_castps512_ps256(v);
        _mm512_storeu_pd(total, _mm512_add_pd(_mm512_loadu_pd(total), _mm512_cvtps_pd(low)));
        _mm512_storeu_pd(total + 8, _mm512_add_pd(_mm512_loadu_pd(total + 8), _mm512_cvtps_pd(high)));
    }
};
using Mask = Vec::Mask;

GAC_INLINE Vec operator+(Vec a, Vec b) { return _mm512_add_ps(a.v, b.v); }
GAC_INLINE Vec operator-(Vec a, Vec b) { return _mm512_sub_ps(a.v, b.v); }
GAC_INLINE Vec operator*(Vec a, Vec b) { return _mm512_mul_ps(a.v, b.v); }
GAC_INLINE Vec operator/(Vec a, Vec b) { return _mm512_div_ps(a.v, b.v); }
GAC_INLINE Vec operator-(Vec a) { return _mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f)); }
GAC_INLINE Mask operator<(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
GAC_INLINE Mask operator>(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
GAC_INLINE Mask operator==(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
GAC_INLINE Mask operator&(Mask a, Mask b) { return {_kand_mask16(a.bits, b.bits)}; }
GAC_INLINE Mask operator|(Mask a, Mask b) { return {_kor_mask16(a.bits, b.bits)}; }
GAC_INLINE Mask without(Mask a, Mask b) { return {_kandn_mask16(b.bits, a.bits)}; }
GAC_INLINE Mask differs(Vec a, Vec b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_OQ)}; }
GAC_INLINE Vec select(Mask m, Vec a, Vec b) { return _mm512_mask_blend_ps(m.bits, b.v, a.v); }
GAC_INLINE Vec lesser(Vec a, Vec b) { return _mm512_min_ps(a.v, b.v); }
GAC_INLINE Vec greater(Vec a, Vec b) { return _mm512_max_ps(a.v, b.v); }
GAC_INLINE Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
GAC_INLINE Vec abs(Vec a) { return _mm512_abs_ps(a.v); }
GAC_INLINE Vec sqrt(Vec a) { return _mm512_sqrt_ps(a.v); }
GAC_INLINE Vec copysign(Vec magnitude, Vec sign) {
    // 0xd8: where the constant has a bit, take sign's, else magnitude's
    const __m512i bit = _mm512_set1_epi32(INT32_MIN);
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_castps_si512(magnitude.v), _mm512_castps_si512(sign.v), bit, 0xd8));
}
GAC_INLINE Vec add_where(Vec sum, Mask m, Vec x) { return _mm512_mask_add_ps(sum.v, m.bits, sum.v, x.v); }

GAC_INLINE Vec greater_where(Vec largest, Mask m, Vec x) {
    return _mm512_mask_max_ps(largest.v, m.bits, largest.v, x.v);
}

GAC_INLINE Vec times_one_less(Vec a) { return _mm512_fmsub_ps(a.v, a.v, a.v); }

// 14 bits from the table, doubled by one Newton step: a third of the division's cost.
GAC_INLINE Vec reciprocal(Vec a) {
    const Vec y = _mm512_rcp14_ps(a.v);
    return fma(y, Vec(_mm512_fnmadd_ps(a.v, y.v, _mm512_set1_ps(1.0f))), y);
}

// x = n ln 2 + f. ln 2 in one piece: with a fused multiply-add its rounding costs 3e-9 |x| of e^x.
GAC_INLINE Vec reduce_by_ln2(Vec x, Vec n) { return _mm512_fnmadd_ps(n.v, _mm512_set1_ps(0.693147182f), x.v); }

constexpr bool kGradualUnderflow = true;  // of scale_by_power

// a 2^n for any integral n, with overflow to infinity and gradual underflow. `biased` holds n too (see vec_math.h).
GAC_INLINE Vec scale_by_power(Vec a, Vec n, Vec) { return _mm512_scalef_ps(a.v, n.v); }
GAC_INLINE Vec power_of_two(Vec n, Vec) { return _mm512_scalef_ps(_mm512_set1_ps(1.0f), n.v); }

GAC_INLINE int64_t count_live(const uint8_t* mask, int64_t n) {
    int64_t count = 0, i = 0;
    for (; i + 64 <= n; i += 64) {
        const __m512i bytes = _mm512_loadu_si512(mask + i);
        count += __builtin_popcountll(_mm512_test_epi8_mask(bytes, bytes));
    }
    for (; i < n; ++i) count += mask[i] != 0;
    return count;
}

}  // namespace GAC_NAMESPACE
