"""What a contestant of a case is, and how it is held against the case's reference."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .case import Case, Outputs
from .check import WrongResult

# What a provider's time pays for.
ALL, LOSS, LOSS_ENTROPY = "all", "loss", "loss, entropy"
POLICY, POLICY_ENTROPY = "policy loss", "policy loss, entropy"


class Unavailable(Exception):
    """A provider that cannot take part here, and why."""


@dataclass(frozen=True)
class Provider:
    """One contestant of a case.

    Attributes:
        name: in tables and records. version: of the package that does the work.
        forward: from the leaf to :class:`Outputs`.
        outputs: what it computes: ``"all"`` of loss, log-probs, signals and metrics (from logits also entropy), the
            ``"loss"`` alone, or the ``"policy loss"`` (peers that know no supervised branch).
        context: entered around every call and never timed.
        prepare: from the case's leaf to the leaf that ``forward`` takes; never timed.
    """

    name: str
    version: str
    forward: Callable[[Tensor], Outputs]
    outputs: str = ALL
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)
    prepare: Callable[[Tensor], Tensor] = lambda leaf: leaf


def verify(provider: Provider, case: Case) -> float:
    """Run the provider once and hold the result against the case's reference.

    Returns:
        The largest error, in units of the bound.

    Raises:
        WrongResult: naming provider, result, place and error.
    """
    own = case.leaf()
    leaf = provider.prepare(own)
    with provider.context():
        outputs = provider.forward(leaf)
        gradient, *others = torch.autograd.grad(outputs.loss, (leaf, *case.parameters))
    if leaf is not own:  # with rows of its own beyond the case's
        gradient = gradient[tuple(map(slice, own.shape))]
    try:
        return case.check(outputs, gradient, *others, policy_only=provider.outputs.startswith(POLICY))
    except WrongResult as error:
        raise WrongResult(f"{provider.name}: {error}") from None


def try_compiler(call: Callable[[], object]) -> None:
    """Have torch.compile compile. Its failures come in many types; which one it was goes into the reason."""
    try:
        call()
    except Exception as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
        raise Unavailable(f"torch.compile failed: {type(cause).__name__}: {reason}") from error
