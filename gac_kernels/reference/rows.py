"""The row primitives in eager PyTorch: statistics of a row of logits, and its gradient written out in closed form.

The backend of devices without kernels, and the step by step meaning of the operators of the same names; the oracle is
``logits.py``, whose gradients autograd makes. Shapes: N rows, V vocabulary; logits come as (A, B, V) with N = A B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..objectives import HybridObjective
from .functions import policy_terms, supervised_terms
from .terms import Segments, Tokens, kl_terms

ROLLOUT, DEMONSTRATION, ELSEWHERE = 1, 2, -(2**31)  # as in schemas.py


@dataclass(frozen=True)
class RowTransform:
    """Logit scale, soft cap (0: none) and temperature, a number or one a row."""

    scale: float
    softcap: float
    heat: float | Tensor

    def top(self, raw_NV: Tensor) -> Tensor:
        """The largest raw logit of each row, ``(N, 1)``; with a cap, which takes infinities to finite numbers too, the
        nearest finite one."""
        return self._finite(raw_NV).amax(-1, keepdim=True)

    def fall(self, raw_NV: Tensor, top_N1: Tensor) -> Tensor:
        """``z - z(top)``, at most 0."""
        if not self.softcap:
            return (raw_NV - top_N1) * _bounded(self.scale / self.heat, raw_NV.dtype)
        # tanh a - tanh b without the rounding of either: gain expm1(2 (a - b)) / (e^2a + 1), gain = 2 / (1 + e^-2b)
        raw_NV, twice = self._finite(raw_NV), 2.0 * self.scale / self.softcap
        gain_N1 = 2.0 / (1.0 + torch.exp(-twice * top_N1))
        fall_NV = gain_N1 * (torch.expm1(twice * (raw_NV - top_N1)) / (torch.exp(twice * raw_NV) + 1.0))
        return fall_NV * _bounded(self.softcap / self.heat, raw_NV.dtype)

    def derivative(self, raw_NV: Tensor) -> Tensor:
        """``dz / draw``."""
        slope = _bounded(self.scale / self.heat, raw_NV.dtype)
        if not self.softcap:
            return torch.as_tensor(slope, dtype=raw_NV.dtype, device=raw_NV.device)
        e_NV = torch.exp(-2.0 * self.scale / self.softcap * self._finite(raw_NV).abs())
        return slope * (4.0 * e_NV / (1.0 + e_NV).square())

    def _finite(self, raw_NV: Tensor) -> Tensor:
        most = torch.finfo(raw_NV.dtype).max
        return raw_NV.clamp(-most, most) if self.softcap else raw_NV


def _bounded(factor: Any, dtype: torch.dtype) -> Any:
    """At most what leaves 0 times it 0: beyond, no two probabilities but 1 and 0 are told apart anyway."""
    most = 1e308 if dtype == torch.float64 else 2e38
    return factor.clamp(max=most) if isinstance(factor, Tensor) else min(factor, most)


@dataclass(frozen=True)
class Rows:
    """Transformed rows with everything dead replaced before any arithmetic.

    Logits are taken less their row's largest, the top, before they are multiplied: ``fall`` is at most 0 whatever a
    factor rounds to, and finite logits never overflow.
    """

    raw_NV: Tensor
    transform: RowTransform
    chosen_N1: Tensor  # a target that can be gathered
    live_N: Tensor
    lost_N: Tensor  # live with a target outside [0, V)
    elsewhere_N: Tensor  # live with a target in another shard of the vocabulary
    gift_N: Tensor | None
    log_q_NV: Tensor | None  # GIFT's target distribution
    base_N2: Tensor | None  # max and log sum exp of the base rows

    @classmethod
    def of(
        cls, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
        scale: float, softcap: float, temperature_value: float, beta: float, smooth: float,
    ) -> Rows:  # fmt: skip
        dtype, V = torch.promote_types(logits.dtype, torch.float32), logits.shape[-1]
        live_N = kind != 0
        elsewhere_N = live_N & (targets == ELSEWHERE)
        lost_N = live_N & ~elsewhere_N & ((targets < 0) | (targets >= V))
        chosen_N1 = torch.where(live_N & ~lost_N & ~elsewhere_N, targets, 0).long()[:, None]
        raw_NV = torch.where(live_N[:, None], logits.reshape(-1, V).to(dtype), 0.0)
        heat = temperature_value if temperature is None else torch.where(live_N, temperature, 1.0)[:, None]
        transform = RowTransform(scale, softcap, heat)
        gift_N = log_q_NV = base_N2 = None
        if base_logits is not None:
            gift_N = kind == DEMONSTRATION
            base_NV = torch.where(gift_N[:, None], base_logits.reshape(-1, V).to(dtype), 0.0)
            log_q_NV, base_N2 = _gift_target(base_NV, chosen_N1, beta, smooth)
        return cls(raw_NV, transform, chosen_N1, live_N, lost_N, elsewhere_N, gift_N, log_q_NV, base_N2)

    def per_row(self, value_N: Tensor, where_N: Tensor | None = None) -> Tensor:
        return torch.where(self.live_N if where_N is None else where_N, value_N.masked_fill(self.lost_N, math.nan), 0.0)


def _gift_target(base_NV: Tensor, chosen_N1: Tensor, beta: float, smooth: float) -> tuple[Tensor, Tensor]:
    """``log q`` of ``q ~ p0 exp(beta 1[k = y])``, ``p0`` smoothed (arXiv 2601.09233), and the base's normaliser."""
    top_N1 = base_NV.amax(-1, keepdim=True)
    log_sum_N1 = (base_NV - top_N1).exp().sum(-1, keepdim=True).log()
    log_p0_NV = (base_NV - top_N1) - log_sum_N1
    if smooth:
        kept_NV = log_p0_NV + (math.log1p(-smooth) if smooth < 1 else -math.inf)
        uniform = torch.full_like(kept_NV, math.log(smooth) - math.log(base_NV.shape[-1]))
        log_p0_NV = torch.logaddexp(kept_NV, uniform)
    bumped_NV = log_p0_NV.scatter_add(-1, chosen_N1, torch.full_like(top_N1, beta))
    return torch.log_softmax(bumped_NV, -1), torch.cat([top_N1, log_sum_N1], -1)


