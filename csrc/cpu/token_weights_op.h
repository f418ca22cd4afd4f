#pragma once

#include <tuple>

#include "../tensors.h"

namespace gac {

// gac_kernels::token_weights; schema and shapes stand in gac_kernels/schemas.py.
std::tuple<Tensor, Tensor, Tensor> token_weights(
    Tensor mask, OptionalTensor cu_seqlens, int64_t seq_len, Tensor is_expert, OptionalTensor advantages,
    bool token_advantages, Tensor mu, OptionalTensor policy_denominator, OptionalTensor supervised_denominator,
    int64_t aggregation, int64_t supervised_aggregation, double norm_length);

}  // namespace gac
