// Sums over lists of gradients as their kernels see them. No torch and no CUDA headers. What is summed, and in which
// shapes: gac_kernels/gradients.py.
#pragma once

#include <stdint.h>

#include "rows.h"

namespace gac {

// A chunk's partial sums are made by one thread or one block, and added up in the chunks' order: nothing depends on how
// many there are. Chunks do not go beyond a tensor.
constexpr int64_t kMomentsChunk = 32768;
constexpr int64_t moments_chunks(int64_t size) { return (size + kMomentsChunk - 1) / kMomentsChunk; }

struct GradientPair {
    const void* gradient;
    void* other;         // the second list's gradient, or the running sum that the first is added to
    int64_t size;        // elements of both
    int64_t first;       // number of its first chunk among all
    Element element;     // of the gradient, and of the second list's
    bool wide_sum;       // the running sum is double, else float
};

struct MomentsCall {
    const GradientPair* pairs;
    int64_t count, chunks;
    bool accumulate;   // other += gradient
    double* partials;  // (chunks, sums())
    double* out;       // (sums(),)

    // ||gradient||^2, and for two lists ||other||^2 and <gradient, other>.
    int sums() const { return accumulate ? 1 : 3; }
};

}  // namespace gac
