"""Eager formulas for everything the kernels compute: the oracle. Values only; autograd gives the slopes.

Works in whatever float dtype comes in (float64 is what tests compare against) and stands alone: no kernel, no
dispatch. Section numbers of comments are the order of the computation: token terms, aggregation, signals.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .objectives import CISPO, DFPO, GIFT, GRPO, GSPO, SAPO, Gate, HybridObjective
from .signals import Signals
from .types import Denominators, HybridLoss, TokenBatch

LOG_RATIO_BOUND = 20.0
METRICS = ("ratio_mean", "ratio_max", "approx_kl", "effective_update_ratio", "clip_fraction", "cancellation_residual")


# Gates f(u; tau), u = r - 1 --------------------------------------------------------------------------------------
def gate_value(gate: str | Gate, u: Tensor, tau: float) -> Tensor:
    """``f`` of a SAPO gate (arXiv 2511.20347 Eq. 4; arXiv 2602.19345v2), elementwise."""
    if isinstance(gate, Gate):
        return gate.value(u, tau)
    if gate == "sigmoid":
        return 4.0 / tau * torch.sigmoid(tau * u)
    if gate == "erf":
        return 1.0 + math.sqrt(math.pi / 2.0) / tau * torch.erf(tau * u / math.sqrt(2.0))
    if gate == "arctan":
        return 1.0 + torch.atan(tau * u) / tau
    return 1.0 + u / torch.sqrt(1.0 + (tau * u).square())


# Segments: one reduction and one broadcast, padded or packed -----------------------------------------------------
@dataclass(frozen=True)
class Segments:
    """Sums over, and broadcasts to, the tokens of each sequence of a batch whose token tensors are flat ``(N,)``."""

    count: int
    length: int | None
    ids_N: Tensor | None

    @classmethod
    def of(cls, batch: TokenBatch) -> Segments:
        if batch.cu_seqlens is None:
            return cls(batch.num_sequences, batch.targets.shape[1], None)
        position_N = torch.arange(batch.targets.shape[0], device=batch.targets.device)
        ids_N = torch.bucketize(position_N, batch.cu_seqlens[1:], right=True)
        return cls(batch.num_sequences, None, ids_N)

    def sum(self, value_N: Tensor) -> Tensor:
        if self.ids_N is None:
            return value_N.view(self.count, self.length).sum(-1)
        return value_N.new_zeros(self.count).index_add(0, self.ids_N, value_N)

    def expand(self, value_S: Tensor) -> Tensor:
        if self.ids_N is None:
            return value_S.repeat_interleave(self.length)
        return value_S.index_select(0, self.ids_N)


@dataclass(frozen=True)
class _Tokens:
    """A batch laid flat in one dtype. Dead places are replaced before any arithmetic, so that nothing leaks from them."""

    segments: Segments
    live_N: Tensor
    policy_N: Tensor
    advantages_N: Tensor
    old_N: Tensor | None
    ref_N: Tensor | None
    rollout_N: Tensor | None
    groups_S: Tensor | None
    expert_S: Tensor

    @classmethod
    def of(cls, batch: TokenBatch, dtype: torch.dtype) -> _Tokens:
        segments = Segments.of(batch)
        live_N = batch.mask.reshape(-1)
        policy_N = live_N & ~segments.expand(batch.is_expert)

        def flat(value: Tensor | None) -> Tensor | None:
            return None if value is None else torch.where(policy_N, value.reshape(-1).to(dtype), 0.0)

        advantages = batch.advantages
        if advantages is None:  # demonstrations only; a rollout row, were there one, must not pass for a zero
            advantages = torch.full((batch.num_sequences,), math.nan, device=live_N.device, dtype=dtype)
        if advantages.shape == batch.is_expert.shape and advantages.shape != batch.targets.shape:
            advantages = segments.expand(advantages)
        return cls(
            segments, live_N, policy_N, flat(advantages), flat(batch.old_logprobs), flat(batch.ref_logprobs),
            flat(batch.rollout_weights), batch.groups, batch.is_expert,
        )  # fmt: skip


# 1. Token terms --------------------------------------------------------------------------------------------------
def log_ratio(logp_N: Tensor, old_N: Tensor | None) -> Tensor:
    """``clamp(logp - old, -20, 20)``. On-policy the value is 0 and the slope alive."""
    if old_N is None:
        old_N = torch.where(logp_N.isinf(), 0.0, logp_N).detach()
    return (logp_N - old_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)


def _clip(ratio_N: Tensor, low: float, high: float) -> Tensor:
    return ratio_N.clamp(1.0 - low, 1.0 + high)


def _clipped(ratio_N: Tensor, adv_N: Tensor, low: float, high: float, delta: float | None = None) -> Tensor:
    """Where the clip of a surrogate has taken the gradient away."""
    hit_N = ((adv_N > 0) & (ratio_N > 1.0 + high)) | ((adv_N < 0) & (ratio_N < 1.0 - low))
    return hit_N if delta is None else hit_N | ((adv_N < 0) & (ratio_N > delta))


def transform_weights(objective: DFPO, weight_S: Tensor, adv_S: Tensor, groups_S: Tensor, member_S: Tensor) -> Tensor:
    """DFPO's group transform ``w -> w~`` (arXiv 2604.13088v1, Eq. 17 and 18) among the ``member_S`` sequences."""
    if not len(weight_S):
        return weight_S  # torch has no minimum over nothing
    same_SS = (groups_S[:, None] == groups_S[None, :]) & member_S[None, :]
    if objective.transform == "min_replace":
        return torch.where(same_SS, weight_S[None, :], math.inf).amin(-1)
    dot_S = torch.where(same_SS, (adv_S * weight_S)[None, :], 0.0).sum(-1)
    square_S = torch.where(same_SS, adv_S.square()[None, :], 0.0).sum(-1)
    return weight_S - torch.where(square_S > 0, dot_S / torch.where(square_S > 0, square_S, 1.0), 0.0) * adv_S


