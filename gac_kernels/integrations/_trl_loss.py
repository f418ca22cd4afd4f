"""The hybrid loss of one of TRL's micro-batches: TRL's tensors in, our loss out, divided as TRL divides.

Shapes: B rollouts and D demonstrations of a micro-batch, P prompt tokens, T tokens of the longest response.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..objectives import CISPO, DFPO, GIFT, GRPO, SAPO, HybridObjective
from ..ops import hybrid_loss
from ..types import Denominators, HybridLoss, TokenBatch

IDS, MASK, COUNT = "gac_demonstration_ids", "gac_demonstration_mask", "gac_demonstration_count"  # keys of TRL's batch
# What TRL computes by its loss type, and how it aggregates it.
_AGGREGATIONS = {
    "sapo": "seq-mean-token-mean",
    "grpo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
}


def objective_of(trainer: Any) -> HybridObjective:
    """The trainer's own policy loss, with NLL-phi beside it. ValueError for a loss type that we do not have."""
    args, kind = trainer.args, trainer.loss_type
    if kind not in _AGGREGATIONS:
        raise ValueError(f"loss_type must be one of {', '.join(_AGGREGATIONS)} for a hybrid loss; got {kind!r}")
    policy: SAPO | CISPO | GRPO
    if kind == "sapo":
        policy = SAPO("sigmoid", args.sapo_temperature_pos, args.sapo_temperature_neg)
    elif kind == "cispo":
        policy = CISPO(trainer.epsilon_high)
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
    args = trainer.args
    expected = {
        "importance_sampling_level": (trainer.importance_sampling_level, "token"),
        "top_entropy_quantile": (trainer.top_entropy_quantile, 1.0),
        "off_policy_mask_threshold": (trainer.off_policy_mask_threshold, None),
        "an entropy bonus (entropy_coef, use_adaptive_entropy)": (trainer._entropy_bonus_enabled, False),
        "the auxiliary loss of a mixture of experts (router_aux_loss_coef)": (trainer.aux_loss_enabled, False),
        "remove_unused_columns": (args.remove_unused_columns, False),
    }
    for name, (found, wanted) in expected.items():
        if found != wanted:
            raise ValueError(f"{name} is not supported with a hybrid loss: expected {wanted!r}, got {found!r}")


def micro_batch(
    trainer: Any, model: Any, inputs: dict[str, Any], objective: HybridObjective, mu: Tensor | float
) -> tuple[HybridLoss, TokenBatch, Tensor]:
    """The loss of a micro-batch, scaled for accumulation and ranks as TRL scales its own; its tokens, and entropies."""
    if "pixel_values" in inputs:
        raise ValueError("images are not supported with a hybrid loss: the batch holds pixel_values")
    rows = _rows(inputs)
    logprobs, entropy, _ = trainer._get_per_token_logps_and_entropies(
        model, rows["input_ids"], rows["attention_mask"], rows["targets"].shape[1], compute_entropy=True
    )
    demonstrations = len(rows["targets"]) - len(inputs["advantages"])
    batch = TokenBatch.from_padded(
        rows["targets"],
        rows["loss_mask"],
        is_expert_S=rows["is_expert"],
        advantages=rows["advantages"],
        **{
            name: _with_demonstrations(inputs.get(key), rows["targets"], demonstrations)
            for name, key in (
                ("old_logprobs", "old_per_token_logps"),
                ("ref_logprobs", "ref_per_token_logps"),
                ("rollout_weights", "importance_sampling_ratio"),
            )
        },
    )
    result = hybrid_loss(
        logprobs, batch, objective, mu, entropy=entropy, denominators=_denominators(trainer, inputs, objective, batch)
    )
    return result, batch, entropy.detach()


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


def _with_demonstrations(rollouts: Tensor | None, targets: Tensor, experts: int) -> Tensor | None:
    """A tensor of the rollouts' tokens, shaped as all targets. What demonstrations get is not read."""
    if rollouts is None:
        return None
    if rollouts.shape[1] == 1:  # one weight a sequence
        rollouts = rollouts.expand(-1, targets.shape[1])
    rollouts = _widened(rollouts, targets.shape[1])
    return torch.cat([rollouts, rollouts.new_zeros(experts, targets.shape[1])])


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
