// The row operators around their kernels: arguments checked, outputs made, rows shared out among threads.
#include "rows_op.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "isa.h"
#include "rows.h"

namespace gac {
namespace {

Element element_of(const Inputs& in, const char* name, const Tensor& tensor) {
    const int32_t dtype = dtype_of(tensor);
    if (dtype == aoti_torch_dtype_float32()) return Element::kFloat;
    if (dtype == aoti_torch_dtype_bfloat16()) return Element::kBfloat16;
    if (dtype == aoti_torch_dtype_float16()) return Element::kHalf;
    STD_TORCH_CHECK(
        dtype == aoti_torch_dtype_float64(), in.op, ": ", name,
        " must have dtype float16, bfloat16, float32 or float64");
    return Element::kDouble;
}

int64_t bytes_of(Element element) {
    return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

Grid grid_of(const Inputs& in, const char* name, const Tensor& tensor, Element element) {
    STD_TORCH_CHECK(tensor.is_cpu(), in.op, ": ", name, " must be on the CPU");
    STD_TORCH_CHECK(tensor.dim() == 3, in.op, ": ", name, " must have three dimensions (A, B, V)");
    STD_TORCH_CHECK(
        tensor.size(2) <= 1 || tensor.stride(2) == 1, in.op, ": ", name, " must have stride 1 in its last dimension");
    const int64_t bytes = bytes_of(element);
    return {
        static_cast<char*>(tensor.data_ptr()), std::max<int64_t>(1, tensor.size(1)), tensor.stride(0) * bytes,
        tensor.stride(1) * bytes};
}

template <class T>
const RowKernels<T>& kernels(Element element) {
    if constexpr (std::is_same_v<T, double>) {
        return row_kernels_double;
    } else {
        const FloatRowKernels* of = &row_kernels_portable;
#if defined(__x86_64__)
        if (isa() == Isa::kAvx2) of = &row_kernels_avx2;
        if (isa() == Isa::kAvx512) of = &row_kernels_avx512;
#endif
        return element == Element::kFloat ? of->of_float : element == Element::kBfloat16 ? of->of_bfloat16 : of->of_half;
    }
}

// function(begin, end, scratch) over the rows. Threads take the next few rows when they have done some: dead rows cost
// next to nothing. What a row yields depends on no other.
template <class T, class F>
void over_rows(int64_t rows, int64_t columns, const F& function) {
    constexpr int64_t kElementsWorthAThread = 32768;
    const int64_t scratch = columns / (kBlockBytes / 8) + 1 + kBlockBytes / 2;  // elements of 2 to 8 bytes
    const int64_t worth = rows * columns / kElementsWorthAThread;
    const int64_t threads = std::min<int64_t>({torch::stable::get_num_threads(), rows, worth});
    if (threads <= 1) {
        std::vector<T> own(static_cast<size_t>(scratch));
        return function(0, rows, own.data());
    }
    const int64_t range = std::max<int64_t>(1, std::min(rows / (8 * threads), kElementsWorthAThread / columns));
    std::atomic<int64_t> next{0};
    torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
        std::vector<T> own(static_cast<size_t>(scratch));
        for (int64_t begin; (begin = next.fetch_add(range)) < rows;)
            function(begin, std::min(begin + range, rows), own.data());
    });
}

// What every row operator is given.
struct Rows {
    Inputs in;
    const Tensor &logits, &targets, &kind;
    const OptionalTensor &temperature, &base_logits;
    double scale, softcap, temperature_value, beta, smooth;

    void check_dimensions() const {
        STD_TORCH_CHECK(logits.dim() == 3, in.op, ": logits must have three dimensions (A, B, V)");
    }
    int64_t count() const { return logits.size(0) * logits.size(1); }

