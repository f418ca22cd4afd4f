"""Objectives of the user's own: one function of a token in ordinary torch operations.

A subclass of :class:`PolicyObjective` (rollouts) or :class:`SupervisedObjective` (demonstrations) is a frozen
dataclass with one method, ``loss(t)``. Loss, gradient, aggregation, weights, signals and metrics follow from it, from
log-probs, from logits and from hidden states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from .symbol import LOGP, Symbol, symbol


class Token(Protocol):
    """What ``loss(t)`` is given: the tokens of a batch, each field one value a token, ``(N,)`` in float32 or float64.

    Places that take no part hold harmless numbers, and what is computed there is left out afterwards. All but ``logp``
    and what follows from it is constant; ``.detach()`` stops the gradient where a term is a weight.
    """

    @property
    def logp(self) -> Tensor:
        """Log-prob of the token under the policy that is trained, with gradient."""

    @property
    def p(self) -> Tensor:
        """``exp(logp)``."""

    @property
    def old_logp(self) -> Tensor:
        """``batch.old_logprobs``; without them the detached ``logp``."""

    @property
    def ref_logp(self) -> Tensor:
        """``batch.ref_logprobs``, which must be given."""

    @property
    def advantage(self) -> Tensor:
        """``batch.advantages``, one a token; 0 on demonstrations."""

    @property
    def entropy(self) -> Tensor:
        """Entropy of the token's distribution in nats, detached; from log-probs it must be given as ``entropy=``."""

    @property
    def log_ratio(self) -> Tensor:
        """``clamp(logp - old_logp, -20, 20)``; its slope is 0 where the clamp acts."""

    @property
    def ratio(self) -> Tensor:
        """``exp(log_ratio)``, the importance ratio."""

    @property
    def ratio_minus_one(self) -> Tensor:
        """``expm1(log_ratio)``: ``ratio - 1`` without loss of digits."""

    def sequence_sum(self, x: Tensor) -> Tensor:
        """The sum of ``x`` over the tokens of each sequence that count, given back to every token, with gradient."""

    def sequence_mean(self, x: Tensor) -> Tensor:
        """The mean of ``x`` over them."""


class _Function:
    """What both kinds have in common."""

    def loss(self, t: Any) -> Tensor:
        """The loss of each token, ``(N,)``; see :class:`Token` for what ``t`` holds."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(self, t), a function of a token")


class PolicyObjective(_Function):
    """Base of a policy term of your own: a frozen dataclass with ``loss(t)``.

    .. code-block:: python

        @dataclass(frozen=True)
        class Tanh(gk.PolicyObjective):
            tau: float = 2.0

            def loss(self, t):
                return -t.advantage * torch.tanh(self.tau * t.ratio_minus_one) / self.tau

        objective = gk.HybridObjective(Tanh(), gk.NLL("phi"))

    ``clipped(t)``, if there is one, gives a bool a token, True where the term takes the gradient away: the metrics
    ``clip_fraction`` and ``effective_update_ratio`` count it. ``update(t)`` instead gives the factor that scales the
    token's update, whose mean is ``effective_update_ratio``.

    The function is run once on symbols, which gives loss and slope as expressions. They are checked against autograd in
    float64, and evaluated on every device between the look at the logits and their gradient. So ``loss`` may use what
    has a rule there: arithmetic, comparisons, ``torch.where``, ``minimum``, ``maximum``, ``clamp``, ``exp``, ``log``,
    ``sigmoid``, ``tanh``, ``erf``, ``atan``, ``sqrt``, ``abs``, ``sign`` and their kin; an error names them all. Fields
    of type float may take any value; fields that are bool, str or None may decide in Python what is computed. Other
    tokens enter by ``t.sequence_sum`` and ``t.sequence_mean`` alone. Where two branches of ``minimum`` or ``maximum``
    are equal, the second one's gradient passes whole.
    """


class SupervisedObjective(_Function):
    """Base of a supervised term of your own: a frozen dataclass with ``loss(t)``, as :class:`PolicyObjective`.

    Advantages and ratios have no meaning on demonstrations; ``t.logp``, ``t.p`` and ``t.entropy`` have.
    """


def check_function(name: str, value: object) -> None:
    """Raise TypeError where an objective of the user's own is no frozen, hashable dataclass."""
    kind = type(value).__name__
    parameters = vars(type(value)).get("__dataclass_params__")  # its own, not those of a base
    if parameters is None or not parameters.frozen:
        raise TypeError(f"{name} must be a frozen dataclass: write @dataclass(frozen=True) above class {kind}")
    if getattr(type(value), "loss", None) is _Function.loss:
        raise TypeError(f"{name} must define loss(self, t), a function of a token: class {kind} has none")
    try:
        hash(value)
    except TypeError as error:
        raise TypeError(f"{name} must be hashable, so that it can be recognised: {kind}: {error}") from error


_logp: ContextVar[Tensor | None] = ContextVar("logp", default=None)


@contextmanager
def evaluating(logp: Tensor) -> Iterator[None]:
    """Names the log-probs that :func:`with_slope` gives its derivative by."""
    before = _logp.set(logp)
    try:
        yield
    finally:
        _logp.reset(before)


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: Tensor, value: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None


def with_slope(value: Tensor, slope: Tensor) -> Tensor:
    """``value`` with ``slope`` as its derivative by ``t.logp``, in place of autograd's: inside ``loss(t)`` only.

    For a gradient that is not the value's own, or where you know a formula that keeps more digits. A function ``f`` of
    the ratio ``r`` has the slope ``f'(r) r``. How ``value`` and ``slope`` depend on ``t.logp`` is not looked at.

    Args:
        value: one a token.
        slope: d value / d logp, one a token.

    Raises:
        RuntimeError: outside of an objective's ``loss(t)``.
    """
    if isinstance(value, Symbol) or isinstance(slope, Symbol):
        return Symbol(symbol(value).value, {LOGP: symbol(slope).value})
    logp = _logp.get()
    if logp is None:
        raise RuntimeError("with_slope gives a token's value its derivative: call it inside of an objective's loss(t)")
    value, slope = (torch.as_tensor(x, dtype=logp.dtype, device=logp.device).detach() for x in (value, slope))
    return _Given.apply(logp, value.expand_as(logp), slope.expand_as(logp))
