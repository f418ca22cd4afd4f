"""The hybrid loss of ready log-probs: terms summed with their weights, metrics, and the controller's signals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..objectives import HybridObjective
from ..signals import Signals
from ..types import METRICS, Denominators, HybridLoss, TokenBatch
from .functions import policy_terms, supervised_terms
from .terms import Segments, Tokens, kl_terms, sequence_weights, squared_norm


@dataclass(frozen=True)
class _Terms:
    """Every term of a batch before it is summed; shared by the loss, its slope and the signals."""

    tokens: Tokens
    logp_N: Tensor
    expert_N: Tensor
    policy_N: Tensor  # value of the policy term, rollout weight included
    kl_N: Tensor
    entropy_N: Tensor
    supervised_N: Tensor
    cs_N: Tensor  # slope of the supervised term
    cr_N: Tensor  # slope of the policy branch as applied: policy term and KL
    policy_weight_S: Tensor
    expert_weight_S: Tensor
    seen: dict[str, Tensor]


def _terms(
    logprobs: Tensor, batch: TokenBatch, objective: HybridObjective, entropy: Tensor | None,
    denominators: Denominators | None, supervised_N: Tensor | None,
) -> _Terms:  # fmt: skip
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    tokens = Tokens.of(batch, dtype)
    expert_N = tokens.live_N & ~tokens.policy_N
    logp_N = torch.where(tokens.live_N, logprobs.reshape(-1).to(dtype), 0.0)
    kl_N = entropy_N = torch.zeros_like(logp_N)
    if entropy is not None:
        entropy_N = torch.where(tokens.live_N, entropy.reshape(-1).to(dtype), 0.0)
    known_N = None if entropy is None else entropy_N.detach()
    tokens, policy_logp_N = tokens.scored(logp_N, objective.kl_coef != 0)
    factor_N = tokens.factor_N
    if factor_N is not None:  # of a rollout; it is part of what the sequence-coupled terms sum
        of_policy_N = torch.where(tokens.policy_N, factor_N, 1.0)
        rollout_N = of_policy_N if tokens.rollout_N is None else tokens.rollout_N * of_policy_N
        tokens = replace(tokens, rollout_N=rollout_N)
    policy_N, cr_N, seen = policy_terms(policy_logp_N, tokens, objective, known_N)
    if tokens.ref_N is not None:
        kl_N, kl_slope_N = kl_terms(policy_logp_N, tokens, objective)
        kl_N = torch.where(tokens.ref_N.isfinite(), kl_N, 0.0)
        if factor_N is not None:
            kl_N, kl_slope_N = factor_N * kl_N, factor_N * kl_slope_N
        cr_N = cr_N + objective.kl_coef * kl_slope_N if objective.kl_coef else cr_N
    if factor_N is not None:
        entropy_N = factor_N * entropy_N
    if tokens.unknown_N is not None:
        of_rollouts = policy_N, cr_N, kl_N, entropy_N
        policy_N, cr_N, kl_N, entropy_N = (x.masked_fill(tokens.unknown_N, 0.0) for x in of_rollouts)
    value_N, cs_N = supervised_terms(logp_N, tokens, objective, known_N)
    supervised_N = value_N if supervised_N is None else supervised_N
    if factor_N is not None:
        cs_N = torch.where(expert_N, factor_N * cs_N, cs_N)
        supervised_N = torch.where(factor_N == 0, 0.0, factor_N * supervised_N)
    a_S, b_S = _branch_weights(tokens, objective, denominators)
    return _Terms(tokens, logp_N, expert_N, policy_N, kl_N, entropy_N, supervised_N, cs_N, cr_N, a_S, b_S, seen)


def _branch_weights(
    tokens: Tokens, objective: HybridObjective, denominators: Denominators | None
) -> tuple[Tensor, Tensor]:
    """Weight of a token of each sequence in the policy's and in the supervised loss; 0 in the other branch's."""
    segments, denominators = tokens.segments, denominators or Denominators()
    dtype, norm = tokens.advantages_N.dtype, _norm_length(objective, segments)
    policy_S = segments.sum(tokens.policy_N.to(dtype))
    expert_S = segments.sum((tokens.live_N & ~tokens.policy_N).to(dtype))
    return (
        sequence_weights(objective.aggregation, policy_S, norm, denominators.policy),
        sequence_weights(objective.supervised_aggregation, expert_S, norm, denominators.supervised),
    )


def _norm_length(objective: HybridObjective, segments: Segments) -> float | None:
    if "seq-mean-token-sum-norm" not in (objective.aggregation, objective.supervised_aggregation):
        return None
    return objective.norm_length or float(segments.length)


def hybrid_loss(
    logprobs: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    entropy: Tensor | None = None,
    sum_sq: Tensor | None = None,
    denominators: Denominators | None = None,
    supervised_loss_N: Tensor | None = None,
) -> HybridLoss:
    """:func:`gac_kernels.hybrid_loss` in eager PyTorch, differentiable by autograd in ``logprobs`` and ``entropy``.

    ``supervised_loss_N`` replaces the supervised term of each token (GIFT, whose term needs the logits).
    """
    t = _terms(logprobs, batch, objective, entropy, denominators, supervised_loss_N)
    return _summed(t, batch, objective, mu, entropy, sum_sq)


def _summed(
    t: _Terms,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    entropy: Tensor | None,
    sum_sq: Tensor | None,
) -> HybridLoss:
    segments, policy_N, logp_N = t.tokens.segments, t.tokens.policy_N, t.logp_N
    supervised_share, policy_share = _shares(mu, logp_N.dtype)

    def total(value_N: Tensor, weight_S: Tensor, where_N: Tensor) -> Tensor:
        return (segments.sum(torch.where(where_N, value_N, 0.0)) * weight_S).sum()

    policy, kl, ent = (total(value_N, t.policy_weight_S, policy_N) for value_N in (t.policy_N, t.kl_N, t.entropy_N))
    supervised = total(t.supervised_N, t.expert_weight_S, t.expert_N)
    metrics = _metrics(t)
    absent = torch.zeros_like(policy)
    scalars = (policy, supervised, kl, ent, *(metrics.get(name, absent) for name in METRICS))
    return HybridLoss(
        loss=(
            policy_share * (policy + objective.kl_coef * kl - objective.entropy_coef * ent)
            + supervised_share * supervised
        ),
        logprobs=logp_N.detach().view(batch.targets.shape),
        token_entropy=None
        if entropy is None
        else torch.where(batch.mask, entropy.detach().reshape(batch.mask.shape), 0.0),
        signals=_signals(t, objective, sum_sq),
        scalars=torch.stack(scalars).detach(),
        applicable=tuple(name for name in METRICS if name in metrics),
        batch=batch.read_by(objective),
    )


@torch.no_grad()
def token_loss(
    logprobs: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: Tensor,
    *,
    entropy: Tensor | None = None,
    sum_sq: Tensor | None = None,
    denominators: Denominators | None = None,
    supervised_loss_N: Tensor | None = None,
) -> tuple[HybridLoss, Tensor, Tensor]:
    """The loss with its gradients by the slopes written out, not by autograd: what the operator returns.

    Returns the HybridLoss, ``d loss / d logprobs`` and ``d loss / d entropy``, both flat ``(N,)``.
    """
    t = _terms(logprobs, batch, objective, entropy, denominators, supervised_loss_N)
    weight_N = _mixed(t.tokens, mu, t.policy_weight_S, t.expert_weight_S)
    a_N, b_N = torch.where(t.tokens.policy_N, weight_N, 0.0), torch.where(t.expert_N, weight_N, 0.0)
    slope_N = torch.where(t.tokens.policy_N, a_N * t.cr_N, 0.0) + torch.where(t.expert_N, b_N * t.cs_N, 0.0)
    out = _summed(t, batch, objective, mu, entropy, sum_sq)
    if t.tokens.factor_N is not None:
        a_N = a_N * t.tokens.factor_N
    if t.tokens.unknown_N is not None:
        a_N = a_N.masked_fill(t.tokens.unknown_N, 0.0)
    return out, slope_N, -objective.entropy_coef * a_N


def _shares(mu: float | Tensor, dtype: torch.dtype) -> tuple[float | Tensor, float | Tensor]:
    """What the supervised and the policy's branch count for: mu and 1 - mu, which a tensor of two holds already; else
    1 - mu is made before anything is rounded."""
    if not isinstance(mu, Tensor):
        return float(mu), 1.0 - float(mu)
    mu = mu.detach()
    if mu.numel() == 2:
        return mu[0].to(dtype), mu[1].to(dtype)
    return mu.reshape(()).to(dtype), (1.0 - mu.reshape(()).to(torch.promote_types(mu.dtype, dtype))).to(dtype)


def _mixed(tokens: Tokens, mu: Tensor, policy_S: Tensor, expert_S: Tensor) -> Tensor:
    """The weight of each token in the loss: ``(1 - mu) a_t`` or ``mu b_t``."""
    supervised_share, policy_share = _shares(mu, policy_S.dtype)
    weight_S = torch.where(tokens.expert_S, supervised_share * expert_S, policy_share * policy_S)
    return torch.where(tokens.live_N, tokens.segments.expand(weight_S), 0.0)


@torch.no_grad()
def token_weights(
    batch: TokenBatch, objective: HybridObjective, mu: Tensor, denominators: Denominators | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is known of each token before its log-prob is, each ``(N,)``: ``kind`` (uint8: 0 dead, 1 rollout, 2
    demonstration), its weight in the loss and its advantage."""
    tokens = Tokens.of(batch, mu.dtype)
    weight_N = _mixed(tokens, mu, *_branch_weights(tokens, objective, denominators))
    kind_N = tokens.live_N.to(torch.uint8) + (tokens.live_N & ~tokens.policy_N).to(torch.uint8)
    return kind_N, weight_N, tokens.advantages_N


