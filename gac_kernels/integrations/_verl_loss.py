"""Our objectives as verl's policy losses: verl's arguments and settings in, our loss and verl's metrics out.

Shapes: S sequences of a micro-batch, T tokens of the longest response.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..objectives import CISPO, DFPO, GRPO, SAPO, HybridObjective, Policy
from ..ops import hybrid_loss
from ..types import Denominators, HybridLoss, TokenBatch
from .checks import release, version_of

OLDEST, BEFORE = "0.9", "0.10"
AGGREGATIONS = ("token-mean", "token-sum", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
_BATCH_INFO = ("dp_size", "batch_num_tokens", "global_batch_size", "loss_scale_factor")
_LOG_RATIO_BOUND = 20.0
_GSPO_BOUND = 10.0  # verl's bound on the log of a sequence's ratio


def check_version() -> None:
    """ImportError unless a verl is installed whose hooks are those that were read and tested."""
    version = version_of("verl")
    if version is None:
        raise ImportError("gac_kernels.integrations.verl needs verl: pip install 'gac-kernels[verl]'")
    if not release(OLDEST) <= release(version) < release(BEFORE):
        raise ImportError(f"gac_kernels.integrations.verl expects verl >= {OLDEST}, < {BEFORE}; found {version}")


# Settings -----------------------------------------------------------------------------------------------------
def _clips(config: Any) -> tuple[float, float]:
    low, high = config.clip_ratio_low, config.clip_ratio_high
    return config.clip_ratio if low is None else low, config.clip_ratio if high is None else high


def _extra(config: Any, name: str, default: Any) -> Any:
    """A setting that ``GACPolicyLossConfig`` adds; its default under verl's own PolicyLossConfig."""
    return getattr(getattr(config, "policy_loss", None), name, default)


def aggregation_of(mode: str, info: Mapping[str, Any]) -> tuple[str, float | None, float | Tensor | None]:
    """verl's ``agg_loss`` in our words: ``aggregation, norm_length, denominator`` (None: the batch's own count).

    verl divides by counts of all ranks and multiplies by their number, for gradients are averaged over ranks.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"loss_agg_mode must be one of {', '.join(AGGREGATIONS)}; got {mode!r}")
    if unknown := sorted(set(info) - set(_BATCH_INFO)):
        raise ValueError(f"global_batch_info may hold {', '.join(_BATCH_INFO)}; got {', '.join(unknown)}")
    ranks = info.get("dp_size", 1)
    if mode == "token-sum":
        return "token-mean", None, 1.0 / ranks
    name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
    count = info.get(name)
    if count is None and ranks > 1:
        raise ValueError(f"global_batch_info must hold {name} where dp_size > 1, got dp_size = {ranks}")
    scale = info.get("loss_scale_factor") if mode == "seq-mean-token-sum-norm" else None
    return mode, None if scale is None else float(scale), None if count is None else count / ranks


# Objectives: what each is with verl's settings, and the old log-probs that make ours compute what verl's does --------
def _grpo(config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    """verl's dual clip, ``min(-c A, .)`` where A < 0, is our bound on the ratio: with A > 0 the clip is below it."""
    low, high = _clips(config)
    bound = config.get("clip_ratio_c", 3.0)
    if not bound > 1.0 + high:
        raise ValueError(f"clip_ratio_c must exceed 1 + clip_ratio_high = {1.0 + high:g}, got {bound!r}")
    return GRPO(low, high, bound), old


