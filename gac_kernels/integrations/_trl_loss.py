"""The hybrid loss of one of TRL's micro-batches: TRL's tensors in, our loss out, divided as TRL divides.

Shapes: B rollouts and D demonstrations of a micro-batch, P prompt tokens, T tokens of the longest response.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..objectives import CISPO, DFPO, GIFT, GRPO, GSPO, SAPO, HybridObjective
from ..ops import hybrid_loss
from ..types import Denominators, HybridLoss, TokenBatch
from . import _trl_metrics

IDS, MASK, COUNT = "gac_demonstration_ids", "gac_demonstration_mask", "gac_demonstration_count"  # keys of TRL's batch
# What TRL computes by its loss type, and how it aggregates it.
_AGGREGATIONS = {
    "sapo": "seq-mean-token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
    "luspo": "seq-mean-token-sum",
}


def objective_of(trainer: Any) -> HybridObjective:
    """The trainer's own policy loss, with NLL-phi beside it. ValueError for a loss type that we do not have."""
    args, kind = trainer.args, trainer.loss_type
    if kind not in _AGGREGATIONS:
        raise ValueError(f"loss_type must be one of {', '.join(_AGGREGATIONS)} for a hybrid loss; got {kind!r}")
    policy: SAPO | CISPO | GRPO | GSPO
    if kind == "sapo":
        policy = SAPO("sigmoid", args.sapo_temperature_pos, args.sapo_temperature_neg)
    elif kind == "cispo":
        policy = CISPO(trainer.epsilon_high)
    elif trainer.importance_sampling_level == "sequence":
        if args.delta is not None:
            raise ValueError(f"delta must be None with importance_sampling_level='sequence', got {args.delta:g}")
        policy = GSPO(trainer.epsilon_low, trainer.epsilon_high)
    else:
        policy = GRPO(trainer.epsilon_low, trainer.epsilon_high, args.delta)
    return HybridObjective(
        policy,
        kl_coef=trainer.beta,
        kl_ratio_weighted=args.use_bias_correction_kl,
        aggregation=_AGGREGATIONS[kind],
        norm_length=float(trainer.max_completion_length) if kind == "dr_grpo" else None,
    )


