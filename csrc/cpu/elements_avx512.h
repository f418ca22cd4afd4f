// Elements in memory to and from AVX-512 lanes. A group fills two vectors; which lane an element comes to depends on its place
// in the group alone: natural order, or where Interleaved, even elements in the first vector and odd ones in the second.
#pragma once

#include "../rows.h"
#include "vec_avx512.h"

namespace GAC_NAMESPACE {

struct FloatElements {
    using Stored = float;
    static constexpr int Vectors = 2, Group = 32;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = -__builtin_huge_valf(), kNan = __builtin_nanf("");

    static GAC_INLINE void load(const Stored* x, Vec (&v)[2]) {
        v[0] = Vec::load(x);
        v[1] = Vec::load(x + 16);
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[2]) {
        v[0].store(x);
        v[1].store(x + 16);
    }
    static GAC_INLINE float widen(Stored x) { return x; }
};

// Interleaved, so that nothing has to cross lanes.
struct Bfloat16Elements {
    using Stored = uint16_t;
    static constexpr int Vectors = 2, Group = 32;
    static constexpr bool Interleaved = true;
    static constexpr Stored kLowest = 0xff80, kNan = 0x7fc0;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[2]) {
        const __m512i both = _mm512_loadu_si512(x);
        v[0] = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
        v[1] = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
    // To nearest; ties, one in 65,536 of what is computed in float32, go away from zero, which takes one instruction
    // instead of four. Not for nan: see row_kernels.h.
    static GAC_INLINE __m512i rounded(Vec v) {
        return _mm512_add_epi32(_mm512_castps_si512(v.v), _mm512_set1_epi32(0x8000));
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
    static constexpr int Vectors = 2, Group = 32;
    static constexpr bool Interleaved = false;
    static constexpr Stored kLowest = 0xfc00, kNan = 0x7e00;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[2]) {
        for (int k = 0; k < 2; ++k)
            v[k] = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 16 * k)));
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[2]) {
        for (int k = 0; k < 2; ++k)
            _mm256_storeu_si256(
                reinterpret_cast<__m256i*>(x + 16 * k),
                _mm512_cvtps_ph(v[k].v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    }
    static GAC_INLINE float widen(Stored x) {
        return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<short>(x))));
    }
};

GAC_INLINE float largest_lane(Vec v) { return _mm512_reduce_max_ps(v.v); }

// 2^(rate d) to about 1 ulp for -127 <= rate d <= 0, with flushed denormals: 0 from there to -126, 1 at 0. rate d = n + j / 32
// + f; 2^(j / 32) comes from a table in two registers, which leaves so small an f that two terms of 2^f - 1 are enough
// (relative error 5e-8, own minimax fit). Seventeen cycles where a polynomial alone takes forty.
GAC_INLINE Vec exp2_floored(Vec d, Vec rate) {
    // The bits of 2^(j / 32) less j << 18, which `steps` below adds along with n << 23.
    alignas(64) static constexpr uint32_t kTable[32] = {
        0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
        0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
        0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
        0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3};
    const Vec shift(393216.0);  // 1.5 * 2^18: adding it rounds to a multiple of 1 / 32 and leaves 32 n + j in the low bits
    const Vec biased = fma(d, rate, shift);
    const __m512i steps = _mm512_castps_si512(biased.v);
    const Vec f = fma(d, rate, shift - biased);
    const __m512i power = _mm512_permutex2var_epi32(
        _mm512_load_si512(kTable), steps, _mm512_load_si512(kTable + 16));
    const Vec scale = _mm512_castsi512_ps(_mm512_add_epi32(power, _mm512_slli_epi32(steps, 18)));
    return fma(scale * f, fma(Vec(0.240228659), f, Vec(0.693157314)), scale);
}

// factor 2^t with a relative error below 8e-5, for gradients that are rounded to 16 bits; 0 for t below -150.
struct ShortExp2 {
    Vec c0, c1, c2, c3;

    explicit GAC_INLINE ShortExp2(double factor)
        : c0(0.999925196 * factor), c1(0.695833564 * factor), c2(0.226067156 * factor), c3(0.0780245215 * factor) {}

    GAC_INLINE Vec operator()(Vec t) const {
        const Vec f = _mm512_reduce_ps(t.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // t - floor(t)
        return _mm512_scalef_ps(fma(fma(fma(c3, f, c2), f, c1), f, c0).v, t.v);  // takes the floor itself
    }
};

}  // namespace GAC_NAMESPACE