def _sapo(config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    return SAPO(_extra(config, "gate", "sigmoid"), config.tau_pos, config.tau_neg), old


def _cispo(config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    """Ours bounds the weight from above. Its lower bound, as a weight has no gradient, is one on the old log-prob."""
    low, high = _clips(config)
    if low < 1.0:
        old = torch.minimum(old, logp.detach() - math.log1p(-low))
    return CISPO(1.0 + high), old


def _gspo(config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    """GSPO's token form (arXiv 2507.18071, section 4.3), as in verl: value ``s``, the slope of one's own token.

    Where advantages and rollout weights are one a sequence this is :class:`gac_kernels.GSPO`, gradient included.
    """
    low, high = _clips(config)
    live = mask.bool()
    counts = live.sum(-1, keepdim=True).clamp(min=1)
    mean = torch.where(live, logp.detach() - old, 0.0).sum(-1, keepdim=True) / counts
    return GRPO(low, high, max(math.exp(_GSPO_BOUND), 2.0 + high)), logp.detach() - mean


def _dfpo(config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    return DFPO(_extra(config, "transform", "min_replace"), _extra(config, "ratio", "geometric_mean")), old


_POLICIES: dict[str, Callable[..., tuple[Policy, Tensor]]] = {
    "gac_sapo": _sapo,
    "gac_grpo": _grpo,
    "gac_cispo": _cispo,
    "gac_gspo": _gspo,
    "gac_dfpo": _dfpo,
}
NAMES = tuple(_POLICIES)


def policy_of(name: str, config: Any, logp: Tensor, old: Tensor, mask: Tensor) -> tuple[Policy, Tensor]:
    """The objective of that name, and the old log-probs ``(S, T)`` to give it."""
    if name not in _POLICIES:
        raise ValueError(f"policy_loss.loss_mode must be one of {', '.join(NAMES)}; got {name!r}")
    return _POLICIES[name](config, logp, old, mask)


def groups_of(config: Any, rows: int, device: torch.device) -> Tensor:
    """``(S,)`` ids of groups that lie whole and in order in every micro-batch, which the settings must promise."""
    size = _extra(config, "group_size", None)
    if size is None:
        raise ValueError(
            "gac_dfpo needs policy_loss.group_size, the completions of a prompt (GACPolicyLossConfig): verl hands a "
            "policy loss no group ids, so that groups must lie whole and in order in each micro-batch "
            "(trainer.balance_batch=False)"
        )
    for name, found in (("use_dynamic_bsz", config.use_dynamic_bsz), ("shuffle", config.shuffle)):
        if found:
            raise ValueError(f"gac_dfpo needs {name}=False, for it breaks groups up; got {found!r}")
    if rows % size:
        raise ValueError(f"gac_dfpo: a micro-batch must hold whole groups of {size} sequences, got {rows} sequences")
    return torch.arange(rows, device=device) // size


# The registered losses ----------------------------------------------------------------------------------------
def policy_loss(
    name: str,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A policy loss as verl calls it, but for ``name``: that of one of ours, see ``NAMES``.

    Args:
        old_log_prob, log_prob, advantages, response_mask: ``(S, T)``.
        loss_agg_mode: one of verl's five; honoured by every objective (verl's own ``sapo`` takes
            ``seq-mean-token-mean`` whatever is set).
        config: verl's ActorConfig: ``clip_ratio*``, ``tau_pos``, ``tau_neg``, ``global_batch_info`` and
            ``policy_loss``, whose further fields are those of ``GACPolicyLossConfig``.
        rollout_is_weights: ``(S, T)``; multiply the policy term.

    Returns:
        The 0-d loss, and verl's metrics.

    Raises:
        TypeError, ValueError: naming the argument or the setting, what was expected and what came.
    """
    if config is None:
        raise ValueError("config must be verl's ActorConfig, got None")
    if _extra(config, "hybrid", False):
        raise ValueError(
            "policy_loss.hybrid=True: a policy loss never sees which rows are demonstrations, and the hybrid loss is "
            "not in its place; set VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl_hybrid or attach(worker)"
        )
    aggregation, norm_length, denominator = aggregation_of(loss_agg_mode, config.global_batch_info)
    policy, old = policy_of(name, config, log_prob, old_log_prob, response_mask)
    batch = TokenBatch.from_padded(
        response_mask.long(),  # a loss of log-probs reads no ids
        response_mask,
        advantages=advantages,
        old_logprobs=old,
        rollout_weights=rollout_is_weights,
        groups=groups_of(config, len(log_prob), log_prob.device) if isinstance(policy, DFPO) else None,
    )
    result = hybrid_loss(
        log_prob,
        batch,
        HybridObjective(policy, aggregation=aggregation, norm_length=norm_length),
        0.0,
        denominators=Denominators(policy=denominator),
    )
    seen = policy_metrics(name, config, log_prob, old_log_prob, batch, result)
    return result.loss, dict(zip(seen, torch.stack(list(seen.values())).tolist(), strict=True))


LOSSES = {name: partial(policy_loss, name) for name in NAMES}


@torch.no_grad()
def policy_metrics(
    name: str, config: Any, logp: Tensor, old: Tensor, batch: TokenBatch, result: HybridLoss
) -> dict[str, Tensor]:
    """0-d tensors: what verl's own losses report, over live rollout tokens, and the metrics that are ours."""
    live = batch.mask & ~batch.is_expert[:, None]
    count = live.sum().clamp(min=1)
    assert batch.advantages is not None
    positive, negative = batch.advantages > 0, batch.advantages < 0

    def mean(value: Tensor) -> Tensor:
        return torch.where(live, value, 0.0).sum() / count

    log_ratio = (logp - old).clamp(-_LOG_RATIO_BOUND, _LOG_RATIO_BOUND)
    ratio = log_ratio.exp()
    if name == "gac_gspo":
        per_sequence = live.sum(-1, keepdim=True).clamp(min=1)
        ratio = (torch.where(live, logp - old, 0.0).sum(-1, keepdim=True) / per_sequence).exp()
    clipped = below = torch.zeros_like(live)
    if name in ("gac_grpo", "gac_gspo", "gac_cispo"):
        low, high = _clips(config)
        under, over = ratio < 1.0 - low, ratio > 1.0 + high
        clipped = under | over if name == "gac_cispo" else (negative & under) | (positive & over)
    if name == "gac_grpo":
        below = negative & (ratio > config.get("clip_ratio_c", 3.0))
    seen = {
        "actor/pg_clipfrac": mean(clipped.float()),
        "actor/ppo_kl": mean(-log_ratio),
        "actor/pg_clipfrac_lower": mean(below.float()),
    }
    if name == "gac_sapo":
        seen["gac/effective_update_ratio"] = result.metrics["effective_update_ratio"]
    if name == "gac_dfpo":
        seen["gac/cancellation_residual"] = result.metrics["cancellation_residual"]
    return {key: value.float() for key, value in seen.items()}
