"""Who computes a case: this package's backends, PyTorch by hand, torch.compile of that, and the peers.

A provider is built when asked for. One that this machine cannot have raises :class:`Unavailable` with the reason, which
the benchmark prints: who is missing from a comparison belongs to it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..ops import hybrid_loss, hybrid_loss_from_hidden, hybrid_loss_from_logits
from . import eager, peers
from .case import METRICS, Case, Outputs
from .cases import HiddenCase, RowCase, TokenCase
from .provider import ALL, LOSS, Provider, Unavailable, try_compiler

OURS = "gac"
NEW = "-new"  # of our providers: out of place


def check_backend(backend: str, device: str | torch.device) -> None:
    """Raises ``Unavailable`` where this package's ``backend`` is not there, or is not for tensors on ``device``."""
    device = torch.device(device).type
    if backend == "triton" and device == "cpu":
        raise Unavailable("Triton runs on a CPU in its interpreter only, whose time says nothing")
    if backend == "cuda" and device != "cuda":
        raise Unavailable(f"the CUDA C++ kernels do not take tensors on {device}")
    if backend == "cpu" and device != "cpu":
        raise Unavailable(f"the compiled CPU kernels do not take tensors on {device}")
    try:
        with library.use_backend(backend):
            pass
    except RuntimeError as error:
        raise Unavailable(str(error)) from error


class _Computed(torch.autograd.Function):
    """A leaf as a model's logits are to autograd, which alone may be overwritten; in the leaf's memory."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def _ours(backend: str, inplace: bool | None, case: Case) -> Provider:
    """This package on a backend; ``inplace`` is None where there is no choice."""
    from .. import __version__

    check_backend(backend, case.device)
    loss: Callable[..., Any] = hybrid_loss
    given: Callable[[Tensor], Tensor] = _Computed.apply if inplace else (lambda leaf: leaf)
    if isinstance(case, HiddenCase):
        loss = hybrid_loss_from_hidden
    elif inplace is not None:
        loss = partial(hybrid_loss_from_logits, inplace=inplace)

    def forward(leaf: Tensor) -> Outputs:
        out = loss(given(leaf), *case.parameters, case.batch, case.objective, case.mu)
        return Outputs(out.loss, out.logprobs, out.signals.rows, out.metrics, out.token_entropy)

    name = f"{OURS}-{backend}" + (NEW if inplace is False else "")
    return Provider(name, __version__, forward, context=partial(library.use_backend, backend))


_BY_HAND: dict[str, Callable[..., Any]] = {
    TokenCase.kernel: eager.token_loss,
    RowCase.kernel: eager.logits_loss,
    HiddenCase.kernel: eager.hidden_loss,
}


def _by_hand(everything: bool, compiled: bool, case: Case, *, plain: bool = False) -> Provider:
    """The baseline of ``eager``, or torch.compile of it; ``plain`` (of logits): as it is mostly written."""
    batch, function = case.batch, eager.plain_logits_loss if plain else _BY_HAND[case.kernel]
    rest: tuple[Tensor | None, ...] = (batch.mask, batch.is_expert, batch.advantages, batch.old_logprobs, case.mu)
    if case.kernel != TokenCase.kernel:
        rest = (*case.parameters, batch.targets, *rest)
    call: Callable[..., Any] = partial(function, everything=everything)
    if compiled:
        call = torch.compile(call, fullgraph=True, dynamic=False)
        try_compiler(lambda: call(case.leaf(), *rest)[0].backward())

    def forward(leaf: Tensor) -> Outputs:
        loss, *others = call(leaf, *rest)
        if not everything:
            return Outputs(loss)
        logprobs, rows, *metrics = others
        entropy = metrics.pop() if len(metrics) > len(METRICS) else None
        return Outputs(loss, logprobs, rows, dict(zip(METRICS, metrics, strict=True)), entropy)

    name = ("compile" if compiled else "eager") + ("-plain" if plain else "" if everything else "-loss")
    return Provider(name, torch.__version__, forward, ALL if everything else LOSS)


_BASELINES: dict[str, Callable[[Any], Provider]] = {
    "eager": partial(_by_hand, True, False),
    "eager-loss": partial(_by_hand, False, False),
    "compile": partial(_by_hand, True, True),
    "compile-loss": partial(_by_hand, False, True),
}

PROVIDERS: dict[str, dict[str, Callable[[Any], Provider]]] = {
    TokenCase.kernel: {
        **{f"{OURS}-{backend}": partial(_ours, backend, None) for backend in library.BACKENDS},
        **_BASELINES,
        **peers.OF_LOGPROBS,
    },
    RowCase.kernel: {
        **{
            f"{OURS}-{backend}{suffix}": partial(_ours, backend, not suffix)
            for backend in library.BACKENDS
            for suffix in (("", NEW) if backend != "reference" else ("",))
        },
        "eager-plain": partial(_by_hand, True, False, plain=True),
        **_BASELINES,
        **peers.OF_LOGITS,
    },
    HiddenCase.kernel: {
        **{f"{OURS}-{backend}": partial(_ours, backend, None) for backend in library.BACKENDS},
        **_BASELINES,
        **peers.OF_HIDDEN,
    },
}
"""Per kernel: name -> what builds the provider for a case."""
