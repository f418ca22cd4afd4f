// What every header of csrc/math is written against. No torch and no standard library here: the same text is compiled
// once for each CPU instruction set and by nvcc.
//
// GAC_NAMESPACE is set by the including unit and differs between instruction sets, so that the linker never takes the
// AVX-512 copy of an inline function for the portable one.
#pragma once

#ifndef GAC_NAMESPACE
#error "define GAC_NAMESPACE, e.g. gac::avx2, before including csrc headers"
#endif

#ifdef __CUDACC__
#define GAC_INLINE __host__ __device__ __forceinline__
#define GAC_LIBM(function) ::function
#else
#define GAC_INLINE inline __attribute__((always_inline))
#define GAC_LIBM(function) __builtin_##function
#endif

// A lane type V is a float, a double, or a pack of them that behaves like one. Besides + - * /, unary -, comparisons
// and V(scalar), the headers use these functions on it, found by overload:
//
//   select(mask, a, b)   a where mask, else b          mask & mask, mask | mask, without(m, n) = m and not n
//   differs(a, b)        a < b or a > b: false where either is nan
//   lesser(a, b)         a < b ? a : b                 greater(a, b)   a > b ? a : b
//                        (both give b where a or b is nan: pass the datum last and nan survives)
//   fma(a, b, c)         a b + c                       abs, sqrt
//   exp(x)               e^x for any x                 exp_moderate(x)      e^x for -87 <= x <= 87
//   exp_parts(x)         e^x, e^x - 1, e^x - 1 - x for |x| <= 87
//   erf(x, gauss)        with gauss = e^(-x^2)         atan(x)
//   reciprocal(x)        1 / x for 1 <= x <= 1e37      times_one_less(x)    x (x - 1), precise at x -> 1
namespace GAC_NAMESPACE {

template <class V>
using MaskOf = decltype(V() < V());

// e^x, e^x - 1 and e^x - 1 - x, each to full relative precision where the lane type can.
template <class V>
struct ExpParts {
    V exp, minus_one, minus_one_minus_x;
};

template <class V>
GAC_INLINE V clamp(V x, V low, V high) {
    return lesser(high, greater(low, x));
}

}  // namespace GAC_NAMESPACE