def _cancellation(force_S: Tensor, groups_S: Tensor, member_S: Tensor) -> Tensor:
    """Mean over groups of ``|sum_i A_i w~_i| / sum_i |A_i w~_i|``; groups where the denominator is 0 stay out."""
    force_S = torch.where(member_S, force_S, 0.0)
    same_SS = (groups_S[:, None] == groups_S[None, :]).to(force_S.dtype)
    total_S = same_SS @ force_S.abs()
    counted_S = member_S & (total_S > 0)
    residual_S = torch.where(counted_S, (same_SS @ force_S).abs() / torch.where(counted_S, total_S, 1.0), 0.0)
    share_S = counted_S / (same_SS @ counted_S.to(force_S.dtype)).clamp(min=1.0)  # each group weighs 1 in all
    return (residual_S * share_S).sum() / share_S.sum().clamp(min=1.0)


def policy_terms(logp_N: Tensor, tokens: _Tokens, objective: HybridObjective) -> tuple[Tensor, dict[str, Tensor]]:
    """The policy loss of each token before weights, and what the metrics need: ratio, update, clipped, residual."""
    policy, adv_N, segments = objective.policy, tokens.advantages_N, tokens.segments
    log_ratio_N = torch.where(tokens.policy_N, log_ratio(logp_N, tokens.old_N), 0.0)
    ratio_N = log_ratio_N.exp()
    seen: dict[str, Tensor] = {"ratio": ratio_N}
    if isinstance(policy, SAPO):
        with torch.enable_grad():
            u_N = ratio_N.detach().sub(1.0).requires_grad_()
            gate_N = _gate_by_sign(policy, u_N, adv_N)
            (seen["update"],) = torch.autograd.grad(gate_N.sum(), u_N)
        loss_N = -adv_N * _gate_by_sign(policy, ratio_N - 1.0, adv_N)
    elif isinstance(policy, GRPO):
        bounded_N = ratio_N if policy.delta is None else ratio_N.clamp(max=policy.delta)
        loss_N = -torch.minimum(bounded_N * adv_N, _clip(ratio_N, policy.clip_low, policy.clip_high) * adv_N)
        seen["clipped"] = _clipped(ratio_N, adv_N, policy.clip_low, policy.clip_high, policy.delta)
    elif isinstance(policy, CISPO):
        loss_N = -ratio_N.clamp(max=policy.clip_high).detach() * adv_N * logp_N
        seen["clipped"] = ratio_N > policy.clip_high
    else:
        count_S = segments.sum(tokens.policy_N.to(logp_N.dtype)).clamp(min=1.0)
        total_S = segments.sum(log_ratio_N)
        product = isinstance(policy, DFPO) and policy.ratio == "product"
        # A product of many ratios overflows float32; bounded like a single one, it stays usable by the group algebra.
        mean_S = total_S.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) if product else total_S / count_S
        weight_S = mean_S.exp()
        seen["ratio"] = segments.expand(weight_S)
        if isinstance(policy, GSPO):
            ratio_N = seen["ratio"]
            loss_N = -torch.minimum(ratio_N * adv_N, _clip(ratio_N, policy.clip_low, policy.clip_high) * adv_N)
            seen["clipped"] = _clipped(ratio_N, adv_N, policy.clip_low, policy.clip_high)
        else:
            member_S = segments.sum(tokens.policy_N.to(logp_N.dtype)) > 0
            adv_S = segments.sum(adv_N) / count_S
            new_S = transform_weights(policy, weight_S.detach(), adv_S, tokens.groups_S, member_S)
            seen["residual"] = _cancellation(adv_S * new_S, tokens.groups_S, member_S)
            loss_N = -segments.expand(torch.where(member_S, new_S, 0.0)) * adv_N * logp_N
    return loss_N, {name: value.detach() for name, value in seen.items()}


