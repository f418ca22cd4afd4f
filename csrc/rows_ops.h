// The row operators around their kernels, the same on every device: arguments checked, outputs made. Schemas, shapes and
// what is returned stand in gac_kernels/schemas.py.
#pragma once

#include <algorithm>
#include <tuple>

#include "rows.h"
#include "tensors.h"

namespace gac {

using RowStatistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using FusedResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

inline Element element_of(const Inputs& in, const char* name, const Tensor& tensor) {
    const int32_t dtype = dtype_of(tensor);
    if (dtype == aoti_torch_dtype_float32()) return Element::kFloat;
    if (dtype == aoti_torch_dtype_bfloat16()) return Element::kBfloat16;
    if (dtype == aoti_torch_dtype_float16()) return Element::kHalf;
    STD_TORCH_CHECK(
        dtype == aoti_torch_dtype_float64(), in.op, ": ", name,
        " must have dtype float16, bfloat16, float32 or float64");
    return Element::kDouble;
}

inline int64_t bytes_of(Element element) {
    return element == Element::kDouble ? 8 : element == Element::kFloat ? 4 : 2;
}

inline Grid grid_of(const Inputs& in, const char* name, const Tensor& tensor, Element element) {
    in.check_device(name, tensor);
    STD_TORCH_CHECK(tensor.dim() == 3, in.op, ": ", name, " must have three dimensions (A, B, V)");
    STD_TORCH_CHECK(
        tensor.size(2) <= 1 || tensor.stride(2) == 1, in.op, ": ", name, " must have stride 1 in its last dimension");
    const int64_t bytes = bytes_of(element);
    if (tensor.numel() > 0)
        in.check_memory(
            name, tensor,
            (tensor.size(0) - 1) * tensor.stride(0) + (tensor.size(1) - 1) * tensor.stride(1) + tensor.size(2), bytes);
    return {
        static_cast<char*>(tensor.data_ptr()), std::max<int64_t>(1, tensor.size(1)), tensor.stride(0) * bytes,
        tensor.stride(1) * bytes};
}

// What every row operator is given.
struct RowArguments {
    Inputs in;
    const Tensor &logits, &targets, &kind;
    const OptionalTensor &temperature, &base_logits;
    double scale, softcap, temperature_value, beta, smooth;

    void check_dimensions() const {
        STD_TORCH_CHECK(logits.dim() == 3, in.op, ": logits must have three dimensions (A, B, V)");
    }
    int64_t count() const { return logits.size(0) * logits.size(1); }
    Device device() const { return device_of(logits); }

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

inline Tensor new_gradient(const RowArguments& rows) {
    rows.check_dimensions();
    const Tensor& logits = rows.logits;
    return empty({logits.size(0), logits.size(1), logits.size(2)}, dtype_of(logits), rows.device());
}

template <class T>
RowStatistics per_row(const RowArguments& rows, RowsCall<T>& c, bool normalizer) {
    const int64_t N = rows.count(), columns = rows.base_logits ? 4 : 2;
    const Device device = rows.device();
    RowStatistics out{
        empty<T>({N}, device), empty<T>({N}, device), empty<T>({N}, device),
        empty<T>({normalizer ? N : 0, columns}, device), empty<T>({rows.base_logits ? N : 0}, device)};
    c.logprobs = output<T>(std::get<0>(out));
    c.entropy = output<T>(std::get<1>(out));
    c.sum_sq = output<T>(std::get<2>(out));
    c.normalizer = normalizer ? output<T>(std::get<3>(out)) : nullptr;
    c.supervised = rows.base_logits ? output<T>(std::get<4>(out)) : nullptr;
    return out;
}

// work(T(), element) with T what sums are made in.
template <class F>
auto with_accumulator(const RowArguments& rows, const F& work) {
    const Element element = element_of(rows.in, "logits", rows.logits);
    return element == Element::kDouble ? work(double(), element) : work(float(), element);
}

template <class Executor>
void differentiate(
    const RowArguments& rows, const Tensor& normalizer, const Tensor& entropy, const Tensor& slope,
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
        Executor::run(RowTask::kGradient, c, element, N, rows.device());
    });
}