    template <class T>
    RowsCall<T> call(Element element) const {
        check_dimensions();
        RowsCall<T> c{};
        const int64_t N = count();
        c.columns = logits.size(2);
        STD_TORCH_CHECK(c.columns > 0, in.op, ": logits must have at least one column");
        c.logits = grid_of(in, "logits", logits, element);
        if (base_logits) {
            c.base_element = element_of(in, "base_logits", *base_logits);
            STD_TORCH_CHECK(
                (c.base_element == Element::kDouble) == (element == Element::kDouble), in.op,
                ": base_logits must be float64 if and only if logits are");
            c.base = grid_of(in, "base_logits", *base_logits, c.base_element);
            for (int d = 0; d < 3; ++d)
                STD_TORCH_CHECK(
                    base_logits->size(d) == logits.size(d), in.op, ": base_logits must have the logits' shape");
        }
        c.wide_targets = dtype_of(targets) != aoti_torch_dtype_int32();
        c.targets = c.wide_targets ? static_cast<const void*>(in.data<int64_t>("targets", targets, N))
                                   : static_cast<const void*>(in.data<int32_t>("targets", targets, N));
        c.kind = in.data<uint8_t>("kind", kind, N);
        c.temperature = in.data<T>("temperature", temperature, N);
        c.scale = scale;
        c.softcap = softcap;
        c.temperature_value = temperature_value;
        c.beta = beta;
        c.smooth = smooth;
        return c;
    }
};

Tensor new_gradient(const Rows& rows) {
    rows.check_dimensions();
    const Tensor& logits = rows.logits;
    return empty({logits.size(0), logits.size(1), logits.size(2)}, dtype_of(logits));
}

template <class T>
RowStatistics per_row(const Rows& rows, RowsCall<T>& c, bool normalizer) {
    const int64_t N = rows.count(), columns = rows.base_logits ? 4 : 2;
    RowStatistics out{
        empty<T>({N}), empty<T>({N}), empty<T>({N}), empty<T>({normalizer ? N : 0, columns}),
        empty<T>({rows.base_logits ? N : 0})};
    c.logprobs = output<T>(std::get<0>(out));
    c.entropy = output<T>(std::get<1>(out));
    c.sum_sq = output<T>(std::get<2>(out));
    c.normalizer = normalizer ? output<T>(std::get<3>(out)) : nullptr;
    c.supervised = rows.base_logits ? output<T>(std::get<4>(out)) : nullptr;
    return out;
}

// work(T(), element) with T what sums are made in.
template <class F>
auto with_accumulator(const Rows& rows, const F& work) {
    const Element element = element_of(rows.in, "logits", rows.logits);
    return element == Element::kDouble ? work(double(), element) : work(float(), element);
}

void differentiate(
    const Rows& rows, const Tensor& normalizer, const Tensor& entropy, const Tensor& slope,
    const OptionalTensor& entropy_slope, const Tensor& gradient) {
    with_accumulator(rows, [&](auto zero, Element element) {
        using T = decltype(zero);
        RowsCall<T> c = rows.call<T>(element);
        const int64_t N = rows.count();
        c.gradient = grid_of(rows.in, "gradient", gradient, element);
        c.given_normalizer = rows.in.data<T>("normalizer", normalizer, N * (rows.base_logits ? 4 : 2));
        c.given_entropy = rows.in.data<T>("entropy", entropy, N);
        c.slope = rows.in.data<T>("slope", slope, N);
        c.entropy_slope = rows.in.data<T>("entropy_slope", entropy_slope, N);
        const auto& kernel = kernels<T>(element);
        over_rows<T>(N, c.columns, [&](int64_t b, int64_t e, T* scratch) { kernel.gradient(c, b, e, scratch); });
    });
}

struct TokenInputs {
    const Tensor& weight;
    const OptionalTensor &advantages, &old_logprobs, &ref_logprobs, &rollout_weights;
    TokenLossParameters term;
};

// `gradient` is the logits themselves in place.
FusedResults fuse(const Rows& rows, const TokenInputs& tokens, const Tensor& gradient) {
    return with_accumulator(rows, [&](auto zero, Element element) -> FusedResults {
        using T = decltype(zero);
        RowsCall<T> c = rows.call<T>(element);
        const int64_t N = rows.count();
        const RowStatistics out = per_row<T>(rows, c, false);
        c.gradient = grid_of(rows.in, "gradient", gradient, element);
        c.weight = rows.in.data<T>("weight", tokens.weight, N);
        c.advantage = rows.in.data<T>("advantages", tokens.advantages, N);
        c.old = rows.in.data<T>("old_logprobs", tokens.old_logprobs, N);
        c.reference = rows.in.data<T>("ref_logprobs", tokens.ref_logprobs, N);
        c.rollout = rows.in.data<T>("rollout_weights", tokens.rollout_weights, N);
        c.term = tokens.term;
        const auto& kernel = kernels<T>(element);
        over_rows<T>(N, c.columns, [&](int64_t b, int64_t e, T* scratch) { kernel.fused(c, b, e, scratch); });
        return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<4>(out)};
    });
}