def check_objective(trainer: Any, objective: HybridObjective) -> None:
    """ValueError for what the trainer's batches cannot serve, and for its options that would be ignored."""
    if isinstance(objective.policy, DFPO):
        raise ValueError(
            "objective.policy = DFPO couples the completions of a prompt, which TRL spreads over micro-batches: not "
            "supported here"
        )
    if isinstance(objective.supervised, GIFT):
        raise ValueError("objective.supervised = GIFT needs a base model's logits, which TRL's batches do not hold")
    if objective.kl_coef != trainer.beta:
        raise ValueError(f"objective.kl_coef must be the trainer's beta = {trainer.beta:g}, got {objective.kl_coef:g}")
    if objective.entropy_coef and trainer.entropy_coef:
        raise ValueError(
            f"objective.entropy_coef = {objective.entropy_coef:g} and the trainer's entropy_coef = "
            f"{trainer.entropy_coef:g} exclude each other, got both"
        )
    args = trainer.args
    level = trainer.importance_sampling_level
    by_sequence = isinstance(objective.policy, GSPO)
    by_token = by_sequence and objective.kl_coef != 0 and objective.kl_ratio_weighted  # TRL's: by the sequence's
    expected = {
        "importance_sampling_level": (level, level if by_sequence else "token"),
        "use_bias_correction_kl with sequence-level ratios": (by_token, False),
        "use_adaptive_entropy": (trainer.use_adaptive_entropy, False),
        "remove_unused_columns": (args.remove_unused_columns, False),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{name} is not supported with a hybrid loss: expected {wanted!r}, got {found!r}")


def micro_batch(
    trainer: Any, model: Any, inputs: dict[str, Any], objective: HybridObjective, mu: Tensor | float
) -> tuple[HybridLoss, Tensor]:
    """The loss of a micro-batch, scaled for accumulation and ranks as TRL scales its own; and what TRL logs of it."""
    if "pixel_values" in inputs:
        raise ValueError("images are not supported with a hybrid loss: the batch holds pixel_values")
    rows = _rows(inputs)
    logprobs, entropy, aux_loss = trainer._get_per_token_logps_and_entropies(
        model,
        rows["input_ids"],
        rows["attention_mask"],
        rows["targets"].shape[1],
        compute_entropy=True,
        compute_aux_loss=trainer.aux_loss_enabled,
    )
    mask, weights = _policy_weights(trainer, inputs, logprobs.detach(), entropy.detach())
    of_rollouts = {  # and what demonstrations get: a weight of one, and log-probs that are not read
        "old_logprobs": (inputs.get("old_per_token_logps"), 0.0),
        "ref_logprobs": (inputs.get("ref_per_token_logps"), 0.0),
        "rollout_weights": (weights, 1.0),
    }
    experts = len(rows["targets"]) - len(mask)
    batch = TokenBatch.from_padded(
        rows["targets"],
        rows["loss_mask"],
        is_expert_S=rows["is_expert"],
        advantages=rows["advantages"],
        **{name: _with_demonstrations(value, rows["targets"], experts, x) for name, (value, x) in of_rollouts.items()},
    )
    result = hybrid_loss(
        logprobs, batch, objective, mu, entropy=entropy, denominators=_denominators(trainer, inputs, objective, batch)
    )
    if trainer.entropy_coef:  # TRL's bonus is a mean over the micro-batch's tokens, whatever the loss divides by
        bonus = (entropy[: len(mask), : mask.shape[1]] * mask).sum() / mask.sum().clamp(min=1)
        share = trainer.entropy_coef / trainer.current_gradient_accumulation_steps
        result = replace(result, loss=result.loss - (1 - mu) * share * bonus)
    if trainer.aux_loss_enabled:  # of the whole model, whatever its branches weigh
        share = trainer.router_aux_loss_coef / trainer.current_gradient_accumulation_steps
        result = replace(result, loss=result.loss + share * aux_loss)
    return result, _trl_metrics.of_micro_batch(trainer, inputs, objective, result, entropy, aux_loss)


def _policy_weights(
    trainer: Any, inputs: dict[str, Any], logprobs: Tensor, entropy: Tensor
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """``(B, T)``: the rollouts' tokens that an entropy bonus acts on; and what multiplies a token's policy term but not
    its KL, ``(B, T)`` or ``(B, 1)``: the correction for the sampler, and TRL's two masks."""
    mask = inputs["completion_mask"]
    mask = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
    rollouts, length = mask.shape
    logprobs, entropy = logprobs[:rollouts, :length], entropy[:rollouts, :length]
    weights: Tensor | None = inputs.get("importance_sampling_ratio")
    if trainer.off_policy_mask_threshold is not None:
        advantages = inputs["advantages"]
        sampled = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        kept = trainer.get_off_policy_mask(
            advantages if advantages.dim() == 2 else advantages[:, None],
            logprobs,
            logprobs if sampled is None else sampled,
            mask,
            trainer.off_policy_mask_threshold,
        ).to(logprobs.dtype)
        weights = kept if weights is None else weights * kept
    if trainer.top_entropy_quantile < 1.0:
        chosen = trainer.get_high_entropy_mask(entropy, mask, 1 - trainer.top_entropy_quantile)
        weights = chosen.to(logprobs.dtype) if weights is None else weights * chosen
        mask = mask * chosen
    return mask, weights


def _rows(inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Rollouts and, below them, the demonstrations of this micro-batch: one forward pass serves both."""
    ids, mask = inputs["completion_ids"], inputs["completion_mask"]
    loss_mask = mask if "tool_mask" not in inputs else mask * inputs["tool_mask"]
    prompt_ids, prompt_mask, advantages = inputs["prompt_ids"], inputs["prompt_mask"], inputs["advantages"]
    experts = 0
    if IDS in inputs:
        has_one = inputs[MASK].any(dim=1)
        demonstrated, live = inputs[IDS][has_one], inputs[MASK][has_one]
        experts, length = len(live), max(ids.shape[1], live.shape[1])
        if experts:
            ids = torch.cat([_widened(ids, length), _widened(demonstrated, length)])
            loss_mask = torch.cat([_widened(loss_mask, length), _widened(live, length)])
            mask = torch.cat([_widened(mask, length), _widened(live, length)])
            prompt_ids = torch.cat([prompt_ids, prompt_ids[has_one]])
            prompt_mask = torch.cat([prompt_mask, prompt_mask[has_one]])
            if advantages.dim() == 2:
                advantages = _widened(advantages, length)
            advantages = torch.cat([advantages, advantages.new_zeros(experts, *advantages.shape[1:])])
    is_expert = torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
    is_expert[len(ids) - experts :] = True
    return {
        "input_ids": torch.cat([prompt_ids, ids], dim=1),
        "attention_mask": torch.cat([prompt_mask, mask], dim=1),
        "targets": ids,
        "loss_mask": loss_mask,
        "advantages": advantages,
        "is_expert": is_expert,
    }


def _widened(rows: Tensor, length: int) -> Tensor:
    """Zeros to the right; what they mean no mask lets through."""
    return pad(rows, (0, length - rows.shape[1]))


def _with_demonstrations(rollouts: Tensor | None, targets: Tensor, experts: int, fill: float) -> Tensor | None:
    """A tensor of the rollouts' tokens, shaped as all targets; demonstrations get ``fill``."""
    if rollouts is None:
        return None
    if rollouts.shape[1] == 1:  # one weight a sequence
        rollouts = rollouts.expand(-1, targets.shape[1])
    rollouts = _widened(rollouts, targets.shape[1])
    return torch.cat([rollouts, rollouts.new_full((experts, targets.shape[1]), fill)])


def _denominators(
    trainer: Any, inputs: dict[str, Any], objective: HybridObjective, batch: TokenBatch
) -> Denominators:  # fmt: skip
    """What TRL divides by. Ranks' gradients are averaged, so a count of all ranks is divided by their number."""
    accumulated = trainer.current_gradient_accumulation_steps
    # TRL counts over a generation batch, which an optimizer step takes this share of.
    share = accumulated / trainer.args.steps_per_generation / trainer.accelerator.num_processes
    policy: float | Tensor
    if objective.aggregation != "token-mean":
        policy = float(len(inputs["advantages"]) * accumulated)
    elif trainer.loss_type == "bnpo":  # each micro-batch by its own tokens
        policy = (batch.mask & ~batch.is_expert[:, None]).sum().clamp(min=1) * accumulated
    else:
        policy = inputs["num_items_in_batch"].clamp(min=1) * share
    return Denominators(policy=policy, supervised=inputs[COUNT].clamp(min=1) * share if COUNT in inputs else 1.0)