struct TokenInputs {
    const Tensor& weight;
    const OptionalTensor &advantages, &old_logprobs, &ref_logprobs, &rollout_weights;
    TokenLossParameters term;
};

// `gradient` is the logits themselves in place.
template <class Executor>
FusedResults fuse(const RowArguments& rows, const TokenInputs& tokens, const Tensor& gradient) {
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
        Executor::run(RowTask::kFused, c, element, N, rows.device());
        return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<4>(out)};
    });
}

inline TokenLossParameters term_of(
    const Inputs& in, int64_t policy, double p0, double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator,
    bool kl_ratio_weighted, double entropy_coef) {
    return {in.code("policy", policy, kSigmoid, kCispo), p0, p1, p2, phi, kl_coef,
            in.code("kl_estimator", kl_estimator, kK1, kK3), kl_ratio_weighted, entropy_coef};
}

// The operators. Executor has `on_cpu`, and run(task, call, element, rows, device) for calls that sum in float and double.
template <class Executor>
struct RowOps {
    static RowStatistics row_statistics(
        Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, double scale,
        double softcap, double temperature_value, double beta, double smooth) {
        const RowArguments rows{{"row_statistics", Executor::on_cpu ? nullptr : &logits}, logits, targets, kind, temperature, base_logits,
                        scale, softcap, temperature_value, beta, smooth};
        return with_accumulator(rows, [&](auto zero, Element element) {
            using T = decltype(zero);
            RowsCall<T> c = rows.call<T>(element);
            const RowStatistics out = per_row<T>(rows, c, true);
            Executor::run(RowTask::kStatistics, c, element, rows.count(), rows.device());
            return out;
        });
    }

    static Tensor row_gradient(
        Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
        Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
        double temperature_value, double beta, double smooth) {
        const RowArguments rows{{"row_gradient", Executor::on_cpu ? nullptr : &logits}, logits, targets, kind, temperature, base_logits,
                        scale, softcap, temperature_value, beta, smooth};
        const Tensor gradient = new_gradient(rows);
        differentiate<Executor>(rows, normalizer, entropy, slope, entropy_slope, gradient);
        return gradient;
    }

    static void row_gradient_(
        Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
        Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
        double temperature_value, double beta, double smooth) {
        const RowArguments rows{{"row_gradient_", Executor::on_cpu ? nullptr : &logits}, logits, targets, kind, temperature, base_logits,
                        scale, softcap, temperature_value, beta, smooth};
        differentiate<Executor>(rows, normalizer, entropy, slope, entropy_slope, logits);
    }

    static RowStatistics fused_rows(
        Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
        OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
        double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
        double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef) {
        const RowArguments rows{{"fused_rows", Executor::on_cpu ? nullptr : &logits}, logits, targets, kind, temperature, base_logits,
                        scale, softcap, temperature_value, beta, smooth};
        const Tensor gradient = new_gradient(rows);
        const FusedResults out = fuse<Executor>(
            rows,
            {weight, advantages, old_logprobs, ref_logprobs, rollout_weights,
             term_of(rows.in, policy, p0, p1, p2, phi, kl_coef, kl_estimator, kl_ratio_weighted, entropy_coef)},
            gradient);
        return {std::get<0>(out), std::get<1>(out), std::get<2>(out), std::get<3>(out), gradient};
    }

    static FusedResults fused_rows_(
        Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
        OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
        double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
        double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef) {
        const RowArguments rows{{"fused_rows_", Executor::on_cpu ? nullptr : &logits}, logits, targets, kind, temperature, base_logits,
                        scale, softcap, temperature_value, beta, smooth};
        return fuse<Executor>(
            rows,
            {weight, advantages, old_logprobs, ref_logprobs, rollout_weights,
             term_of(rows.in, policy, p0, p1, p2, phi, kl_coef, kl_estimator, kl_ratio_weighted, entropy_coef)},
            logits);
    }
};

}  // namespace gac
