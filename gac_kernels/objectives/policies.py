"""Terms of rollouts. Write ``u = r - 1`` for the importance ratio ``r`` and ``A`` for the advantage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import choice, number
from .function import PolicyObjective, Token, with_slope
from .gate import Gate

GATES = ("sigmoid", "erf", "arctan", "softsign")


@dataclass(frozen=True)
class SAPO:
    """Soft adaptive policy optimisation: ``loss = -A f(r)``, a smooth gate ``f`` in place of clipping.

    Source: SAPO, arXiv 2511.20347; the gates erf, arctan and softsign: arXiv 2602.19345v2, whose study found
    ``tau_pos=10, tau_neg=12`` best for every gate.

    Attributes:
        gate: ``"sigmoid"``, ``"erf"``, ``"arctan"``, ``"softsign"`` or a :class:`Gate`.
        tau_pos: gate temperature where ``A > 0``.
        tau_neg: gate temperature where ``A <= 0``.
    """

    gate: str | Gate = "sigmoid"
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        number("tau_pos", self.tau_pos, 0.0, open_low=True)
        number("tau_neg", self.tau_neg, 0.0, open_low=True)
        if isinstance(self.gate, Gate):
            self.gate.check(self.tau_pos)
            self.gate.check(self.tau_neg)
        else:
            choice("gate", self.gate, GATES)


@dataclass(frozen=True)
class GRPO:
    """Clipped surrogate ``-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)`` (GRPO, arXiv 2402.03300).

    ``clip_high > clip_low`` is DAPO's clip-higher (arXiv 2503.14476). ``delta`` bounds the first ratio from above
    (two-sided clipping, INTELLECT-2, arXiv 2505.07291) and must exceed ``1 + clip_high``.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None

    def __post_init__(self) -> None:
        number("clip_low", self.clip_low, 0.0, 1.0)
        number("clip_high", self.clip_high, 0.0)
        if self.delta is not None:
            number("delta", self.delta, 1.0 + self.clip_high, open_low=True)


@dataclass(frozen=True)
class CISPO:
    """Clipped importance weight ``-sg(min(r, clip_high)) A logp`` (MiniMax-M1, arXiv 2506.13585).

    ``clip_high`` bounds the ratio itself, not its distance from 1.
    """

    clip_high: float = 1.2

    def __post_init__(self) -> None:
        number("clip_high", self.clip_high, 0.0, open_low=True)


@dataclass(frozen=True)
class GSPO(PolicyObjective):
    """Clipped surrogate on the sequence ratio ``s = exp(mean_t log_ratio)`` (GSPO, arXiv 2507.18071).

    Sequence coupled: the gradient of one token depends on all tokens of its sequence. With ``token=True`` it is
    GSPO-token: value and clip are those of ``s``, and the gradient goes through each token's own log-prob with its own
    advantage, ``s_t = sg(s) p / sg(p)``.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    token: bool = False

    def __post_init__(self) -> None:
        number("clip_low", self.clip_low, 0.0, 1.0)
        number("clip_high", self.clip_high, 0.0)
        if not isinstance(self.token, bool):
            raise TypeError(f"token must be a bool, got {type(self.token).__name__}")

    def _ratio(self, t: Token) -> Tensor:
        s = torch.exp(t.sequence_mean(t.log_ratio))
        return with_slope(s, s) if self.token else s

    def loss(self, t: Token) -> Tensor:
        s = self._ratio(t)
        clipped = torch.clamp(s, 1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(s * t.advantage, clipped * t.advantage)

    def clipped(self, t: Token) -> Tensor:
        s = self._ratio(t)
        up, down = t.advantage > 0, t.advantage < 0
        return (up & (s > 1 + self.clip_high)) | (down & (s < 1 - self.clip_low))


@dataclass(frozen=True)
class DFPO:
    """``-sg(w~_i) A_i logp_t`` with the sequence weights of a group transformed so that shared tokens cancel.

    Source: arXiv 2604.13088v1, Eq. 17 (``min_replace``) and Eq. 18 (``adv_orthogonal``). Needs ``batch.groups``.

    Attributes:
        transform: ``"min_replace"``: every weight of a group becomes its smallest; ``"adv_orthogonal"``: the part of
            the weights along the advantages is removed, so that ``sum_i A_i w~_i = 0``.
        ratio: ``"geometric_mean"`` (length-normalised as in GSPO) or ``"product"`` of the token ratios.
    """

    transform: str = "min_replace"
    ratio: str = "geometric_mean"

    def __post_init__(self) -> None:
        choice("transform", self.transform, ("min_replace", "adv_orthogonal"))
        choice("ratio", self.ratio, ("geometric_mean", "product"))
