#pragma once

#include <tuple>

#include "../tensors.h"
#include "token_weights.h"

namespace gac::cuda {

// gac_kernels::token_loss_cuda and token_weights_cuda; schemas, shapes and what is returned stand in
// gac_kernels/schemas.py.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_loss(
    Tensor logprobs, Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert,
    OptionalTensor advantages, bool token_advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs,
    OptionalTensor rollout_weights, OptionalTensor entropy, OptionalTensor sum_sq, OptionalTensor supervised,
    OptionalTensor groups, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t policy, double p0, double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator,
    bool kl_ratio_weighted, double entropy_coef, int64_t aggregation, int64_t supervised_aggregation,
    double norm_length);

std::tuple<Tensor, Tensor, Tensor> token_weights(
    Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert, OptionalTensor advantages,
    bool token_advantages, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length);

}  // namespace gac::cuda
