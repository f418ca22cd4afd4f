"""What stock TRL logs of its own loss, computed of ours: the same names, the same values with mu = 0.

TRL reads each number from the device where it arises, some ten times a micro-batch. Here a micro-batch leaves one small
tensor, and a step reads those of all ranks at once.

Shapes: B rollouts of T tokens.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives import CISPO, GRPO, GSPO, HybridObjective
from ..types import HybridLoss

_BOUND = 20.0  # of a log-ratio, as in the loss


class Numbers(NamedTuple):
    """Of a micro-batch on one rank: sums with what they are divided by, and two extremes."""

    entropy: float
    tokens: float
    kl: float
    kl_count: float
    low: float
    high: float
    clipped: float
    clip_count: float
    policy_loss: float
    aux_loss: float
    low_min: float
    high_max: float


@torch.no_grad()
def of_micro_batch(
    trainer: Any,
    inputs: dict[str, Any],
    objective: HybridObjective,
    result: HybridLoss,
    entropy: Tensor,
    aux_loss: Tensor | None,
) -> Tensor:
    """``Numbers`` as a float64 tensor on the device. ``result`` and ``entropy`` may hold demonstrations' rows below."""
    mask = inputs["completion_mask"]
    mask = (mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]).double()
    rollouts, length = mask.shape
    logp = result.logprobs[:rollouts, :length].double()
    old = inputs.get("old_per_token_logps")
    log_ratio = torch.where(mask > 0, 0.0 if old is None else (logp - old).clamp(-_BOUND, _BOUND), 0.0)
    advantages = inputs["advantages"]
    advantages = advantages if advantages.dim() == 2 else advantages[:, None]

    def total(value: Tensor) -> tuple[Tensor, Tensor]:
        """One a token, or ``(B, 1)`` one a sequence: its sum and its count."""
        if value.shape[1] == 1 != length:
            return value.sum(), mask.new_full((), rollouts)
        return torch.where(mask > 0, value, 0.0).sum(), mask.sum()

    zero, absent = mask.new_zeros(()), mask.new_full((), math.nan)
    kl = (zero, zero)
    if trainer.beta != 0.0:
        kl = total(_kl(logp, inputs["ref_per_token_logps"], log_ratio, objective))
    low = high = clipped = clip_count = zero
    extremes = (absent, absent)
    if isinstance(objective.policy, (GRPO, GSPO, CISPO)):
        below, above = _clipped(log_ratio, mask, advantages, objective.policy)
        (low, clip_count), (high, _), (clipped, _) = total(below), total(above), total(below + above)
        lowest = _extreme(_by_sequence(below, mask), torch.amin, math.inf)
        extremes = (lowest, _extreme(_by_sequence(above, mask), torch.amax, -math.inf))
    # TRL tells a mean over the micro-batch, or what it adds to the sum over the step.
    whole_step = objective.aggregation == "token-mean" and trainer.loss_type != "bnpo"
    share = 1.0 if whole_step else float(trainer.current_gradient_accumulation_steps)
    numbers = (  # as Numbers names them
        *total(entropy[:rollouts, :length].double()), *kl, low, high, clipped, clip_count,
        share * (result.policy_loss + objective.kl_coef * result.kl), zero if aux_loss is None else aux_loss, *extremes,
    )  # fmt: skip
    return torch.stack([torch.as_tensor(value, device=mask.device).double() for value in numbers])


def _kl(logp: Tensor, ref: Tensor, log_ratio: Tensor, objective: HybridObjective) -> Tensor:
    d = (ref - logp).clamp(-_BOUND, _BOUND)
    value = {"k1": -d, "k2": d.square() / 2}.get(objective.kl_estimator, d.exp() - d - 1)
    return value * log_ratio.exp() if objective.kl_ratio_weighted else value


def _clipped(
    log_ratio: Tensor, mask: Tensor, advantages: Tensor, policy: GRPO | GSPO | CISPO
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """0 or 1 where the ratio is below its bound with a negative advantage, and above it with a positive one."""
    if isinstance(policy, GSPO):
        log_ratio = log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    ratio = log_ratio.exp()
    if isinstance(policy, CISPO):
        return torch.zeros_like(ratio), ((ratio > policy.clip_high) & (advantages > 0)).double()
    if isinstance(policy, GRPO) and policy.delta is not None:
        ratio = ratio.clamp(max=policy.delta)
    below = (ratio < 1 - policy.clip_low) & (advantages < 0)
    return below.double(), ((ratio > 1 + policy.clip_high) & (advantages > 0)).double()


def _by_sequence(value: Tensor, mask: Tensor) -> Tensor:
    """``(B,)`` means; nan for a sequence without tokens, as TRL has it."""
    if value.shape[1] == 1 != mask.shape[1]:
        return value[:, 0]
    return (value * mask).sum(-1) / mask.sum(-1)


def _extreme(value: Tensor, reduce: Any, other: float) -> Tensor:
    found: Tensor = reduce(value.nan_to_num(nan=other))
    return torch.where(value.isnan().all(), math.nan, found)


def log(trainer: Any, objective: HybridObjective, micro_batches: list[Tensor]) -> None:
    """Into the trainer's metrics, as many values a name as there were micro-batches, over all ranks."""
    gathered = trainer.accelerator.gather(torch.stack(micro_batches)[None])  # (ranks, micro-batches, numbers)
    for ranks in gathered.transpose(0, 1).tolist():
        for name, value in _named(trainer, objective, [Numbers(*numbers) for numbers in ranks]).items():
            trainer._metrics["train"][name].append(value)


def _named(trainer: Any, objective: HybridObjective, ranks: list[Numbers]) -> dict[str, float]:
    """Of one micro-batch, from all ranks' numbers."""

    def ratio(part: str, whole: str) -> float:
        return sum(getattr(one, part) for one in ranks) / max(sum(getattr(one, whole) for one in ranks), 1.0)

    def mean(name: str) -> float:
        return sum(getattr(one, name) for one in ranks) / len(ranks)

    named = {"entropy": ratio("entropy", "tokens")}
    if trainer.entropy_coef:
        named["policy_loss"] = mean("policy_loss")
    if trainer.aux_loss_enabled:
        named["aux_loss"] = mean("aux_loss")
    if trainer.beta != 0.0:
        named["kl"] = ratio("kl", "kl_count")
    if isinstance(objective.policy, CISPO):
        named["cispo_clip_ratio"] = ratio("clipped", "clip_count")
    elif isinstance(objective.policy, (GRPO, GSPO)):
        parts = (("low_mean", "low"), ("high_mean", "high"), ("region_mean", "clipped"))
        named |= {f"clip_ratio/{name}": ratio(part, "clip_count") for name, part in parts}
        seen = [one for one in ranks if not math.isnan(one.low_min)]
        named["clip_ratio/low_min"] = min((one.low_min for one in seen), default=math.nan)
        named["clip_ratio/high_max"] = max((one.high_max for one in seen), default=math.nan)
    return named
