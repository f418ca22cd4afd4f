// The operator around the kernels: arguments checked, counts and weights of the branches, totals of the batch.
#include "token_loss_op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "branches.h"
#include "groups.h"
#include "parallel.h"
#include "../token_loss.h"

namespace gac {
namespace {

// Totals ----------------------------------------------------------------------------------------------------------

struct Totals {
    double scalars[kScalars] = {};
    double loss = 0;
};

template <class T>
Totals add_up(const TokenLoss<T>& p, const Branch& policy, const Branch& supervised, Shares share, double residual) {
    Totals out;
    double* const total = out.scalars;
    for (int64_t s = 0; s < p.sequences; ++s) {
        if (p.counts[s] == 0) continue;
        const double* const sum = p.sums[s];
        if (p.expert[s]) {
            total[kSupervisedLoss] += supervised.weight(p.counts[s]) * sum[kSumLoss];
            continue;
        }
        const double weight = policy.weight(p.counts[s]);
        total[kPolicyLoss] += weight * sum[kSumLoss];
        total[kKl] += weight * sum[kSumKl];
        total[kEntropy] += weight * sum[kSumEntropy];
        total[kRatioMean] += sum[kSumRatio];
        if (!(sum[kMaxRatio] <= total[kRatioMax]) && !std::isnan(total[kRatioMax])) total[kRatioMax] = sum[kMaxRatio];
        total[kApproxKl] += sum[kSumApproxKl];
        total[kUpdateRatio] += sum[kSumUpdate];
        total[kClipFraction] += sum[kSumClipped];
    }
    const double tokens = static_cast<double>(std::max<int64_t>(policy.tokens, 1));
    for (int metric : {kRatioMean, kApproxKl, kUpdateRatio, kClipFraction}) total[metric] /= tokens;
    if (p.parameters.policy == kDfpo) total[kUpdateRatio] = 0;  // DFPO clips nothing and gates nothing
    total[kResidual] = residual;
    const double rollout =
        total[kPolicyLoss] + p.parameters.kl_coef * total[kKl] - p.parameters.entropy_coef * total[kEntropy];
    out.loss = share.policy * rollout + share.supervised * total[kSupervisedLoss];
    return out;
}

// Everything between the arguments and the outputs, which `p` points to.
template <class T>
Totals run(TokenLoss<T>& p, int64_t tokens, Branch policy, Branch supervised, Shares share, const int64_t* groups) {
    const size_t count = static_cast<size_t>(p.sequences);
    std::vector<int64_t> counts(count);
    std::vector<double> sums(count * kSequenceSums);
    std::vector<SequenceCoupling> coupling;
    p.counts = counts.data();
    p.sums = reinterpret_cast<double(*)[kSequenceSums]>(sums.data());

    const TokenLossStages<T>& stage = token_loss_stages<T>();
    const auto over_sequences = [&](auto function) {
        parallel(p.sequences, tokens, [&](int64_t begin, int64_t end) { function(p, begin, end); });
    };
    over_sequences(stage.count);
    std::vector<double> scale = token_scales(p.sequences, p.expert, p.counts, share, policy, supervised);
    p.scale = scale.data();

    double residual = 0;
    if (p.parameters.policy == kGspo || p.parameters.policy == kDfpo) {
        coupling.resize(count);
        p.coupling = coupling.data();
        over_sequences(stage.couple);
        if (p.parameters.policy == kDfpo)
            residual = transform_groups(
                groups, p.expert, p.counts, p.sequences, /*orthogonal=*/p.parameters.p0 != 0, p.coupling);
    }
    over_sequences(stage.evaluate);
    return add_up(p, policy, supervised, share, residual);
}

// The operator's arguments, whose meaning stands in gac_kernels/schemas.py.
struct Arguments {
    const Tensor &logprobs, &mask;
    const OptionalTensor& cu_seqlens;
    int64_t seq_len;
    const Tensor& is_expert;
    const OptionalTensor& advantages;
    bool token_advantages;
    const OptionalTensor &old_logprobs, &ref_logprobs, &rollout_weights, &entropy, &sum_sq, &supervised, &groups;
    const Tensor& mu;
    const OptionalTensor &policy_denominator, &supervised_denominator;
    TokenLossParameters parameters;
    int64_t aggregation, supervised_aggregation;
    double norm_length;
};

constexpr Inputs in{"token_loss"};

template <class T>
Outputs token_loss_of(const Arguments& a) {
    const int64_t N = a.logprobs.numel(), S = a.is_expert.numel();
    const int64_t* const offsets = in.data<int64_t>("cu_seqlens", a.cu_seqlens, S + 1);
    STD_TORCH_CHECK(
        offsets || (a.seq_len >= 0 && (a.seq_len == 0 ? N == 0 : N % a.seq_len == 0 && N / a.seq_len == S)),
        "token_loss: without cu_seqlens, logprobs must have S * seq_len elements, got ", N, " for S = ", S,
        " and seq_len = ", a.seq_len);
    const bool dfpo = a.parameters.policy == kDfpo;
    STD_TORCH_CHECK(!dfpo || a.groups, "token_loss: groups must be given for DFPO");
    in.check_choices(dfpo, a.parameters.p0, a.parameters.p1);

    const Tensor loss = empty<T>({}), scalars = empty<T>({kScalars}), rows = empty<T>({S, kColumns});
    const Tensor logprobs_out = empty_as(a.logprobs), slope = empty_as(a.logprobs);
    const Tensor entropy_slope = a.entropy ? empty_as(a.logprobs) : empty<T>({0});
    const std::vector<int64_t> bounds = sequence_bounds(offsets, S, a.seq_len, N);

    TokenLoss<T> p{};
    p.sequences = S;
    p.bounds = bounds.data();
    p.expert = in.data<uint8_t>("is_expert", a.is_expert, S);
    p.parameters = a.parameters;
    p.rows = output<T>(rows);
    p.advantages = a.token_advantages ? nullptr : in.data<T>("advantages", a.advantages, S);
    p.streams = {
        in.data<uint8_t>("mask", a.mask, N),
        in.data<T>("logprobs", a.logprobs, N),
        in.data<T>("old_logprobs", a.old_logprobs, N),
        in.data<T>("ref_logprobs", a.ref_logprobs, N),
        in.data<T>("rollout_weights", a.rollout_weights, N),
        in.data<T>("entropy", a.entropy, N),
        in.data<T>("sum_sq", a.sum_sq, N),
        in.data<T>("supervised", a.supervised, N),
        a.token_advantages ? in.data<T>("advantages", a.advantages, N) : nullptr,
        output<T>(logprobs_out),
        output<T>(slope),
        a.entropy ? output<T>(entropy_slope) : nullptr,
    };
    // Tokens that no sequence owns, before the first offset or after the last.
    for (T* out : {p.streams.logp_out, p.streams.slope, p.streams.entropy_slope}) {
        if (!out) continue;
        std::fill(out, out + bounds.front(), T(0));
        std::fill(out + bounds.back(), out + N, T(0));
    }

    const Totals totals = run(
        p, N,
        make_branch<T>(in, a.aggregation, a.norm_length, "policy_denominator", a.policy_denominator, "aggregation"),
        make_branch<T>(
            in, a.supervised_aggregation, a.norm_length, "supervised_denominator", a.supervised_denominator,
            "supervised_aggregation"),
        shares_of<T>(in, a.mu), dfpo ? in.data<int64_t>("groups", a.groups, S) : nullptr);
    *output<T>(loss) = static_cast<T>(totals.loss);
    std::copy(totals.scalars, totals.scalars + kScalars, output<T>(scalars));
    return {loss, scalars, rows, logprobs_out, slope, entropy_slope};
}

}  // namespace

Outputs token_loss(
    Tensor logprobs, Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert,
    OptionalTensor advantages, bool token_advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs,
    OptionalTensor rollout_weights, OptionalTensor entropy, OptionalTensor sum_sq, OptionalTensor supervised,
    OptionalTensor groups, Tensor mu,
    OptionalTensor policy_denominator, OptionalTensor supervised_denominator, int64_t policy, double p0, double p1,
    double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length) {
    const Arguments arguments{
        logprobs, mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages, old_logprobs, ref_logprobs,
        rollout_weights, entropy, sum_sq, supervised, groups, mu, policy_denominator, supervised_denominator,
        {in.code("policy", policy, kSigmoid, kDfpo), p0, p1, p2, phi, kl_coef,
         in.code("kl_estimator", kl_estimator, kK1, kK3), kl_ratio_weighted, entropy_coef},
        aggregation, supervised_aggregation, norm_length};
    const int32_t dtype = dtype_of(logprobs);
    if (dtype == aoti_torch_dtype_float64()) return token_loss_of<double>(arguments);
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "token_loss: logprobs must have dtype float32 or float64");
    return token_loss_of<float>(arguments);
}

}  // namespace gac