def _metrics(t: _Terms) -> dict[str, Tensor]:
    policy_N, seen = t.tokens.policy_N, t.seen
    count = policy_N.sum().clamp(min=1)

    def mean(value_N: Tensor) -> Tensor:
        return torch.where(policy_N, value_N, 0.0).sum() / count

    metrics = {
        "ratio_mean": mean(seen["ratio"]),
        "ratio_max": torch.cat([torch.where(policy_N, seen["ratio"], 0.0), t.logp_N.new_zeros(1)]).amax().detach(),
        "approx_kl": mean(seen["log_ratio"].exp() - 1.0 - seen["log_ratio"]),
    }
    if "update" in seen:
        metrics["effective_update_ratio"] = mean(seen["update"])
    if "clipped" in seen:
        metrics["clip_fraction"] = mean(seen["clipped"].to(t.logp_N.dtype))
        metrics["effective_update_ratio"] = mean((~seen["clipped"]).to(t.logp_N.dtype))
    if "residual" in seen:
        metrics["cancellation_residual"] = seen["residual"]
    return metrics


def _signals(t: _Terms, objective: HybridObjective, sum_sq: Tensor | None) -> Signals:
    segments, live_N, policy_N = t.tokens.segments, t.tokens.live_N, t.tokens.policy_N
    logp_N, cs_N, cr_N = t.logp_N.detach(), t.cs_N, torch.where(policy_N, t.cr_N, 0.0)
    if sum_sq is None:
        n_N = torch.zeros_like(logp_N)
    else:
        n_N = squared_norm(logp_N, torch.where(live_N, sum_sq.detach().reshape(-1).to(logp_N.dtype), 0.0))
    own_N, diff_N = torch.where(policy_N, cr_N, cs_N), cs_N - cr_N
    count_S = segments.sum(live_N.to(logp_N.dtype))
    advantage_S = segments.sum(t.tokens.advantages_N) / count_S.clamp(min=1.0)
    columns = (
        -logp_N, None, diff_N.square(), cs_N, cr_N, cs_N.square(), cr_N.square(), cs_N * cr_N,
        own_N.square() * n_N, diff_N.square() * n_N,
    )  # fmt: skip
    sums = [advantage_S if c is None else segments.sum(torch.where(live_N, c, 0.0)) for c in columns]
    rows = torch.stack([(t.tokens.expert_S & (count_S > 0)).to(logp_N.dtype), count_S, *sums], dim=-1)
    return Signals(
        rows=rows,
        has_sum_sq=sum_sq is not None,
        policy_aggregation=objective.aggregation,
        supervised_aggregation=objective.supervised_aggregation,
        norm_length=_norm_length(objective, segments),
    )
