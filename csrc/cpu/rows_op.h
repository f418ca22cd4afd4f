#pragma once

#include <tuple>

#include "tensors.h"

namespace gac {

// The row primitives of gac_kernels; schemas, shapes and what is returned stand in gac_kernels/schemas.py.
using RowStatistics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using FusedResults = std::tuple<Tensor, Tensor, Tensor, Tensor>;

RowStatistics row_statistics(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, double scale,
    double softcap, double temperature_value, double beta, double smooth);

Tensor row_gradient(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
    Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
    double temperature_value, double beta, double smooth);

void row_gradient_(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits,
    Tensor normalizer, Tensor entropy, Tensor slope, OptionalTensor entropy_slope, double scale, double softcap,
    double temperature_value, double beta, double smooth);

RowStatistics fused_rows(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
    OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
    double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
    double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef);

FusedResults fused_rows_(
    Tensor logits, Tensor targets, Tensor kind, OptionalTensor temperature, OptionalTensor base_logits, Tensor weight,
    OptionalTensor advantages, OptionalTensor old_logprobs, OptionalTensor ref_logprobs, OptionalTensor rollout_weights,
    double scale, double softcap, double temperature_value, double beta, double smooth, int64_t policy, double p0,
    double p1, double p2, bool phi, double kl_coef, int64_t kl_estimator, bool kl_ratio_weighted, double entropy_coef);

}  // namespace gac
