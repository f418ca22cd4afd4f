"""Terms of demonstrations."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checks import choice, number
from .function import SupervisedObjective, Token


@dataclass(frozen=True)
class NLL(SupervisedObjective):
    """Supervised ``-sg(weight) logp``.

    Attributes:
        weight: ``"phi"``: ``p (1 - p)`` (CHORD, arXiv 2508.11408); ``"none"``: 1; ``"p"``: ``p`` (DFT,
            arXiv 2508.05629); ``"entropy"``: ``exp(-entropy) / 2`` (SRFT, arXiv 2506.19767). The last two are evaluated
            as functions of a token, as an objective of your own is.
    """

    weight: str = "phi"

    def __post_init__(self) -> None:
        choice("weight", self.weight, ("phi", "none", "p", "entropy"))

    def loss(self, t: Token) -> Tensor:
        if self.weight == "none":
            return -t.logp
        if self.weight == "entropy":
            return -0.5 * torch.exp(-t.entropy) * t.logp
        weight = (t.p * (1 - t.p) if self.weight == "phi" else t.p).detach()
        return torch.where(weight == 0, 0.0, -weight * t.logp)  # 0 at p = 0, never nan


@dataclass(frozen=True)
class LUFFY(SupervisedObjective):
    """``-p / (p + gamma)``, with its gradient, so that unlikely tokens count more (LUFFY, arXiv 2504.14945)."""

    gamma: float = 0.1

    def __post_init__(self) -> None:
        number("gamma", self.gamma, 0.0, open_low=True)

    def loss(self, t: Token) -> Tensor:
        return -t.p / (t.p + self.gamma)


@dataclass(frozen=True)
class GIFT:
    """Supervision at finite temperature: cross entropy against ``q ~ p0 exp(beta 1[k = y])`` (arXiv 2601.09233).

    ``p0`` is the base model's distribution, mixed with ``smooth`` parts of the uniform one. ``beta = 0`` distils the
    base model, ``beta -> inf`` is plain supervision. Needs the logits of both models, not only log-probs.

    ``floor`` is added to every ``p0``: 0 is the paper's formula, 1e-10 what its authors' code computes as
    ``log(p0 + 1e-10)``. At ``beta = 20`` the floor alone gives a token that the base model excludes ``q = 0.046``.
    """

    beta: float = 20.0
    smooth: float = 0.0
    floor: float = field(default=0.0, kw_only=True)

    def __post_init__(self) -> None:
        number("beta", self.beta, 0.0)
        number("smooth", self.smooth, 0.0, 1.0)
        number("floor", self.floor, 0.0, 1.0)

    def smoothing(self, columns: int) -> float:
        """``smooth`` and ``floor`` as one share of the uniform distribution over ``columns``: q is normalised, so
        ``p0 + floor`` is ``p0`` with ``V floor / (1 + V floor)`` parts of it."""
        if not self.floor:
            return float(self.smooth)
        added = columns * self.floor
        return (self.smooth + added) / (1.0 + added)
