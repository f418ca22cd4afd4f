// Elements in memory to and from AVX-512 lanes. A group is what one 64- or 32-byte access brings; which lane an element
// comes to depends on its place in the group alone.
#pragma once

#include "rows.h"
#include "vec_avx512.h"

namespace GAC_NAMESPACE {

struct FloatElements {
    using Stored = float;
    static constexpr int Vectors = 1, Group = 16;
    static constexpr Stored kLowest = -__builtin_huge_valf(), kNan = __builtin_nanf("");

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) { v[0] = Vec::load(x); }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) { v[0].store(x); }
    static GAC_INLINE float widen(Stored x) { return x; }
};

// Thirty-two at once: even elements in v[0], odd ones in v[1], so that no lane has to cross.
struct Bfloat16Elements {
    using Stored = uint16_t;
    static constexpr int Vectors = 2, Group = 32;
    static constexpr Stored kLowest = 0xff80, kNan = 0x7fc0;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[2]) {
        const __m512i both = _mm512_loadu_si512(x);
        v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        v[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    // To nearest, ties to even. Not for nan: see row_kernels.h.
    static GAC_INLINE __m512i rounded(Vec v) {
        const __m512i bits = _mm512_castps_si512(v.v);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        return _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[2]) {
        const __m512i even = _mm512_srli_epi32(rounded(v[0]), 16);
        _mm512_storeu_si512(x, _mm512_mask_blend_epi16(0xaaaaaaaa, even, rounded(v[1])));
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
    static constexpr int Vectors = 1, Group = 16;
    static constexpr Stored kLowest = 0xfc00, kNan = 0x7e00;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) {
        v[0] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) {
        const __m256i half = _mm512_cvtps_ph(v[0].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(x), half);
    }
    static GAC_INLINE float widen(Stored x) {
        return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x))));
    }
};

// 2^t with a relative error below 8e-5, for gradients that are rounded to 16 bits; 0 below -150.
GAC_INLINE Vec exp2_short(Vec t) {
    const Vec f = _mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
    Vec p = fma(Vec(0.0780245215), f, Vec(0.226067156));
    p = fma(p, f, Vec(0.695833564));
    p = fma(p, f, Vec(0.999925196));
    return _mm512_scalef_ps(p.v, t.v);  // takes the floor itself
}

}  // namespace GAC_NAMESPACE
