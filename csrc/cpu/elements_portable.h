// Elements in memory to and from four floats, or one double, on any CPU. See elements_avx512.h.
#pragma once

#include "rows.h"
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

// 16-bit elements one lane after the other; Convert has widen and narrow (to nearest, ties to even).
template <class Convert>
struct SmallElements : Convert {
    using Stored = uint16_t;
    static constexpr int Vectors = 1, Group = 4;
    static constexpr bool Interleaved = false;

    static GAC_INLINE void load(const Stored* x, Vec (&v)[1]) {
        v[0] = Floats{Convert::widen(x[0]), Convert::widen(x[1]), Convert::widen(x[2]), Convert::widen(x[3])};
    }
    static GAC_INLINE void store(Stored* x, const Vec (&v)[1]) {
        for (int lane = 0; lane < Group; ++lane) x[lane] = Convert::narrow(v[0].v[lane]);
    }
};

struct Bfloat16Convert {
    static constexpr uint16_t kLowest = 0xff80, kNan = 0x7fc0;
    static GAC_INLINE float widen(uint16_t x) {
        const uint32_t bits = static_cast<uint32_t>(x) << 16;
        float out;
        memcpy(&out, &bits, sizeof out);
        return out;
    }
    static GAC_INLINE uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
    }
};

struct HalfConvert {
    static constexpr uint16_t kLowest = 0xfc00, kNan = 0x7e00;
    static GAC_INLINE float widen(uint16_t x) {
        const uint32_t sign = static_cast<uint32_t>(x & 0x8000) << 16, body = x & 0x7fff;
        uint32_t bits = body << 13;
        if (body >= 0x7c00) {
            bits += (255u - 31u) << 23;  // infinity and nan
        } else if (body >= 0x0400) {
            bits += (127u - 15u) << 23;
        } else {  // below the smallest normal number: a multiple of 2^-24
            const float small = static_cast<float>(body) * 0x1p-24f;
            memcpy(&bits, &small, sizeof bits);
        }
        bits |= sign;
        float out;
        memcpy(&out, &bits, sizeof out);
        return out;
    }
    static GAC_INLINE uint16_t narrow(float x) {
        uint32_t bits;
        memcpy(&bits, &x, sizeof bits);
        const uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
        if (size > 0x7f800000) return kNan;
        if (size >= 0x47800000) return static_cast<uint16_t>(sign | 0x7c00);  // 2^16 and above
        if (size < 0x38800000) {  // below 2^-14: adding 2^-1 aligns the last place with float16's and rounds
            float aligned;
            memcpy(&aligned, &size, sizeof aligned);
            aligned += 0.5f;
            memcpy(&bits, &aligned, sizeof bits);
            return static_cast<uint16_t>(sign | (bits - 0x3f000000));
        }
        const uint32_t moved = size - ((127u - 15u) << 23);
        return static_cast<uint16_t>(sign | ((moved + 0xfff + ((moved >> 13) & 1)) >> 13));
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

// e^d to about 1 ulp for -127 ln 2 <= d <= 0; 0 at -127 ln 2, where power_of_two is.
GAC_INLINE Vec exp_floored(Vec d) { return exp_moderate(d); }

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