TokenLossParameters term_of(
    const Inputs& in, int64_t policy, double p0, double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator,
    bool kl_ratio_weighted, double entropy_coef) {
    return {in.code("policy", policy, kSigmoid, kCispo), p0, p1, p2, phi, kl_coef,
            in.code("kl_estimator", kl_estimator, kK1, kK3), kl_ratio_weighted, entropy_coef};
}

}  // namespace

RowStatistics row_statistics(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, double scale,
    double softcap, double temperature_value, double beta, double smooth) {
    const Rows rows{{"row_statistics"}, logits, targets, kind, temperature, base_logits,
                    scale, softcap, temperature_value, beta, smooth};
    return with_accumulator(rows, [&](auto zero, Element element) {
        using T = decltype(zero);
        RowsCall<T> c = rows.call<T>(element);
        const RowStatistics out = per_row<T>(rows, c, true);
        const auto& kernel = kernels<T>(element);
        over_rows<T>(rows.count(), c.columns, [&](int64_t b, int64_t e, T* scratch) {
            kernel.statistics(c, b, e, scratch);
        });
        return out;
    });
}

Tensor row_gradient(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
    Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
    double temperature_value, double beta, double smooth) {
    const Rows rows{{"row_gradient"}, logits, targets, kind, temperature, base_logits,
                    scale, softcap, temperature_value, beta, smooth};
    const Tensor gradient = new_gradient(rows);
    differentiate(rows, normalizer, entropy, slope, entropy_slope, gradient);
    return gradient;
}

void row_gradient_(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
    Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
    double temperature_value, double beta, double smooth) {
    const Rows rows{{"row_gradient_"}, logits, targets, kind, temperature, base_logits,
                    scale, softcap, temperature_value, beta, smooth};
    differentiate(rows, normalizer, entropy, slope, entropy_slope, logits);
}

RowStatistics fused_rows(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
    OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
    double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
    double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef) {
    const Rows rows{{"fused_rows"}, logits, targets, kind, temperature, base_logits,
                    scale, softcap, temperature_value, beta, smooth};
    const Tensor gradient = new_gradient(rows);
    const FusedResults out = fuse(
        rows,
        {weight, advantages, old_logprobs, ref_logprobs, rollout_weights,
         term_of(rows.in, policy, p0, p1, p2, phi, kl_coef, kl_estimator, kl_ratio_weighted, entropy_coef)},
        gradient);
    return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out), gradient};
}

FusedResults fused_rows_(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
    OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
    double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
    double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef) {
    const Rows rows{{"fused_rows_"}, logits, targets, kind, temperature, base_logits,
                    scale, softcap, temperature_value, beta, smooth};
    return fuse(
        rows,
        {weight, advantages, old_logprobs, ref_logprobs, rollout_weights,
         term_of(rows.in, policy, p0, p1, p2, phi, kl_coef, kl_estimator, kl_ratio_weighted, entropy_coef)},
        logits);
}

}  // namespace gac
