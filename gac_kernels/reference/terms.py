"""Token terms and aggregation weights. Every term gives its value, differentiable by autograd, and its slope."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..objectives import CISPO, DFPO, GRPO, GSPO, NLL, SAPO, Gate, HybridObjective
from ..types import TokenBatch, rising_offsets

LOG_RATIO_BOUND = 20.0


# Gates f(u; tau), u = r - 1 --------------------------------------------------------------------------------------
def gate(name: str | Gate, u: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """``f`` and ``f'`` of a SAPO gate (arXiv 2511.20347 Eq. 4; arXiv 2602.19345v2), elementwise."""
    if isinstance(name, Gate):
        return name.value(u, tau), name.slope(u.detach(), tau)
    if name == "sigmoid":
        value = torch.sigmoid(tau * u)
        return 4.0 / tau * value, 4.0 * value * (1.0 - value)
    x = tau * u
    if name == "erf":
        return 1.0 + math.sqrt(math.pi / 2.0) / tau * torch.erf(x / math.sqrt(2.0)), torch.exp(-x.square() / 2.0)
    if name == "arctan":
        return 1.0 + torch.atan(x) / tau, 1.0 / (1.0 + x.square())
    return 1.0 + u / torch.sqrt(1.0 + x.square()), (1.0 + x.square()).pow(-1.5)


# Segments: one reduction and one broadcast, padded or packed -----------------------------------------------------
@dataclass(frozen=True)
class Segments:
    """Sums over, and broadcasts to, the tokens of each sequence of a batch whose token tensors are flat ``(N,)``."""

    count: int
    length: int  # T of a padded batch, 0 for a packed one
    ids_N: Tensor | None
    owned_N: Tensor | None  # of a packed batch: tokens of some sequence, none before the first and behind the last

    @classmethod
    def of(cls, batch: TokenBatch) -> Segments:
        if batch.cu_seqlens is None:
            return cls(batch.num_sequences, batch.targets.shape[1], None, None)
        offsets = rising_offsets(batch.cu_seqlens, batch.targets.shape[0])
        position_N = torch.arange(batch.targets.shape[0], device=batch.targets.device)
        ids_N = torch.bucketize(position_N, offsets[1:], right=True).clamp(max=max(batch.num_sequences - 1, 0))
        return cls(batch.num_sequences, 0, ids_N, (position_N >= offsets[0]) & (position_N < offsets[-1]))

    def sum(self, value_N: Tensor) -> Tensor:
        if self.ids_N is None:
            return value_N.view(self.count, self.length).sum(-1)
        if self.count == 0:
            return value_N[:0]  # in its graph
        return value_N.new_zeros(self.count).index_add(0, self.ids_N, value_N)

    def expand(self, value_S: Tensor) -> Tensor:
        if self.ids_N is None:
            return value_S.repeat_interleave(self.length)
        if self.count == 0:  # no sequence owns any token
            return value_S.new_zeros(len(self.ids_N))
        return value_S.index_select(0, self.ids_N)


