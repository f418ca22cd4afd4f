// The operators around the kernels of the token-level loss and of the token weights: arguments checked, outputs made.
#include "token_loss_op.h"

#include "stream.h"

namespace gac::cuda {
namespace {

// `tokens`: the tensor whose elements they are, called `name`.
TokenSequences sequences_of(
    const Inputs& in, const char* name, const Tensor& tokens, const Tensor& mask, const OptionalTensor& cu_seqlens,
    int64_t seq_len, const Tensor& is_expert) {
    const int64_t N = tokens.numel(), S = is_expert.numel();
    STD_TORCH_CHECK(
        cu_seqlens || (seq_len >= 0 && (seq_len == 0 ? N == 0 : N % seq_len == 0 && N / seq_len == S)), in.op,
        ": without cu_seqlens, ", name, " must have S * seq_len elements, got ", N, " for S = ", S, " and seq_len = ",
        seq_len);
    return {N, S, seq_len, in.data<int64_t>("cu_seqlens", cu_seqlens, S + 1), in.data<uint8_t>("mask", mask, N),
            in.data<uint8_t>("is_expert", is_expert, S)};
}

template <class T>
BranchRule<T> rule(
    const Inputs& in, const char* name, int64_t aggregation, double norm_length, const char* denominator_name,
    const OptionalTensor& denominator) {
    return {in.code(name, aggregation, kTokenMean, kSeqMeanTokenSumNorm), norm_length,
            in.data<T>(denominator_name, denominator, 1)};
}

template <class T>
Mixing<T> mixing(const Inputs& in, const Tensor& mu) {
    const bool both = mu.numel() == 2;
    return {in.data<T>("mu", mu, both ? 2 : 1), both};
}

// Uninitialised memory of the device for `count` values of type V, whose size is a whole number of doubles.
template <class V>
Tensor workspace(int64_t count, Device device) {
    static_assert(sizeof(V) % sizeof(double) == 0 && alignof(V) <= sizeof(double));
    return empty<double>({count * static_cast<int64_t>(sizeof(V) / sizeof(double))}, device);
}

template <class V>
V* as(const Tensor& tensor) {
    return static_cast<V*>(tensor.mutable_data_ptr());
}

bool is_double(const Inputs& in, const char* name, const Tensor& tensor) {
    const int32_t dtype = dtype_of(tensor);
    STD_TORCH_CHECK(
        dtype == aoti_torch_dtype_float32() || dtype == aoti_torch_dtype_float64(), in.op, ": ", name,
        " must have dtype float32 or float64");
    return dtype == aoti_torch_dtype_float64();
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_loss(
    Tensor logprobs, Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert,
    OptionalTensor advantages, bool token_advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs,
    OptionalTensor rollout_weights, OptionalTensor entropy, OptionalTensor sum_sq, OptionalTensor supervised,
    OptionalTensor groups, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t policy, double p0, double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator,
    bool kl_ratio_weighted, double entropy_coef, int64_t aggregation, int64_t supervised_aggregation,
    double norm_length) {
    const Inputs in{"token_loss", &logprobs};
    const auto of = [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> {
        using T = decltype(zero);
        const Device device = device_of(logprobs);
        TokenLossCall<T> c{};
        c.batch = sequences_of(in, "logprobs", logprobs, mask, cu_seqlens, seq_len, is_expert);
        const int64_t N = c.batch.tokens, S = c.batch.sequences;
        const Tensor loss = empty<T>({}, device), scalars = empty<T>({kScalars}, device);
        const Tensor rows = empty<T>({S, kColumns}, device);
        const Tensor logprobs_out = empty_as(logprobs), slope = empty_as(logprobs);
        const Tensor entropy_slope = entropy ? empty_as(logprobs) : empty<T>({0}, device);
        const auto token = [&](const char* name, const OptionalTensor& tensor) { return in.data<T>(name, tensor, N); };
        c.parameters = {in.code("policy", policy, kSigmoid, kDfpo), p0, p1, p2, phi, kl_coef,
                        in.code("kl_estimator", kl_estimator, kK1, kK3), kl_ratio_weighted, entropy_coef};
        const bool dfpo = c.parameters.policy == kDfpo;
        STD_TORCH_CHECK(!dfpo || groups, "token_loss: groups must be given for DFPO");
        in.check_choices(dfpo, p0, p1);
        c.streams = {
            nullptr, in.data<T>("logprobs", logprobs, N), token("old_logprobs", old_logprobs),
            token("ref_logprobs", ref_logprobs), token("rollout_weights", rollout_weights), token("entropy", entropy),
            token("sum_sq", sum_sq), token("supervised", supervised),
            token_advantages ? token("advantages", advantages) : nullptr, output<T>(logprobs_out), output<T>(slope),
            entropy ? output<T>(entropy_slope) : nullptr};
        c.advantages = token_advantages ? nullptr : in.data<T>("advantages", advantages, S);
        c.groups = dfpo ? in.data<int64_t>("groups", groups, S) : nullptr;
        c.mixing = mixing<T>(in, mu);
        c.policy = rule<T>(in, "aggregation", aggregation, norm_length, "policy_denominator", policy_denominator);
        c.supervised = rule<T>(
            in, "supervised_aggregation", supervised_aggregation, norm_length, "supervised_denominator",
            supervised_denominator);
        c.loss = output<T>(loss);
        c.scalars = output<T>(scalars);
        c.rows = output<T>(rows);
        const int64_t at_least_one = S > 1 ? S : 1;
        const Tensor counts = workspace<SequenceCount>(at_least_one, device);
        const Tensor states = workspace<SequenceState>(at_least_one, device);
        c.counts = as<SequenceCount>(counts);
        c.states = as<SequenceState>(states);
        const OnDevice at(device);
        launch_token_loss(c, at.stream);
        return {loss, scalars, rows, logprobs_out, slope, entropy_slope};
    };
    return is_double(in, "logprobs", logprobs) ? of(double()) : of(float());
}

std::tuple<Tensor, Tensor, Tensor> token_weights(
    Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert, OptionalTensor advantages,
    bool token_advantages, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length) {
    const Inputs in{"token_weights", &mask};
    const auto of = [&](auto zero) -> std::tuple<Tensor, Tensor, Tensor> {
        using T = decltype(zero);
        const Device device = device_of(mask);
        TokenWeightsCall<T> c{};
        c.batch = sequences_of(in, "mask", mask, mask, cu_seqlens, seq_len, is_expert);
        const int64_t N = c.batch.tokens, S = c.batch.sequences;
        c.advantages = in.data<T>("advantages", advantages, token_advantages ? N : S);
        c.token_advantages = token_advantages && advantages;
        c.mixing = mixing<T>(in, mu);
        c.policy = rule<T>(in, "aggregation", aggregation, norm_length, "policy_denominator", policy_denominator);
        c.supervised = rule<T>(
            in, "supervised_aggregation", supervised_aggregation, norm_length, "supervised_denominator",
            supervised_denominator);
        const Tensor kind = empty({N}, aoti_torch_dtype_uint8(), device);
        const Tensor weight = empty<T>({N}, device), advantages_out = empty<T>({N}, device);
        c.kind = as<uint8_t>(kind);
        c.weight = output<T>(weight);
        c.advantages_out = output<T>(advantages_out);
        const Tensor counts = workspace<SequenceCount>(S > 1 ? S : 1, device);
        c.counts = as<SequenceCount>(counts);
        const OnDevice at(device);
        launch_token_weights(c, at.stream);
        return {kind, weight, advantages_out};
    };
    return is_double(in, "mu", mu) ? of(double()) : of(float());
}

}  // namespace gac::cuda
