// The operator around the kernels: arguments checked, counts and weights of the branches, totals of the batch.
#include "token_loss_op.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <type_traits>
#include <vector>

#include "groups.h"
#include "isa.h"
#include "parallel.h"
#include "token_loss.h"

namespace gac {
namespace {

template <class T>
const TokenLossStages<T>& stages() {
    if constexpr (std::is_same_v<T, double>) {
        return token_loss_double;
    } else {
#if defined(__x86_64__)
        if (isa() == Isa::kAvx512) return token_loss_avx512;
        if (isa() == Isa::kAvx2) return token_loss_avx2;
#endif
        return token_loss_portable;
    }
}

// Arguments -------------------------------------------------------------------------------------------------------

struct Dtype {
    int32_t code;
    const char* name;
};

template <class T>
Dtype dtype_of() {
    if constexpr (std::is_same_v<T, float>) return {aoti_torch_dtype_float32(), "float32"};
    if constexpr (std::is_same_v<T, double>) return {aoti_torch_dtype_float64(), "float64"};
    if constexpr (std::is_same_v<T, int64_t>) return {aoti_torch_dtype_int64(), "int64"};
    if constexpr (std::is_same_v<T, uint8_t>) return {aoti_torch_dtype_bool(), "bool"};
}

int32_t dtype_of(const Tensor& tensor) {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
    return dtype;
}

// The data of a contiguous CPU tensor of `size` elements; bool comes as bytes.
template <class T>
const T* data(const char* name, const Tensor& tensor, int64_t size) {
    STD_TORCH_CHECK(tensor.is_cpu(), "token_loss: ", name, " must be on the CPU like logprobs");
    const Dtype expected = dtype_of<T>();
    STD_TORCH_CHECK(dtype_of(tensor) == expected.code, "token_loss: ", name, " must have dtype ", expected.name);
    STD_TORCH_CHECK(tensor.is_contiguous(), "token_loss: ", name, " must be contiguous");
    STD_TORCH_CHECK(
        tensor.numel() == size, "token_loss: ", name, " must have ", size, " elements, got ",
        tensor.numel());
    return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* data(const char* name, const OptionalTensor& tensor, int64_t size) {
    return tensor ? data<T>(name, *tensor, size) : nullptr;
}

template <class T>
Tensor empty(std::initializer_list<int64_t> sizes) {
    int64_t strides[2] = {1, 1};  // contiguous, of at most two dimensions
    if (sizes.size() == 2) strides[0] = sizes.begin()[1];
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
        static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype_of<T>().code, aoti_torch_device_type_cpu(), 0,
        &handle));
    return Tensor(handle);
}

// Shaped as `like`, which is contiguous and of the same dtype.
Tensor empty_as(const Tensor& like) {
    int64_t dims, *sizes, *strides;
    int32_t dtype;
    AtenTensorHandle handle;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(like.get(), &dims));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(like.get(), &sizes));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(like.get(), &strides));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

template <class T>
T* output(const Tensor& tensor) {
    return static_cast<T*>(tensor.mutable_data_ptr());
}

// Where each sequence begins: in [0, N] and never falling, whatever cu_seqlens holds.
std::vector<int64_t> sequence_bounds(const int64_t* offsets, int64_t sequences, int64_t seq_len, int64_t tokens) {
    std::vector<int64_t> bounds(static_cast<size_t>(sequences) + 1);
    int64_t last = 0;
    for (int64_t s = 0; s <= sequences; ++s)
        bounds[s] = last = offsets ? std::max(last, std::min(offsets[s], tokens)) : s * seq_len;
    return bounds;
}

// Totals ----------------------------------------------------------------------------------------------------------

struct Branch {
    int64_t tokens = 0, sequences = 0;  // with at least one live token
    int aggregation;
    double norm_length;
    std::optional<double> denominator;  // where one was given

    // The weight of every token of a sequence with `count` live tokens.
    double weight(int64_t count) const {
        const double own = static_cast<double>(aggregation == kTokenMean ? tokens : sequences);
        const double length = aggregation == kSeqMeanTokenMean      ? static_cast<double>(count)
                              : aggregation == kSeqMeanTokenSumNorm ? norm_length
                                                                    : 1.0;
        return 1.0 / (length * denominator.value_or(own));
    }
};

struct Totals {
    double scalars[kScalars] = {};
    double loss = 0;
};

template <class T>
Totals add_up(const TokenLoss<T>& p, const Branch& policy, const Branch& supervised, double mu, double residual) {
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
    out.loss = (1 - mu) * rollout + mu * total[kSupervisedLoss];
    return out;
}

// Everything between the arguments and the outputs, which `p` points to.
template <class T>
Totals run(TokenLoss<T>& p, int64_t tokens, Branch policy, Branch supervised, double mu, const int64_t* groups) {
    const size_t count = static_cast<size_t>(p.sequences);
    std::vector<int64_t> counts(count);
    std::vector<double> scale(count), sums(count * kSequenceSums);
    std::vector<SequenceCoupling> coupling;
    p.counts = counts.data();
    p.scale = scale.data();
    p.sums = reinterpret_cast<double(*)[kSequenceSums]>(sums.data());

    const TokenLossStages<T>& stage = stages<T>();
    const auto over_sequences = [&](auto function) {
        parallel(p.sequences, tokens, [&](int64_t begin, int64_t end) { function(p, begin, end); });
    };
    over_sequences(stage.count);
    for (int64_t s = 0; s < p.sequences; ++s) {
        Branch& branch = p.expert[s] ? supervised : policy;
        branch.tokens += counts[s];
        branch.sequences += counts[s] > 0;
    }
    for (int64_t s = 0; s < p.sequences; ++s)
        if (counts[s] > 0)
            scale[s] = p.expert[s] ? mu * supervised.weight(counts[s]) : (1 - mu) * policy.weight(counts[s]);

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
    return add_up(p, policy, supervised, mu, residual);
}

