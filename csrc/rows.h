// The row primitives as their kernels see them: plain arrays, the same for every instruction set. No std templates here,
// because the units of all instruction sets include this file. Formulas and shapes: gac_kernels/schemas.py.
#pragma once

#include <stdint.h>

#include "token_loss.h"

#ifdef __CUDACC__
#define GAC_SHARED_INLINE __host__ __device__ __forceinline__
#else
#define GAC_SHARED_INLINE __attribute__((always_inline))
#endif

namespace gac {

enum class RowTask { kStatistics, kGradient, kFused };

enum class Element { kFloat, kBfloat16, kHalf, kDouble };

// Rows of a tensor (A, B, V) with stride 1 in V; strides in bytes. data is null where there are none.
struct Grid {
    char* data;
    int64_t inner, stride_outer, stride_inner;  // inner: B

    GAC_SHARED_INLINE char* row(int64_t n) const {
        return data + n / inner * stride_outer + n % inner * stride_inner;
    }
};

enum Kind : uint8_t { kDead = 0, kRollout = 1, kDemonstration = 2 };
constexpr int64_t kElsewhere = -(int64_t(1) << 31);  // a target in another shard of the vocabulary

// One call over N rows of V columns; T is what sums are made in. What does not apply is null.
template <class T>
struct RowsCall {
    int64_t columns;
    Grid logits, gradient, base;
    Element base_element;
    const void* targets;
    bool wide_targets;  // int64, else int32
    const uint8_t* kind;
    const T* temperature;  // one a row, else temperature_value
    double scale, softcap, temperature_value, beta, smooth;

    // Results, one a row; normalizer has 2 columns, or 4 with a base.
    T *logprobs, *entropy, *sum_sq, *normalizer, *supervised;

    // fused: the tokens.
    const T *weight, *advantage, *old, *reference, *rollout;
    TokenLossParameters term;

    // gradient: what the statistics gave, and the slopes.
    const T *given_normalizer, *given_entropy, *slope, *entropy_slope;
};

// Over the rows [begin, end). `scratch` belongs to the calling thread: a running maximum a block, and a block of base
// probabilities: columns / kBlock + 1 elements and kBlock more.
template <class T>
struct RowKernels {
    void (*statistics)(const RowsCall<T>&, int64_t begin, int64_t end, T* scratch);
    void (*gradient)(const RowsCall<T>&, int64_t begin, int64_t end, T* scratch);
    void (*fused)(const RowsCall<T>&, int64_t begin, int64_t end, T* scratch);
};

// A row is worked on in blocks of so many bytes, so that one and the next stay in the first-level cache.
constexpr int64_t kBlockBytes = 8192;

struct FloatRowKernels {
    RowKernels<float> of_float, of_bfloat16, of_half;
    // count elements of 16 bits *= factor, rounded once
    void (*scale_bfloat16)(char* data, int64_t count, double factor);
    void (*scale_half)(char* data, int64_t count, double factor);
};

#if defined(__x86_64__)
extern const FloatRowKernels row_kernels_avx512, row_kernels_avx2;
#endif
extern const FloatRowKernels row_kernels_portable;
extern const RowKernels<double> row_kernels_double;

}  // namespace gac