def _gate_by_sign(policy: SAPO, u_N: Tensor, adv_N: Tensor) -> Tensor:
    return torch.where(
        adv_N > 0, gate_value(policy.gate, u_N, policy.tau_pos), gate_value(policy.gate, u_N, policy.tau_neg)
    )


def kl_terms(logp_N: Tensor, tokens: _Tokens, objective: HybridObjective) -> Tensor:
    """The KL estimate of each token. The input is clamped, not the output, so that the gradient stays finite."""
    d_N = (tokens.ref_N - logp_N).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    kl_N = {"k1": lambda: -d_N, "k2": lambda: d_N.square() / 2, "k3": lambda: d_N.exp() - d_N - 1.0}
    value_N = kl_N[objective.kl_estimator]()
    return value_N * log_ratio(logp_N, tokens.old_N).exp() if objective.kl_ratio_weighted else value_N


def supervised_slope(logp_N: Tensor, objective: HybridObjective) -> Tensor:
    """``c_s``: ``-phi`` with ``phi = p (1 - p)`` (CHORD, arXiv 2508.11408), or -1; detached."""
    p_N = logp_N.detach().exp()
    phi = not isinstance(objective.supervised, GIFT) and objective.supervised.weight == "phi"
    return -p_N * (1.0 - p_N) if phi else -torch.ones_like(p_N)


# 2. Aggregation --------------------------------------------------------------------------------------------------
def sequence_weights(
    aggregation: str, count_S: Tensor, norm_length: float | None, denominator: float | Tensor | None
) -> Tensor:
    """The weight of every token of a sequence of one branch; ``count_S`` holds 0 for the other branch's."""
    member_S = count_S > 0
    own = count_S.sum() if aggregation == "token-mean" else member_S.sum().to(count_S.dtype)
    total = own if denominator is None else torch.as_tensor(denominator, dtype=count_S.dtype, device=count_S.device)
    per_S = torch.ones_like(count_S)
    if aggregation == "seq-mean-token-mean":
        per_S = torch.where(member_S, count_S, 1.0)
    elif aggregation == "seq-mean-token-sum-norm":
        per_S = per_S * norm_length
    return torch.where(member_S, 1.0 / (per_S * torch.where(member_S, total, 1.0)), 0.0)


# 3. The loss -----------------------------------------------------------------------------------------------------
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
    denominators = denominators or Denominators()
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    tokens = _Tokens.of(batch, dtype)
    segments, policy_N, expert_N = tokens.segments, tokens.policy_N, tokens.live_N & ~tokens.policy_N
    logp_N = torch.where(tokens.live_N, logprobs.reshape(-1).to(dtype), 0.0)
    mu = torch.as_tensor(mu, dtype=dtype, device=logp_N.device).detach()

    loss_N, seen = policy_terms(logp_N, tokens, objective)
    if tokens.rollout_N is not None:
        loss_N = tokens.rollout_N * loss_N
    zero_N = torch.zeros_like(logp_N)
    kl_N = zero_N if tokens.ref_N is None else kl_terms(logp_N, tokens, objective)
    if entropy is None:
        entropy_N = zero_N
    else:
        entropy_N = torch.where(policy_N, entropy.reshape(-1).to(dtype), 0.0)
    if supervised_loss_N is None:
        slope_N = supervised_slope(logp_N, objective)
        supervised_loss_N = slope_N * torch.where(slope_N == 0, 0.0, logp_N)  # phi logp is 0 at p = 0, never nan

    norm = None
    if "seq-mean-token-sum-norm" in (objective.aggregation, objective.supervised_aggregation):
        norm = objective.norm_length or segments.length
    policy_count_S, expert_count_S = segments.sum(policy_N.to(dtype)), segments.sum(expert_N.to(dtype))
    a_S = sequence_weights(objective.aggregation, policy_count_S, norm, denominators.policy)
    b_S = sequence_weights(objective.supervised_aggregation, expert_count_S, norm, denominators.supervised)

    def total(value_N: Tensor, weight_S: Tensor, where_N: Tensor) -> Tensor:
        return (segments.sum(torch.where(where_N, value_N, 0.0)) * weight_S).sum()

    policy, kl, ent = (total(value_N, a_S, policy_N) for value_N in (loss_N, kl_N, entropy_N))
    supervised = total(supervised_loss_N, b_S, expert_N)
    loss = (1.0 - mu) * (policy + objective.kl_coef * kl - objective.entropy_coef * ent) + mu * supervised
    shape = batch.targets.shape
    return HybridLoss(
        loss=loss,
        policy_loss=policy.detach(),
        supervised_loss=supervised.detach(),
        kl=kl.detach(),
        entropy=ent.detach(),
        logprobs=logp_N.detach().view(shape),
        token_entropy=None if entropy is None else torch.where(batch.mask, entropy.detach(), 0.0),
        signals=_signals(logp_N.detach(), tokens, objective, sum_sq, policy_slopes(logp_N, tokens, objective), norm),
        metrics=_metrics(seen, logp_N.detach(), tokens),
    )


