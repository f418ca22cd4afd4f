// Elements in memory to and from numbers: 16 bytes at a time, and one by one at the ends of a row.
#pragma once

#include "device.cuh"

namespace gac::cuda {

// Elements that are what is computed with.
template <class T>
struct WholeElements {
    using Stored = T;
    using Sum = T;
    static constexpr int Width = 16 / sizeof(T);  // elements in 16 bytes

    static GAC_DEVICE void widen(Bytes16 v, T (&x)[Width]) { memcpy(x, &v, 16); }
    static GAC_DEVICE Bytes16 narrow(const T (&x)[Width]) {
        Bytes16 v;
        memcpy(&v, x, 16);
        return v;
    }
    static GAC_DEVICE T widen(Stored x) { return x; }
    static GAC_DEVICE Stored narrow(T x) { return x; }
};
using FloatElements = WholeElements<float>;
using DoubleElements = WholeElements<double>;

GAC_DEVICE float float_of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

struct Bfloat16Elements {
    using Stored = uint16_t;
    using Sum = float;
    static constexpr int Width = 8;

    static GAC_DEVICE void widen(Bytes16 v, float (&x)[Width]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = float_of_bits(v.word[i] << 16);
            x[2 * i + 1] = float_of_bits(v.word[i] & 0xffff0000u);
        }
    }
    static GAC_DEVICE Bytes16 narrow(const float (&x)[Width]) {
        Bytes16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] = pack_bfloat16(x[2 * i], x[2 * i + 1]);
        return v;
    }
    static GAC_DEVICE float widen(Stored x) { return float_of_bits(static_cast<uint32_t>(x) << 16); }
    static GAC_DEVICE Stored narrow(float x) { return static_cast<Stored>(pack_bfloat16(x, 0.0f)); }
};

struct HalfElements {
    using Stored = uint16_t;
    using Sum = float;
    static constexpr int Width = 8;

    static GAC_DEVICE void widen(Bytes16 v, float (&x)[Width]) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            x[2 * i] = widen_half(static_cast<uint16_t>(v.word[i]));
            x[2 * i + 1] = widen_half(static_cast<uint16_t>(v.word[i] >> 16));
        }
    }
    static GAC_DEVICE Bytes16 narrow(const float (&x)[Width]) {
        Bytes16 v;
#pragma unroll
        for (int i = 0; i < 4; ++i) v.word[i] = pack_half(x[2 * i], x[2 * i + 1]);
        return v;
    }
    static GAC_DEVICE float widen(Stored x) { return widen_half(x); }
    static GAC_DEVICE Stored narrow(float x) { return static_cast<Stored>(pack_half(x, 0.0f)); }
};

// The exponential of sums in T: 2^x with exponents scaled by log2 e for float, e^x for double.
template <class T>
struct Power;
template <>
struct Power<float> {
    static constexpr double kUnit = 1.4426950408889634;
    static GAC_DEVICE float at(float x) { return exp2_hardware(x); }
};
template <>
struct Power<double> {
    static constexpr double kUnit = 1.0;
    static GAC_DEVICE double at(double x) { return ::exp(x); }
};

GAC_DEVICE float largest(float a, float b) { return ::fmaxf(a, b); }
GAC_DEVICE double largest(double a, double b) { return ::fmax(a, b); }
GAC_DEVICE float multiply_add(float a, float b, float c) { return ::fmaf(a, b, c); }
GAC_DEVICE double multiply_add(double a, double b, double c) { return ::fma(a, b, c); }

}  // namespace gac::cuda
