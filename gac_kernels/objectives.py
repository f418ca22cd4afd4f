"""The objectives as frozen, hashable descriptions that validate themselves. The formulas stand in ``reference.py``.

Every objective is one scalar function of a token, giving (loss, slope) with slope = d loss / d logp. Write
``u = r - 1`` for the importance ratio ``r`` and ``A`` for the advantage.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

GATES = ("sigmoid", "erf", "arctan", "softsign")
KL_ESTIMATORS = ("k1", "k2", "k3")
AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def _number(name: str, value: object, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not abs(value) <= sys.float_info.max or value < low or value > high or (open_low and value == low):
        bound = f"{'>' if open_low else '>='} {low:g}" + ("" if high == math.inf else f" and <= {high:g}")
        raise ValueError(f"{name} must be finite and {bound}, got {value!r}")


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")


@dataclass(frozen=True)
class Gate:
    """A gate of the user's own for SAPO: ``f(u, tau)`` and its derivative, elementwise on a float tensor ``u = r - 1``.

    It is checked at every temperature it is used with for the conditions of the gate study (arXiv 2602.19345v2):
    continuously differentiable; ``f'`` has its global maximum 1 at ``r = 1``; ``f'`` falls away from 1 on both sides;
    ``r f'(r) -> 0``. Custom gates have one implementation, the eager reference, on every device.

    Attributes:
        name: shown in errors and reports.
        value: ``f(u, tau) -> Tensor``.
        slope: ``f'(u, tau) -> Tensor``, the derivative by ``u``.
    """

    name: str
    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]

    def __post_init__(self) -> None:
        for name in ("value", "slope"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Gate.{name} must be a function of (u, tau), got {type(getattr(self, name)).__name__}")

    def check(self, tau: float) -> None:
        """Raise ValueError naming the violated condition; all four are tested in float64 on a dense grid of ratios."""
        log_r = torch.linspace(-20.0, 20.0, 8001, dtype=torch.float64)
        near = torch.linspace(-1.0, 6.0, 14001, dtype=torch.float64)
        u = torch.unique(torch.cat([torch.expm1(log_r), near, near.clamp(-1, 1) / max(1.0, tau)]))
        f1 = self.slope(u, tau)
        for name, got in (("slope", f1), ("value", self.value(u, tau))):
            if not isinstance(got, Tensor) or got.shape != u.shape:
                came = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                self._fail(tau, f"{name} must give a tensor of the shape of u, {tuple(u.shape)}; it gave {came}")
        if not bool(torch.isfinite(f1).all()):
            self._fail(tau, "f' must be finite for every ratio in [e^-20, e^20]")
        self._check_derivative(near, tau)
        at_one = float(self.slope(torch.zeros(1, dtype=torch.float64), tau))
        if abs(at_one - 1.0) > 1e-6 or float(f1.max()) > 1.0 + 1e-6:
            self._fail(
                tau, f"f' must have its global maximum 1 at r = 1; f'(1) = {at_one:.6g}, max {float(f1.max()):.6g}"
            )
        right, left = f1[u > 0], f1[u < 0].flip(0)
        if bool((right.diff() > 1e-9).any()) or bool((left.diff() > 1e-9).any()):
            self._fail(tau, "f' must fall away from r = 1 on both sides")
        if float(right[-1]) > 0.5 or float(left[-1]) >= 1.0:
            self._fail(tau, "f' must fall away from r = 1 on both sides; it stays level")
        r = torch.tensor([1e4, 1e8, 1e12], dtype=torch.float64)
        tail = r * self.slope(r - 1.0, tau)
        if not bool(torch.isfinite(tail).all()) or bool((tail[1:] > 0.5 * tail[:-1] + 1e-12).any()):
            self._fail(tau, f"r f'(r) must go to 0; at r = 1e4, 1e8, 1e12 it is {[f'{v:.3g}' for v in tail.tolist()]}")

    def _check_derivative(self, u: Tensor, tau: float) -> None:
        """f' is f's derivative (central differences), and f' has no jump (its steps shrink with the grid's)."""
        step = 1e-5
        numeric = (self.value(u + step, tau) - self.value(u - step, tau)) / (2 * step)
        error = float((numeric - self.slope(u, tau)).abs().max())
        if not error < 1e-4:
            self._fail(tau, f"slope must be the derivative of value; they differ by up to {error:.3g}")
        coarse = self.slope(u, tau).diff().abs()
        worst = int(coarse.argmax())
        fine = self.slope(torch.linspace(float(u[worst]), float(u[worst + 1]), 65, dtype=u.dtype), tau).diff().abs()
        if float(fine.max()) > 0.25 * float(coarse[worst]) + 1e-12:
            self._fail(tau, f"f' must be continuous; it jumps near r = {1.0 + float(u[worst]):.4g}")

    def _fail(self, tau: float, why: str) -> None:
        raise ValueError(f"gate {self.name!r} is not admissible at tau = {tau:g}: {why}")


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
        _number("tau_pos", self.tau_pos, 0.0, open_low=True)
        _number("tau_neg", self.tau_neg, 0.0, open_low=True)
        if isinstance(self.gate, Gate):
            self.gate.check(self.tau_pos)
            self.gate.check(self.tau_neg)
        else:
            _choice("gate", self.gate, GATES)


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
        _number("clip_low", self.clip_low, 0.0, 1.0)
        _number("clip_high", self.clip_high, 0.0)
        if self.delta is not None:
            _number("delta", self.delta, 1.0 + self.clip_high, open_low=True)


@dataclass(frozen=True)
class CISPO:
    """Clipped importance weight ``-sg(min(r, clip_high)) A logp`` (MiniMax-M1, arXiv 2506.13585).

    ``clip_high`` bounds the ratio itself, not its distance from 1.
    """

    clip_high: float = 1.2

    def __post_init__(self) -> None:
        _number("clip_high", self.clip_high, 0.0, open_low=True)


@dataclass(frozen=True)
class GSPO:
    """Clipped surrogate on the sequence ratio ``s = exp(mean_t log_ratio)`` (GSPO, arXiv 2507.18071).

    Sequence coupled: the gradient of one token depends on all tokens of its sequence.
    """

    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        _number("clip_low", self.clip_low, 0.0, 1.0)
        _number("clip_high", self.clip_high, 0.0)


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
        _choice("transform", self.transform, ("min_replace", "adv_orthogonal"))
        _choice("ratio", self.ratio, ("geometric_mean", "product"))


@dataclass(frozen=True)
class NLL:
    """Supervised ``-sg(phi) logp``; ``weight="phi"``: ``phi = p (1 - p)`` (CHORD, arXiv 2508.11408), ``"none"``: 1."""

    weight: str = "phi"

    def __post_init__(self) -> None:
        _choice("weight", self.weight, ("phi", "none"))


@dataclass(frozen=True)
class GIFT:
    """Supervision at finite temperature: cross entropy against ``q ~ p0 exp(beta 1[k = y])`` (arXiv 2601.09233).

    ``p0`` is the base model's distribution, mixed with ``smooth`` parts of the uniform one. ``beta = 0`` distils the
    base model, ``beta -> inf`` is plain supervision. Needs the logits of both models, not only log-probs.
    """

    beta: float = 20.0
    smooth: float = 0.0

    def __post_init__(self) -> None:
        _number("beta", self.beta, 0.0)
        _number("smooth", self.smooth, 0.0, 1.0)


Policy = SAPO | GRPO | CISPO | GSPO | DFPO
Supervised = NLL | GIFT
_POLICIES = (SAPO, GRPO, CISPO, GSPO, DFPO)
_SUPERVISED = (NLL, GIFT)


@dataclass(frozen=True)
class HybridObjective:
    """One policy term for rollouts, one supervised term for demonstrations, and how each is aggregated.

    Attributes:
        policy: SAPO, GRPO, CISPO, GSPO or DFPO.
        supervised: NLL or GIFT.
        kl_coef: weight of the KL penalty against ``batch.ref_logprobs``, added to rollout tokens.
        kl_estimator: ``"k1"``, ``"k2"`` or ``"k3"`` (http://joschu.net/blog/kl-approx.html), with
            ``d = clamp(ref_logp - logp, -20, 20)``: ``-d``, ``d^2 / 2``, ``e^d - d - 1``.
        kl_ratio_weighted: multiply the estimator by the token's importance ratio, with the ratio's gradient.
        entropy_coef: weight of the entropy bonus on rollout tokens.
        aggregation: of the policy branch: ``"token-mean"`` (DAPO), ``"seq-mean-token-mean"`` (GRPO, SAPO),
            ``"seq-mean-token-sum"`` or ``"seq-mean-token-sum-norm"`` (Dr. GRPO).
        supervised_aggregation: of the supervised branch, same names.
        norm_length: the constant length of ``"seq-mean-token-sum-norm"``; None uses the padded length ``T``.
    """

    policy: Policy = SAPO()
    supervised: Supervised = NLL("phi")
    kl_coef: float = field(default=0.0, kw_only=True)
    kl_estimator: str = field(default="k3", kw_only=True)
    kl_ratio_weighted: bool = field(default=False, kw_only=True)
    entropy_coef: float = field(default=0.0, kw_only=True)
    aggregation: str = field(default="seq-mean-token-mean", kw_only=True)
    supervised_aggregation: str = field(default="token-mean", kw_only=True)
    norm_length: float | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if not isinstance(self.policy, _POLICIES):
            raise TypeError(f"policy must be SAPO, GRPO, CISPO, GSPO or DFPO, got {type(self.policy).__name__}")
        if not isinstance(self.supervised, _SUPERVISED):
            raise TypeError(f"supervised must be NLL or GIFT, got {type(self.supervised).__name__}")
        _number("kl_coef", self.kl_coef, 0.0)
        _number("entropy_coef", self.entropy_coef, 0.0)
        _choice("kl_estimator", self.kl_estimator, KL_ESTIMATORS)
        _choice("aggregation", self.aggregation, AGGREGATIONS)
        _choice("supervised_aggregation", self.supervised_aggregation, AGGREGATIONS)
        if not isinstance(self.kl_ratio_weighted, bool):
            raise TypeError(f"kl_ratio_weighted must be a bool, got {type(self.kl_ratio_weighted).__name__}")
        if self.norm_length is not None:
            _number("norm_length", self.norm_length, 0.0, open_low=True)


@dataclass(frozen=True, eq=False)
class LogitTransform:
    """How raw logits become the logits of the softmax: ``scale * raw``, soft cap, then ``/ temperature``.

    Attributes:
        temperature: float > 0, or an ``(S,)`` tensor with one temperature a sequence.
        softcap: ``c`` of ``c * tanh(z / c)``, or None.
        scale: the model's logit scale.
    """

    temperature: float | Tensor = 1.0
    softcap: float | None = None
    scale: float = 1.0

    def __post_init__(self) -> None:
        if isinstance(self.temperature, Tensor):
            if self.temperature.ndim != 1 or not self.temperature.is_floating_point():
                raise ValueError(
                    f"temperature must be a float or a floating (S,) tensor, got shape {tuple(self.temperature.shape)} "
                    f"of {self.temperature.dtype}"
                )
        else:
            _number("temperature", self.temperature, 0.0, open_low=True)
        if self.softcap is not None:
            _number("softcap", self.softcap, 0.0, open_low=True)
        _number("scale", self.scale, 0.0, open_low=True)