// The operator's arguments, whose meaning stands in gac_kernels/library.py.
struct Arguments {
    const Tensor &logprobs, &mask;
    const OptionalTensor& cu_seqlens;
    int64_t seq_len;
    const Tensor& is_expert;
    const OptionalTensor& advantages;
    bool token_advantages;
    const OptionalTensor &old_logprobs, &ref_logprobs, &rollout_weights, &entropy, &sum_sq, &groups;
    const Tensor& mu;
    const OptionalTensor &policy_denominator, &supervised_denominator;
    TokenLossParameters parameters;
    int aggregation, supervised_aggregation;
    double norm_length;
};

template <class T>
Branch branch(int aggregation, double norm_length, const char* name, const OptionalTensor& denominator) {
    Branch out{0, 0, aggregation, norm_length, std::nullopt};
    if (denominator) out.denominator = static_cast<double>(*data<T>(name, *denominator, 1));
    return out;
}

template <class T>
Outputs token_loss_of(const Arguments& a) {
    const int64_t N = a.logprobs.numel(), S = a.is_expert.numel();
    const int64_t* const offsets = data<int64_t>("cu_seqlens", a.cu_seqlens, S + 1);
    STD_TORCH_CHECK(
        offsets || (a.seq_len >= 0 && (a.seq_len == 0 ? N == 0 : N % a.seq_len == 0 && N / a.seq_len == S)),
        "token_loss: without cu_seqlens, logprobs must have S * seq_len elements, got ", N, " for S = ", S,
        " and seq_len = ", a.seq_len);
    const bool dfpo = a.parameters.policy == kDfpo;
    STD_TORCH_CHECK(!dfpo || a.groups, "token_loss: groups must be given for DFPO");

    const Tensor loss = empty<T>({}), scalars = empty<T>({kScalars}), rows = empty<T>({S, kColumns});
    const Tensor logprobs_out = empty_as(a.logprobs), slope = empty_as(a.logprobs);
    const Tensor entropy_slope = a.entropy ? empty_as(a.logprobs) : empty<T>({0});
    const std::vector<int64_t> bounds = sequence_bounds(offsets, S, a.seq_len, N);

    TokenLoss<T> p{};
    p.sequences = S;
    p.bounds = bounds.data();
    p.expert = data<uint8_t>("is_expert", a.is_expert, S);
    p.parameters = a.parameters;
    p.rows = output<T>(rows);
    p.advantages = a.token_advantages ? nullptr : data<T>("advantages", a.advantages, S);
    p.streams = {
        data<uint8_t>("mask", a.mask, N),
        data<T>("logprobs", a.logprobs, N),
        data<T>("old_logprobs", a.old_logprobs, N),
        data<T>("ref_logprobs", a.ref_logprobs, N),
        data<T>("rollout_weights", a.rollout_weights, N),
        data<T>("entropy", a.entropy, N),
        data<T>("sum_sq", a.sum_sq, N),
        a.token_advantages ? data<T>("advantages", a.advantages, N) : nullptr,
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
        p, N, branch<T>(a.aggregation, a.norm_length, "policy_denominator", a.policy_denominator),
        branch<T>(a.supervised_aggregation, a.norm_length, "supervised_denominator", a.supervised_denominator),
        static_cast<double>(*data<T>("mu", a.mu, 1)), dfpo ? data<int64_t>("groups", a.groups, S) : nullptr);
    *output<T>(loss) = static_cast<T>(totals.loss);
    std::copy(totals.scalars, totals.scalars + kScalars, output<T>(scalars));
    return {loss, scalars, rows, logprobs_out, slope, entropy_slope};
}

}  // namespace

Outputs token_loss(
    Tensor logprobs, Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert,
    OptionalTensor advantages, bool token_advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs,
    OptionalTensor rollout_weights, OptionalTensor entropy, OptionalTensor sum_sq, OptionalTensor groups, Tensor mu,
    OptionalTensor policy_denominator, OptionalTensor supervised_denominator, int64_t policy, double p0, double p1,
    double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length) {
    const auto code = [](const char* name, int64_t value, int low, int high) {
        STD_TORCH_CHECK(
            low <= value && value <= high, "token_loss: ", name, " must be in [", low, ", ", high, "], got ", value);
        return static_cast<int>(value);
    };
    const Arguments arguments{
        logprobs, mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages, old_logprobs, ref_logprobs,
        rollout_weights, entropy, sum_sq, groups, mu, policy_denominator, supervised_denominator,
        {code("policy", policy, kSigmoid, kDfpo), p0, p1, p2, phi, kl_coef,
         code("kl_estimator", kl_estimator, kK1, kK3), kl_ratio_weighted, entropy_coef},
        code("aggregation", aggregation, kTokenMean, kSeqMeanTokenSumNorm),
        code("supervised_aggregation", supervised_aggregation, kTokenMean, kSeqMeanTokenSumNorm), norm_length};
    const int32_t dtype = dtype_of(logprobs);
    if (dtype == aoti_torch_dtype_float64()) return token_loss_of<double>(arguments);
    STD_TORCH_CHECK(dtype == aoti_torch_dtype_float32(), "token_loss: logprobs must have dtype float32 or float64");
    return token_loss_of<float>(arguments);
}

}  // namespace gac
