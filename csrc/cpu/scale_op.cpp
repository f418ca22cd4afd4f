// The backward of a loss whose forward pass made the gradient: nothing to do when what comes from above is 1.
#include "scale_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "isa.h"
#include "../rows.h"

namespace gac {
namespace {

constexpr Inputs in{"scale_"};

// count elements by count elements, in T or, for 16 bits, in float32 and rounded once.
using Multiply = void (*)(char* data, int64_t count, double factor);

template <class T>
void multiply(char* data, int64_t count, double factor) {
    T* const x = reinterpret_cast<T*>(data);
    const T by = static_cast<T>(factor);
    for (int64_t i = 0; i < count; ++i) x[i] *= by;
}

const FloatRowKernels& float_kernels() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return row_kernels_avx512;
    if (isa() == Isa::kAvx2) return row_kernels_avx2;
#endif
    return row_kernels_portable;
}

}  // namespace

void scale_(Tensor gradient, Tensor factor) {
    const int32_t factor_dtype = dtype_of(factor), dtype = dtype_of(gradient);
    const bool wide = factor_dtype == aoti_torch_dtype_float64();
    const double by = wide ? *in.data<double>("factor", factor, 1)
                           : static_cast<double>(*in.data<float>("factor", factor, 1));
    if (by == 1 || gradient.numel() == 0) return;
    STD_TORCH_CHECK(gradient.is_cpu(), "scale_: gradient must be on the CPU");

    Multiply of;
    int64_t bytes = 2;
    if (dtype == aoti_torch_dtype_float32()) {
        of = multiply<float>;
        bytes = 4;
    } else if (dtype == aoti_torch_dtype_float64()) {
        of = multiply<double>;
        bytes = 8;
    } else if (dtype == aoti_torch_dtype_bfloat16()) {
        of = float_kernels().scale_bfloat16;
    } else {
        STD_TORCH_CHECK(dtype == aoti_torch_dtype_float16(), "scale_: gradient must be a floating point tensor");
        of = float_kernels().scale_half;
    }
    // Dense tensors are one row; else rows of (A, B, V), as the row operators take them.
    const bool dense = gradient.is_contiguous();
    STD_TORCH_CHECK(
        dense || (gradient.dim() == 3 && (gradient.size(2) <= 1 || gradient.stride(2) == 1)),
        "scale_: gradient must be contiguous, or (A, B, V) with stride 1 in V");
    if (dense)
        in.check_memory("gradient", gradient, gradient.numel(), bytes);
    else
        in.check_memory(
            "gradient", gradient,
            (gradient.size(0) - 1) * gradient.stride(0) + (gradient.size(1) - 1) * gradient.stride(1) + gradient.size(2),
            bytes);
    const int64_t outer = dense ? 1 : gradient.size(0), inner = dense ? 1 : gradient.size(1);
    const int64_t columns = dense ? gradient.numel() : gradient.size(2);
    const int64_t stride_outer = dense ? 0 : gradient.stride(0), stride_inner = dense ? 0 : gradient.stride(1);
    char* const data = static_cast<char*>(gradient.data_ptr());
    constexpr int64_t kPiece = 32768;  // elements a thread takes at a time
    const int64_t pieces = (columns + kPiece - 1) / kPiece, work = outer * inner * pieces;
    torch::stable::parallel_for(0, work, 4, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t row = i / pieces, first = i % pieces * kPiece;
            const int64_t offset = row / inner * stride_outer + row % inner * stride_inner + first;
            of(data + offset * bytes, std::min(kPiece, columns - first), by);
        }
    });
}

}  // namespace gac