def policy_slopes(logp_N: Tensor, tokens: _Tokens, objective: HybridObjective) -> Tensor:
    """``c_r``: the slope of the policy branch as applied to each token, before mu and the aggregation."""
    with torch.enable_grad():
        leaf_N = logp_N.detach().requires_grad_()
        value_N, _ = policy_terms(leaf_N, tokens, objective)
        if tokens.rollout_N is not None:
            value_N = tokens.rollout_N * value_N
        if tokens.ref_N is not None and objective.kl_coef:
            value_N = value_N + objective.kl_coef * kl_terms(leaf_N, tokens, objective)
        (slope_N,) = torch.autograd.grad(torch.where(tokens.policy_N, value_N, 0.0).sum(), leaf_N)
    return slope_N


def _metrics(seen: dict[str, Tensor], logp_N: Tensor, tokens: _Tokens) -> dict[str, Tensor]:
    policy_N = tokens.policy_N
    count = policy_N.sum().clamp(min=1)

    def mean(value_N: Tensor) -> Tensor:
        return torch.where(policy_N, value_N, 0.0).sum() / count

    log_ratio_N = torch.where(policy_N, log_ratio(logp_N, tokens.old_N), 0.0)
    metrics = {
        "ratio_mean": mean(seen["ratio"]),
        "ratio_max": torch.cat([torch.where(policy_N, seen["ratio"], 0.0), logp_N.new_zeros(1)]).amax(),
        "approx_kl": mean(log_ratio_N.exp() - 1.0 - log_ratio_N),
    }
    if "update" in seen:
        metrics["effective_update_ratio"] = mean(seen["update"])
    if "clipped" in seen:
        metrics["clip_fraction"] = mean(seen["clipped"].to(logp_N.dtype))
        metrics["effective_update_ratio"] = mean((~seen["clipped"]).to(logp_N.dtype))
    if "residual" in seen:
        metrics["cancellation_residual"] = seen["residual"]
    return metrics


# 4. Signals ------------------------------------------------------------------------------------------------------
def _signals(
    logp_N: Tensor, tokens: _Tokens, objective: HybridObjective, sum_sq: Tensor | None, cr_N: Tensor, norm: float | None
) -> Signals:
    segments, live_N, policy_N = tokens.segments, tokens.live_N, tokens.policy_N
    dtype = logp_N.dtype
    cs_N, cr_N = supervised_slope(logp_N, objective), torch.where(policy_N, cr_N, 0.0)
    if sum_sq is None:
        n_N = torch.zeros_like(logp_N)
    else:
        n_N = 1.0 - 2.0 * logp_N.exp() + torch.where(live_N, sum_sq.detach().reshape(-1).to(dtype), 0.0)
    own_N, diff_N = torch.where(policy_N, cr_N, cs_N), cs_N - cr_N
    count_S = segments.sum(live_N.to(dtype))
    advantage_S = segments.sum(tokens.advantages_N) / count_S.clamp(min=1.0)
    columns = (
        -logp_N, None, diff_N.square(), cs_N, cr_N, cs_N.square(), cr_N.square(), cs_N * cr_N,
        own_N.square() * n_N, diff_N.square() * n_N,
    )  # fmt: skip
    sums = [advantage_S if c is None else segments.sum(torch.where(live_N, c, 0.0)) for c in columns]
    rows = torch.stack([(tokens.expert_S & (count_S > 0)).to(dtype), count_S, *sums], dim=-1)
    return Signals(
        rows=rows,
        has_sum_sq=sum_sq is not None,
        policy_aggregation=objective.aggregation,
        supervised_aggregation=objective.supervised_aggregation,
        norm_length=norm,
    )