@dataclass(frozen=True)
class Tokens:
    """A batch laid flat in one dtype. Dead places are replaced before any arithmetic: nothing leaks from them."""

    segments: Segments
    live_N: Tensor
    policy_N: Tensor
    advantages_N: Tensor
    old_N: Tensor | None
    ref_N: Tensor | None
    rollout_N: Tensor | None
    groups_S: Tensor | None
    expert_S: Tensor
    factor_N: Tensor | None = None  # what multiplies all of a rollout's term, and of a demonstration's
    unknown_N: Tensor | None = None  # rollouts' tokens that an engine could not score: see `scored`

    @classmethod
    def of(cls, batch: TokenBatch, dtype: torch.dtype) -> Tokens:
        segments = Segments.of(batch)
        live_N = batch.mask.reshape(-1)
        if segments.owned_N is not None:
            live_N = live_N & segments.owned_N
        policy_N = live_N & ~segments.expand(batch.is_expert)

        def select(value: Tensor) -> Tensor:
            return torch.where(policy_N, value.reshape(-1).to(dtype), 0.0)

        def flat(value: Tensor | None) -> Tensor | None:
            return None if value is None else select(value)

        advantages = batch.advantages
        if advantages is None:  # demonstrations only; a rollout row, were there one, must not pass for a zero
            advantages = torch.full((batch.num_sequences,), math.nan, device=live_N.device, dtype=dtype)
        if advantages.shape == batch.is_expert.shape:  # where S = N as well: one a sequence
            advantages = segments.expand(advantages)
        return cls(
            segments, live_N, policy_N, select(advantages), flat(batch.old_logprobs), flat(batch.ref_logprobs),
            flat(batch.rollout_weights), batch.groups, batch.is_expert, _factor(batch, live_N, policy_N, dtype),
        )  # fmt: skip

    def scored(self, logp_N: Tensor, penalty: bool) -> tuple[Tokens, Tensor]:
        """Tokens of rollouts at which what engines returned is nan or infinite have no RL term, and a log-ratio of 0 in
        their sequence's mean. ``penalty``: the reference's log-probs are part of the term."""
        read = self.old_N, self.rollout_N, self.ref_N if penalty else None
        given = [value for value in read if value is not None]
        if not given:
            return self, logp_N
        known_N = torch.stack([value.isfinite() for value in given]).all(0)
        logp_N = torch.where(known_N, logp_N, torch.where(logp_N.isinf(), 0.0, logp_N).detach())

        def select(value_N: Tensor | None, other: Tensor | float) -> Tensor | None:
            return None if value_N is None else torch.where(known_N, value_N, other)

        still_N = logp_N.detach()
        rollout_N = torch.ones_like(logp_N) if self.rollout_N is None else self.rollout_N
        changed = replace(
            self, old_N=select(self.old_N, still_N), rollout_N=select(rollout_N, 0.0), unknown_N=~known_N,
            ref_N=select(self.ref_N, still_N),
        )  # fmt: skip
        return changed, logp_N


def _factor(batch: TokenBatch, live_N: Tensor, policy_N: Tensor, dtype: torch.dtype) -> Tensor | None:
    """token_weights, and on demonstrations rollout_weights too; 1 where dead. None without either."""
    factor_N = None
    if batch.token_weights is not None:
        factor_N = torch.where(live_N, batch.token_weights.reshape(-1).to(dtype), 1.0)
    if batch.rollout_weights is not None:
        of_expert_N = torch.where(live_N & ~policy_N, batch.rollout_weights.reshape(-1).to(dtype), 1.0)
        factor_N = of_expert_N if factor_N is None else factor_N * of_expert_N
    return factor_N


# Token terms --------------------------------------------------------------------------------------------------
def log_ratio(logp_N: Tensor, old_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """``clamp(logp - old, -20, 20)`` and where the clamp is not active. On-policy: value 0, slope alive."""
    if old_N is None:
        old_N = torch.where(logp_N.isinf(), 0.0, logp_N).detach()
    raw_N = logp_N - old_N
    return raw_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND), ~(raw_N.detach().abs() > LOG_RATIO_BOUND)


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


def _cancellation(force_S: Tensor, before_S: Tensor, groups_S: Tensor, member_S: Tensor) -> Tensor:
    """Mean over groups of ``|sum_i A_i w~_i| / sum_i |A_i w~_i|``.

    Groups where the denominator is 0 stay out, and so do those where it is only rounding of the ``A_i w_i`` before the
    transform: what is left of a group whose weights lie along its advantages (a group of one) has no direction.
    """
    force_S, before_S = torch.where(member_S, force_S, 0.0), torch.where(member_S, before_S, 0.0)
    same_SS = (groups_S[:, None] == groups_S[None, :]).to(force_S.dtype)
    total_S = same_SS @ force_S.abs()
    counted_S = member_S & (total_S > 64 * torch.finfo(force_S.dtype).eps * (same_SS @ before_S.abs()))
    residual_S = torch.where(counted_S, (same_SS @ force_S).abs() / torch.where(counted_S, total_S, 1.0), 0.0)
    share_S = counted_S / (same_SS @ counted_S.to(force_S.dtype)).clamp(min=1.0)  # each group weighs 1 in all
    return (residual_S * share_S).sum() / share_S.sum().clamp(min=1.0)


