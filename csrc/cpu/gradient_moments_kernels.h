// Eight lanes of float64 whatever the instruction set, products and sums rounded one by one: the same bits on each.
#pragma once

#include <string.h>

#include "../math/config.h"
#include "gradient_moments.h"

namespace GAC_NAMESPACE {

constexpr int kLanes = 8;
typedef double Doubles __attribute__((vector_size(64)));
typedef float Floats8 __attribute__((vector_size(32)));
typedef uint32_t Words8 __attribute__((vector_size(32)));
typedef int32_t Signs8 __attribute__((vector_size(32)));
typedef uint16_t Shorts8 __attribute__((vector_size(16)));

// By reference: how such vectors are returned differs between instruction sets.
template <class T>
GAC_INLINE void bits_from(T& to, const void* from) {
    memcpy(&to, from, sizeof to);
}

// Eight elements as they are stored, widened exactly.
struct DoubleGroup {
    using Stored = double;
    static GAC_INLINE void load(const Stored* x, Doubles& v) { bits_from(v, x); }
};
struct FloatGroup {
    using Stored = float;
    static GAC_INLINE void load(const Stored* x, Doubles& v) {
        Floats8 floats;
        bits_from(floats, x);
        v = __builtin_convertvector(floats, Doubles);
    }
};
struct Bfloat16Group {
    using Stored = uint16_t;
    static GAC_INLINE void load(const Stored* x, Doubles& v) {
        Shorts8 shorts;
        Floats8 floats;
        bits_from(shorts, x);
        const Words8 words = __builtin_convertvector(shorts, Words8) << 16;
        bits_from(floats, &words);
        v = __builtin_convertvector(floats, Doubles);
    }
};
struct HalfGroup {
    using Stored = uint16_t;
    static GAC_INLINE void load(const Stored* x, Doubles& v) {
        Shorts8 shorts;
        Floats8 low, floats;
        Words8 finite, beyond;
        bits_from(shorts, x);
        const Words8 words = __builtin_convertvector(shorts, Words8);
        // The body moves to a float's place 112 powers of two too low; a product by 2^112 is exact, subnormal or not.
        const Words8 sign = (words & 0x8000u) << 16, body = (words & 0x7fffu) << 13;
        bits_from(low, &body);
        low *= 0x1p112f;
        bits_from(finite, &low);
        const Signs8 mask = body >= Words8{} + 0x0f800000u;  // infinity and nan keep their exponent of ones
        bits_from(beyond, &mask);
        const Words8 all = sign | (beyond & (body | 0x7f800000u)) | (~beyond & finite);
        bits_from(floats, &all);
        v = __builtin_convertvector(floats, Doubles);
    }
};

// The last elements of a tensor, behind them zeros.
template <class Group>
GAC_INLINE void load_some(const typename Group::Stored* x, int64_t count, Doubles& v) {
    typename Group::Stored some[kLanes] = {};
    memcpy(some, x, static_cast<size_t>(count) * sizeof *x);
    Group::load(some, v);
}

GAC_INLINE double across(const Doubles& v) {
    return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7]));
}

template <class Group>
void compare_chunk(const GradientPair& pair, int64_t offset, int64_t count, double* out) {
    using Stored = typename Group::Stored;
    const Stored *const a = static_cast<const Stored*>(pair.gradient) + offset;
    const Stored *const b = static_cast<const Stored*>(pair.other) + offset;
    Doubles aa = {}, bb = {}, ab = {}, x, y;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Group::load(a + i, x);
        Group::load(b + i, y);
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    if (i < count) {
        load_some<Group>(a + i, count - i, x);
        load_some<Group>(b + i, count - i, y);
        aa += x * x;
        bb += y * y;
        ab += x * y;
    }
    out[0] = across(aa);
    out[1] = across(bb);
    out[2] = across(ab);
}

// Sum: the lanes of a running sum, Floats8 or Doubles.
template <class Group, class Sum, class Number>
void accumulate_chunk(const GradientPair& pair, int64_t offset, int64_t count, double* out) {
    const typename Group::Stored* const g = static_cast<const typename Group::Stored*>(pair.gradient) + offset;
    Number* const total = static_cast<Number*>(pair.other) + offset;
    Doubles squares = {}, x;
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        Group::load(g + i, x);
        Sum sum;
        bits_from(sum, total + i);
        sum += __builtin_convertvector(x, Sum);
        memcpy(total + i, &sum, sizeof sum);
        squares += x * x;
    }
    if (i < count) {
        load_some<Group>(g + i, count - i, x);
        for (int64_t j = 0; i + j < count; ++j) total[i + j] += static_cast<Number>(x[j]);
        squares += x * x;
    }
    out[0] = across(squares);
}

inline void compare(const GradientPair& pair, int64_t offset, int64_t count, double* out) {
    switch (pair.element) {
        case Element::kFloat: return compare_chunk<FloatGroup>(pair, offset, count, out);
        case Element::kBfloat16: return compare_chunk<Bfloat16Group>(pair, offset, count, out);
        case Element::kHalf: return compare_chunk<HalfGroup>(pair, offset, count, out);
        case Element::kDouble: return compare_chunk<DoubleGroup>(pair, offset, count, out);
    }
}

template <class Group>
GAC_INLINE void accumulate_of(const GradientPair& pair, int64_t offset, int64_t count, double* out) {
    if (pair.wide_sum) accumulate_chunk<Group, Doubles, double>(pair, offset, count, out);
    else accumulate_chunk<Group, Floats8, float>(pair, offset, count, out);
}
inline void accumulate(const GradientPair& pair, int64_t offset, int64_t count, double* out) {
    switch (pair.element) {
        case Element::kFloat: return accumulate_of<FloatGroup>(pair, offset, count, out);
        case Element::kBfloat16: return accumulate_of<Bfloat16Group>(pair, offset, count, out);
        case Element::kHalf: return accumulate_of<HalfGroup>(pair, offset, count, out);
        case Element::kDouble: return accumulate_chunk<DoubleGroup, Doubles, double>(pair, offset, count, out);
    }
}

constexpr MomentKernels kMomentKernels{compare, accumulate};

}  // namespace GAC_NAMESPACE
