"""The operators served by the eager reference: the backend of every device without kernels, and what tests compare.

Each function takes the arguments of the schema of its name (``schemas.py``).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import reference
from .objectives import HybridObjective
from .reference.advantages import group_advantages as group_advantages
from .reference.controller import controller_step as controller_step
from .reference.gradients import accumulate_moments_ as accumulate_moments_
from .reference.gradients import gradient_moments as gradient_moments
from .schemas import decode
from .types import Denominators, TokenBatch


def token_loss(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor,
    advantages: Tensor | None, token_advantages: bool, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, entropy: Tensor | None, sum_sq: Tensor | None, supervised: Tensor | None,
    groups: Tensor | None, mu: Tensor, policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    *static: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch = _batch(
        mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages, groups, old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs, rollout_weights=rollout_weights,
    )  # fmt: skip
    denominators = Denominators(policy_denominator, supervised_denominator)
    return token_loss_of_batch(logprobs, batch, decode(*static), mu, entropy, sum_sq, supervised, denominators)


def token_loss_of_batch(
    logprobs: Tensor, batch: TokenBatch, objective: HybridObjective, mu: Tensor, entropy: Tensor | None,
    sum_sq: Tensor | None, supervised: Tensor | None, denominators: Denominators | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The results of ``token_loss`` for any objective: the one implementation of functions in Python."""
    out, slope, entropy_slope = reference.token_loss(
        logprobs, batch, objective, mu, entropy=entropy, sum_sq=sum_sq, denominators=denominators,
        supervised_loss_N=None if supervised is None else supervised.reshape(-1),
    )  # fmt: skip
    shape = logprobs.shape
    entropy_slope = slope.new_empty(0) if entropy is None else entropy_slope.view(shape)
    return out.loss, out.scalars, out.signals.rows, out.logprobs.view(shape).clone(), slope.view(shape), entropy_slope


def token_weights(
    mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, advantages: Tensor | None,
    token_advantages: bool, mu: Tensor, policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    *static: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    batch = _batch(mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages, None)
    objective = decode(0, 1.0, 1.0, 0.0, False, 0.0, 3, False, 0.0, *static)
    return reference.token_weights(batch, objective, mu, Denominators(policy_denominator, supervised_denominator))


def row_statistics(logits: Tensor, *rows: Any) -> tuple[Tensor, ...]:
    return reference.row_statistics(reference.Rows.of(logits, *rows))


def row_gradient(
    logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None, *static: Any,
) -> Tensor:  # fmt: skip
    rows = reference.Rows.of(logits, targets, kind, temperature, base_logits, *static)
    gradient_NV = reference.row_gradient(rows, normalizer, entropy, slope, entropy_slope)
    return gradient_NV.to(logits.dtype).view(logits.shape)


def row_gradient_(logits: Tensor, *rest: Any) -> None:
    logits.copy_(row_gradient(logits, *rest))


def fused_rows(
    logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    weight: Tensor, advantages: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, scale: float, softcap: float, temperature_value: float, beta: float, smooth: float,
    *term: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    static = scale, softcap, temperature_value, beta, smooth
    rows = reference.Rows.of(logits, targets, kind, temperature, base_logits, *static)
    logprobs, entropy, sum_sq, normalizer, supervised = reference.row_statistics(rows)
    objective = decode(*term)
    slope, entropy_slope = reference.token_slopes(
        logprobs, kind, weight, advantages, old_logprobs, ref_logprobs, rollout_weights, objective
    )
    bonus = entropy_slope if objective.entropy_coef else None
    gradient = reference.row_gradient(rows, normalizer, entropy, slope, bonus)
    return logprobs, entropy, sum_sq, supervised, gradient.to(logits.dtype).view(logits.shape)


def fused_rows_(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *results, gradient = fused_rows(logits, *rest)
    logits.copy_(gradient)
    return tuple(results)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    gradient.mul_(factor)


def _batch(
    mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, advantages: Tensor | None,
    token_advantages: bool, groups: Tensor | None, **tokens: Tensor | None,
) -> TokenBatch:  # fmt: skip
    shape = (is_expert.shape[0], seq_len) if cu_seqlens is None else (mask.numel(),)
    per_token = {name: None if value is None else value.view(shape) for name, value in tokens.items()}
    if token_advantages and advantages is not None:
        advantages = advantages.view(shape)
    return TokenBatch(
        targets=mask.view(shape), mask=mask.view(shape), cu_seqlens=cu_seqlens, is_expert=is_expert,
        advantages=advantages, groups=groups, **per_token,
    )  # fmt: skip