def policy_terms(
    logp_N: Tensor, tokens: Tokens, objective: HybridObjective
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Value and slope of each token's policy term, rollout weight included, and what the metrics need."""
    policy, adv_N = objective.policy, tokens.advantages_N
    log_ratio_N, alive_N = log_ratio(torch.where(tokens.policy_N, logp_N, 0.0), tokens.old_N)
    if isinstance(policy, (GSPO, DFPO)):
        return _coupled_terms(logp_N, log_ratio_N, alive_N, tokens, policy)
    ratio_N = log_ratio_N.exp()
    seen = {"log_ratio": log_ratio_N, "ratio": ratio_N}
    if isinstance(policy, SAPO):
        (pos_N, pos1_N), (neg_N, neg1_N) = (
            gate(policy.gate, ratio_N - 1.0, t) for t in (policy.tau_pos, policy.tau_neg)
        )
        seen["update"] = torch.where(adv_N > 0, pos1_N, neg1_N)
        loss_N = -adv_N * torch.where(adv_N > 0, pos_N, neg_N)
        slope_N = torch.where(alive_N, -adv_N * seen["update"] * ratio_N, 0.0)
    elif isinstance(policy, GRPO):
        bounded_N = ratio_N if policy.delta is None else ratio_N.clamp(max=policy.delta)
        loss_N = -torch.minimum(bounded_N * adv_N, _clip(ratio_N, policy.clip_low, policy.clip_high) * adv_N)
        seen["clipped"] = _clipped(ratio_N, adv_N, policy.clip_low, policy.clip_high, policy.delta)
        slope_N = torch.where(alive_N & ~seen["clipped"], -adv_N * ratio_N, 0.0)
    else:
        assert isinstance(policy, CISPO)
        weight_N = ratio_N.clamp(max=policy.clip_high).detach()
        seen["clipped"] = ratio_N > policy.clip_high
        loss_N, slope_N = -weight_N * adv_N * logp_N, -weight_N * adv_N
    if tokens.rollout_N is not None:
        loss_N, slope_N = tokens.rollout_N * loss_N, tokens.rollout_N * slope_N
    return loss_N, slope_N.detach(), {name: value.detach() for name, value in seen.items()}


def _coupled_terms(
    logp_N: Tensor, log_ratio_N: Tensor, alive_N: Tensor, tokens: Tokens, policy: GSPO | DFPO
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """GSPO and DFPO: the weight of a sequence first, then its tokens."""
    segments, adv_N = tokens.segments, tokens.advantages_N
    rollout_N = torch.ones_like(logp_N) if tokens.rollout_N is None else tokens.rollout_N
    size_S = segments.sum(tokens.policy_N.to(logp_N.dtype))
    count_S, total_S = size_S.clamp(min=1.0), segments.sum(torch.where(tokens.policy_N, log_ratio_N, 0.0))
    # A product of many ratios overflows float32; bounded like a single one, it stays usable by the group algebra.
    product = isinstance(policy, DFPO) and policy.ratio == "product"
    weight_S = (total_S.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND) if product else total_S / count_S).exp()
    ratio_N = segments.expand(weight_S)
    seen = {"log_ratio": log_ratio_N, "ratio": ratio_N}
    if isinstance(policy, GSPO):
        seen["clipped"] = _clipped(ratio_N, adv_N, policy.clip_low, policy.clip_high)
        surrogate_N = torch.minimum(ratio_N * adv_N, _clip(ratio_N, policy.clip_low, policy.clip_high) * adv_N)
        loss_N = -rollout_N * surrogate_N
        # d s / d logp_t = s / T, for every token whose own clamp is not active
        upstream_S = segments.sum(torch.where(seen["clipped"] | ~tokens.policy_N, 0.0, -rollout_N * adv_N))
        slope_N = torch.where(alive_N, segments.expand(upstream_S * weight_S / count_S), 0.0)
    else:
        member_S, adv_S = size_S > 0, segments.sum(adv_N) / count_S
        assert tokens.groups_S is not None  # DFPO; checked where the batch meets the objective
        new_S = transform_weights(policy, weight_S.detach(), adv_S, tokens.groups_S, member_S)
        # Only Eq. 18 subtracts: the smallest weight of Eq. 17 is exact, however small beside the others.
        before_S = adv_S * weight_S.detach() if policy.transform == "adv_orthogonal" else torch.zeros_like(adv_S)
        seen["residual"] = _cancellation(adv_S * new_S, before_S, tokens.groups_S, member_S)
        slope_N = -rollout_N * segments.expand(torch.where(member_S, new_S, 0.0)) * adv_N
        loss_N = slope_N * logp_N
    return loss_N, slope_N.detach(), {name: value.detach() for name, value in seen.items()}


def kl_terms(logp_N: Tensor, tokens: Tokens, objective: HybridObjective) -> tuple[Tensor, Tensor]:
    """Value and slope of each token's KL estimate. The input is clamped, not the output: the gradient stays finite."""
    assert tokens.ref_N is not None
    raw_N = tokens.ref_N - logp_N
    d_N = raw_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    if objective.kl_estimator == "k1":
        value_N, slope_N = -d_N, torch.ones_like(d_N)
    elif objective.kl_estimator == "k2":
        value_N, slope_N = d_N.square() / 2, -d_N
    else:
        value_N, slope_N = d_N.exp() - d_N - 1.0, 1.0 - d_N.exp()
    slope_N = torch.where(raw_N.abs() > LOG_RATIO_BOUND, 0.0, slope_N)
    if objective.kl_ratio_weighted:
        log_ratio_N, alive_N = log_ratio(logp_N, tokens.old_N)
        ratio_N = log_ratio_N.exp()
        slope_N = ratio_N * (slope_N + torch.where(alive_N, value_N, 0.0))
        value_N = ratio_N * value_N
    return value_N, slope_N.detach()


def squared_norm(logp: Tensor, sum_sq: Tensor) -> Tensor:
    """``||1_y - p||^2``, the squared norm of a logit gradient, from ``sum p^2``: ``(1 - p_y)^2`` and what is left
    of the sum for all others.

    Theirs is not below 0 and, as their p add up to ``1 - p_y``, not above ``(1 - p_y)^2``. Where rounding goes beyond,
    the bound stands: the norm is never below 0, and within a factor of 2 where ``p_y -> 1``. A log-prob above 0 counts
    as 0. What no sum of squares can be, nan or less than 0, gives nan.
    """
    logp = logp.clamp(max=0.0)
    away = torch.expm1(logp).square()
    others = sum_sq - logp.exp().square()
    norm = away + torch.where(others.isfinite(), others.clamp(min=0.0).minimum(away), others.abs())
    return torch.where(sum_sq < 0, torch.nan, norm)


def supervised_slope(logp_N: Tensor, objective: HybridObjective) -> Tensor:
    """``c_s``: ``-phi`` with ``phi = p (1 - p)`` (CHORD, arXiv 2508.11408), or -1; detached."""
    p_N = logp_N.detach().exp()
    phi = isinstance(objective.supervised, NLL) and objective.supervised.weight == "phi"
    return -p_N * (1.0 - p_N) if phi else -torch.ones_like(p_N)


# Aggregation --------------------------------------------------------------------------------------------------
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
        assert norm_length is not None
        per_S = per_S * norm_length
    return torch.where(member_S, 1.0 / (per_S * torch.where(member_S, total, 1.0)), 0.0)