def row_statistics(rows: Rows) -> tuple[Tensor, ...]:
    """``logprobs, entropy, sum_sq, normalizer, supervised``, as the operator ``row_statistics``."""
    top_N1 = rows.transform.top(rows.raw_NV)
    fall_NV = rows.transform.fall(rows.raw_NV, top_N1)
    e_NV = fall_NV.exp()
    sum_N1 = e_NV.sum(-1, keepdim=True)  # at least 1, and at least the sum of squares
    log_sum_N1 = sum_N1.log()
    log_p_NV = fall_NV - log_sum_N1
    p_NV = log_p_NV.exp()
    entropy_N = -(p_NV * torch.where(p_NV > 0, log_p_NV, 0.0)).sum(-1)
    normalizer = torch.cat([top_N1, log_sum_N1], -1)
    supervised = rows.raw_NV.new_empty(0)
    if rows.gift_N is not None and rows.log_q_NV is not None and rows.base_N2 is not None:
        q_NV = rows.log_q_NV.exp()
        cross_N = -torch.where(q_NV > 0, q_NV * torch.where(q_NV > 0, log_p_NV, 0.0), 0.0).sum(-1)
        supervised = rows.per_row(cross_N, rows.gift_N)
        base_N2 = torch.where(rows.gift_N[:, None], rows.base_N2, 0.0)
        normalizer = torch.cat([torch.where(rows.live_N[:, None], normalizer, 0.0), base_N2], -1)
    return (
        rows.per_row(log_p_NV.gather(-1, rows.chosen_N1)[:, 0].masked_fill(rows.elsewhere_N, 0.0)),
        rows.per_row(entropy_N),
        rows.per_row((e_NV.square().sum(-1) / sum_N1[:, 0].square()).clamp(max=1.0)),
        torch.where(rows.live_N[:, None], normalizer, 0.0),
        supervised,
    )


def row_gradient(
    rows: Rows, normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None
) -> Tensor:
    """``d loss / d raw`` (N, V): ``slope (t - p) - entropy_slope p (log p + entropy)`` through the transform."""
    log_p_NV = rows.transform.fall(rows.raw_NV, normalizer[:, :1]) - normalizer[:, 1:2]
    p_NV = log_p_NV.exp()
    target_NV = torch.zeros_like(p_NV).scatter_(-1, rows.chosen_N1, 1.0)
    target_NV = target_NV.masked_fill(rows.elsewhere_N[:, None], 0.0)
    if rows.gift_N is not None and rows.log_q_NV is not None:
        target_NV = torch.where(rows.gift_N[:, None], rows.log_q_NV.exp(), target_NV)
    dz_NV = slope[:, None] * (target_NV - p_NV)
    if entropy_slope is not None:
        bonus_NV = entropy_slope[:, None] * (p_NV * (torch.where(p_NV > 0, log_p_NV, 0.0) + entropy[:, None]))
        dz_NV = dz_NV - bonus_NV
    gradient_NV = (dz_NV * rows.transform.derivative(rows.raw_NV)).masked_fill(rows.lost_N[:, None], math.nan)
    return torch.where(rows.live_N[:, None], gradient_NV, 0.0)


def token_slopes(
    logp_N: Tensor, kind: Tensor, weight_N: Tensor, advantages_N: Tensor | None, old_N: Tensor | None,
    ref_N: Tensor | None, rollout_N: Tensor | None, objective: HybridObjective, known_N: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``d loss / d logp`` and ``d loss / d entropy`` of single tokens under a token-separable objective; ``known_N``:
    their entropies, for an objective that reads them."""
    policy_N, expert_N = kind == ROLLOUT, kind == DEMONSTRATION

    def select(value_N: Tensor | None) -> Tensor | None:
        return None if value_N is None else torch.where(policy_N, value_N, 0.0)

    absent_N = torch.full_like(logp_N, math.nan)
    adv_N = select(absent_N if advantages_N is None else advantages_N)
    assert adv_N is not None
    tokens = Tokens(
        Segments(0, 0, None, None), policy_N | expert_N, policy_N, adv_N, select(old_N), select(ref_N),
        select(rollout_N), None, expert_N,
    )  # fmt: skip
    tokens, policy_logp_N = tokens.scored(logp_N, objective.kl_coef != 0)
    _, cr_N, _ = policy_terms(policy_logp_N, tokens, objective, known_N)
    if tokens.ref_N is not None and objective.kl_coef:
        cr_N = cr_N + objective.kl_coef * kl_terms(policy_logp_N, tokens, objective)[1]
    if tokens.unknown_N is not None:
        cr_N, policy_N = cr_N.masked_fill(tokens.unknown_N, 0.0), policy_N & ~tokens.unknown_N
    slope_N = torch.where(
        kind == ROLLOUT, cr_N, torch.where(expert_N, supervised_terms(logp_N, tokens, objective, known_N)[1], 0.0)
    )
    entropy_N = torch.where(policy_N, -objective.entropy_coef * weight_N, 0.0)
    return torch.where(kind != 0, weight_N * slope_N, 0.0), entropy_N
