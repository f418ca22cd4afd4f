"""Policy terms written as functions of a token: evaluated eagerly on every device, between two looks at the logits.

Each is also an example of how to write your own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import choice, number
from .function import PolicyObjective, Token


@dataclass(frozen=True)
class DPPO(PolicyObjective):
    """``-A sg(min(r, ratio_cap)) logp`` where the policies' divergence allows the update, 0 elsewhere.

    Source: arXiv 2602.04879; verl's ``dppo_tv`` and ``dppo_kl``. With ``p = e^logp`` and ``q = e^old_logp`` a token is
    left out where the update would take its probability further from ``q`` than the bound.

    Attributes:
        divergence: ``"tv"``: ``p - q <= high`` where ``A > 0``, else ``p - q >= -low``. ``"kl"``: the divergence of the
            two-way split {token, all others} is within ``high`` (``A > 0``) or ``low``, or the update leads back.
        low: bound where ``A <= 0``.
        high: bound where ``A > 0``.
        ratio_cap: upper bound of the importance ratio, which is a weight without gradient.
    """

    divergence: str = "tv"
    low: float = 0.2
    high: float = 0.2
    ratio_cap: float = 20.0

    def __post_init__(self) -> None:
        choice("divergence", self.divergence, ("tv", "kl"))
        number("low", self.low, 0.0)
        number("high", self.high, 0.0)
        number("ratio_cap", self.ratio_cap, 0.0, open_low=True)

    def loss(self, t: Token) -> Tensor:
        weight = torch.clamp(t.ratio, max=self.ratio_cap).detach()
        return torch.where(self.clipped(t), 0.0, -weight * t.advantage * t.logp)

    def clipped(self, t: Token) -> Tensor:
        p, q = t.p, torch.exp(t.old_logp)
        if self.divergence == "tv":
            allowed = torch.where(t.advantage > 0, p - q <= self.high, p - q >= -self.low)
        else:
            others = (1 - q) * torch.log((1 - q + 1e-8) / (1 - p + 1e-8))
            split = q * (t.old_logp - t.logp) + others
            allowed = torch.where(t.advantage > 0, (split <= self.high) | (p <= q), (split <= self.low) | (p >= q))
        return ~allowed


@dataclass(frozen=True)
class GMPO(PolicyObjective):
    """``-A exp(mean_t c_t)``: the geometric mean of a sequence's clipped ratios (arXiv 2507.20673).

    ``c_t = s min(s l_t, s clamp(l_t, -clip_low, clip_high))`` with ``s = sign A`` and ``l_t`` the log-ratio: each token
    is clipped in log space before the mean. Sequence coupled.
    """

    clip_low: float = 0.4
    clip_high: float = 0.4

    def __post_init__(self) -> None:
        number("clip_low", self.clip_low, 0.0)
        number("clip_high", self.clip_high, 0.0)

    def loss(self, t: Token) -> Tensor:
        sign = torch.sign(t.advantage)
        clamped = torch.clamp(t.log_ratio, -self.clip_low, self.clip_high)
        kept = sign * torch.minimum(sign * t.log_ratio, sign * clamped)
        return -t.advantage * torch.exp(t.sequence_mean(kept))

    def clipped(self, t: Token) -> Tensor:
        up, down = t.advantage > 0, t.advantage < 0
        return (up & (t.log_ratio > self.clip_high)) | (down & (t.log_ratio < -self.clip_low))


@dataclass(frozen=True)
class VESPO(PolicyObjective):
    """``-sg(phi) A logp`` with a gamma-shaped weight of the sequence's ratio (TRL and Liger call it ``vespo``).

    ``phi = exp(lambda + k log w - lambda w)`` with ``log w = clamp(sum_t log_ratio, log 1e-8, 20)``; 1 at ``w = 1``.
    ``k`` and ``lambda`` go by the sign of ``A``; 0 counts as positive. Sequence coupled.
    """

    k_pos: float = 2.0
    lambda_pos: float = 3.0
    k_neg: float = 3.0
    lambda_neg: float = 2.0

    def __post_init__(self) -> None:
        for name in ("k_pos", "lambda_pos", "k_neg", "lambda_neg"):
            number(name, getattr(self, name), 0.0)

    def loss(self, t: Token) -> Tensor:
        log_w = torch.clamp(t.sequence_sum(t.log_ratio), math.log(1e-8), 20.0).detach()

        def shaped(k: float, lam: float) -> Tensor:
            return torch.exp(lam + k * log_w - lam * torch.exp(log_w))

        phi = torch.where(t.advantage >= 0, shaped(self.k_pos, self.lambda_pos), shaped(self.k_neg, self.lambda_neg))
        return -phi * t.advantage * t.logp


@dataclass(frozen=True)
class DRO(PolicyObjective):
    """``-(A logp - beta / 2 log_ratio^2)``: policy gradient with a quadratic pull to the sampling policy.

    Source: direct reward optimisation, arXiv 2405.19107, as Kimi K1.5 (arXiv 2501.12599) and trainers use it a token.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        number("beta", self.beta, 0.0)

    def loss(self, t: Token) -> Tensor:
        return 0.5 * self.beta * torch.square(t.log_ratio) - t.advantage * t.logp


@dataclass(frozen=True)
class REINFORCE(PolicyObjective):
    """``-A logp``: the policy gradient without importance ratio or clipping (GPG, arXiv 2504.02546)."""

    def loss(self, t: Token) -> Tensor:
        return -t.advantage * t.logp
