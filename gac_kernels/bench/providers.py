"""Who computes a case: this package's backends, PyTorch by hand, torch.compile of that, and the peers.

A provider is built when asked for. One that this machine cannot have raises :class:`Unavailable` with the reason, which
the benchmark prints: who is missing from a comparison belongs to it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import library
from ..objectives import SAPO
from ..ops import hybrid_loss
from . import eager
from .cases import METRICS, Outputs, TokenCase
from .check import WrongResult

# What a provider's time pays for.
ALL, LOSS, POLICY = "all", "loss", "policy loss"
OURS = "gac"


class Unavailable(Exception):
    """A provider that cannot take part here, and why."""


@dataclass(frozen=True)
class Provider:
    """One contestant of a case.

    Attributes:
        name: in tables and records. version: of the package that does the work.
        forward: from the leaf of log-probs to :class:`Outputs`.
        outputs: what it computes: ``"all"`` of loss, log-probs, signals and metrics, the ``"loss"`` alone, or the
            ``"policy loss"`` alone (peers that know no supervised branch; they still get the whole batch).
        context: entered around every call and never timed.
    """

    name: str
    version: str
    forward: Callable[[Tensor], Outputs]
    outputs: str = ALL
    context: Callable[[], AbstractContextManager[Any]] = field(default=nullcontext)


def _ours(backend: str, case: TokenCase) -> Provider:
    from .. import __version__

    device = torch.device(case.device).type
    if backend == "triton" and device == "cpu":
        raise Unavailable("Triton runs on a CPU in its interpreter only, whose time says nothing")
    if backend == "cpu" and device != "cpu":
        raise Unavailable(f"the compiled CPU kernels do not take tensors on {device}")
    try:
        with library.use_backend(backend):
            pass
    except RuntimeError as error:
        raise Unavailable(str(error)) from error

    def forward(leaf: Tensor) -> Outputs:
        out = hybrid_loss(leaf, case.batch, case.objective, case.mu)
        return Outputs(out.loss, out.logprobs, out.signals.rows, out.metrics)

    return Provider(f"{OURS}-{backend}", __version__, forward, context=partial(library.use_backend, backend))


def _by_hand(everything: bool, compiled: bool, case: TokenCase) -> Provider:
    """The baseline of ``eager``, or torch.compile of it."""
    batch = case.batch
    rest = batch.mask, batch.is_expert, batch.advantages, batch.old_logprobs, case.mu, everything
    function: Callable[..., Any] = eager.token_loss
    if compiled:
        function = torch.compile(eager.token_loss, fullgraph=True, dynamic=False)
        _try_compiler(lambda: function(case.logprobs, *rest)[0].backward())

    def forward(leaf: Tensor) -> Outputs:
        loss, *others = function(leaf, *rest)
        if not everything:
            return Outputs(loss)
        logprobs, rows, *metrics = others
        return Outputs(loss, logprobs, rows, dict(zip(METRICS, metrics, strict=True)))

    name = ("compile" if compiled else "eager") + ("" if everything else "-loss")
    return Provider(name, torch.__version__, forward, ALL if everything else LOSS)


def _try_compiler(call: Callable[[], object]) -> None:
    """Have torch.compile compile. Its failures come in many types; which one it was goes into the reason."""
    try:
        call()
    except Exception as error:
        cause = error.__cause__ or error
        reason = next((line.strip() for line in str(cause).splitlines() if line.strip()), "no message")
        raise Unavailable(f"torch.compile failed: {type(cause).__name__}: {reason}") from error


# Peers: imported here, for comparison only, and only when they are asked for -------------------------------------
def _require(distribution: str, module: str) -> tuple[Any, str]:
    """Module and version of an installed peer."""
    if importlib.util.find_spec(module.partition(".")[0]) is None:
        raise Unavailable(f"{distribution} is not installed")
    version = installed_version(distribution) or "unknown version"
    try:
        return importlib.import_module(module), version
    except Exception as error:  # a peer's import runs its own hosts' imports, which may fail in any way
        raise Unavailable(f"{distribution} {version} is there, but importing {module} failed: {error}") from error


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, read without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _policy_mask(case: TokenCase) -> Tensor:
    return case.batch.mask & ~case.batch.is_expert[:, None]


def _liger(case: TokenCase) -> Provider:
    """Liger's GRPO loss of ready log-probs, compiled as Liger's fused linear loss compiles it."""
    module, version = _require("liger-kernel", "liger_kernel.chunked_loss.grpo_loss")
    batch, mask = case.batch, _policy_mask(case).float()
    # Liger's mean is over all rows it is given; ours over those with a token of the branch.
    scale = case.sequences / int((mask.sum(-1) > 0).sum())
    options = {"old_per_token_logps": batch.old_logprobs, "beta": 0.0, "loss_type": "sapo"}
    function = torch.compile(module.LigerFusedLinearGRPOFunction.ppo_loss_fn)

    def forward(leaf: Tensor) -> Outputs:
        loss, _ = function(leaf, mask, batch.advantages, mask, **options)
        return Outputs(loss * scale)

    _try_compiler(lambda: forward(case.logprobs).loss.backward())
    return Provider("liger", version, forward, POLICY)


def _verl(case: TokenCase) -> Provider:
    """verl's SAPO loss of ready log-probs, eager as verl runs it."""
    module, version = _require("verl", "verl.trainer.ppo.core_algos")
    batch, mask = case.batch, _policy_mask(case)
    policy, advantages = case.objective.policy, batch.advantages
    assert isinstance(policy, SAPO) and advantages is not None
    config = module.ActorConfig.__new__(module.ActorConfig)  # its __init__ asks for a whole training setup
    settings: dict[str, Any] = {"tau_pos": policy.tau_pos, "tau_neg": policy.tau_neg, "global_batch_info": {}}
    for name, value in settings.items():
        object.__setattr__(config, name, value)
    advantages_ST = advantages[:, None].expand(mask.shape)

    def forward(leaf: Tensor) -> Outputs:
        loss, _ = module.compute_policy_loss_sapo(batch.old_logprobs, leaf, advantages_ST, mask, config=config)
        return Outputs(loss)

    return Provider("verl", version, forward, POLICY)


def _trl(case: TokenCase) -> Provider:
    if (version := installed_version("trl")) is None:
        raise Unavailable("trl is not installed")
    raise Unavailable(f"trl {version} computes its loss inside GRPOTrainer, not in a function of ready log-probs")


PROVIDERS: dict[str, Callable[[TokenCase], Provider]] = {
    **{f"{OURS}-{backend}": partial(_ours, backend) for backend in library.BACKENDS},
    "eager": partial(_by_hand, True, False),
    "eager-loss": partial(_by_hand, False, False),
    "compile": partial(_by_hand, True, True),
    "compile-loss": partial(_by_hand, False, True),
    "liger": _liger,
    "verl": _verl,
    "trl": _trl,
}


def verify(provider: Provider, case: TokenCase) -> float:
    """Run the provider once and hold the result against the case's reference.

    Returns:
        The largest error, in units of the bound.

    Raises:
        WrongResult: naming provider, result, place and error.
    """
    leaf = case.logprobs
    with provider.context():
        outputs = provider.forward(leaf)
        (gradient,) = torch.autograd.grad(outputs.loss, leaf)
    try:
        return case.check(outputs, gradient, policy_only=provider.outputs == POLICY)
    except WrongResult as error:
        raise WrongResult(f"{provider.name}: {error}") from None
