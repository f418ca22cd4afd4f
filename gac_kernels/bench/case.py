"""What every benchmark case is: inputs, bytes that must move, and what is right.

A case is checked before it is timed, against the reference formulas in float64 on the very inputs that are timed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..objectives import NLL, SAPO, HybridObjective
from ..signals import CR2, CS2, DIFF_NORM, DISAGREEMENT, OWN_NORM
from ..types import HybridLoss, TokenBatch
from .check import WrongResult, column_bound, compare, elementwise_bound, metric_bound, rounding, scalar_bound
from .measure import WARMUP_ROUNDS, Contestant, copy_contestant

MODES = ("forward", "backward", "full")
DTYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
METRICS = ("ratio_mean", "ratio_max", "approx_kl", "effective_update_ratio")
UNTIMED = {"rollout_unscored"}  # made when it is asked for, by nobody else
EXPERT_SHARE = 4  # one sequence in four is a demonstration


class Outputs(NamedTuple):
    """What a provider returns; None for what it does not compute."""

    loss: Tensor
    logprobs: Tensor | None = None
    rows: Tensor | None = None
    metrics: dict[str, Tensor] | None = None
    entropy: Tensor | None = None


class Expected(NamedTuple):
    """What is right, in float64: ``slope`` is ``d loss / d logprobs``, ``slope_error`` how far the log-probs' own error
    (``Case.logprob_error``) moves it."""

    result: HybridLoss
    slope: Tensor
    slope_error: Tensor


class Case(ABC):
    """The hybrid loss, SAPO on three sequences in four, NLL with phi on the others, off-policy: inputs and answers.

    Attributes:
        kernel: name in records. unit: what the two numbers of its size count. default_sizes, modes: timed unless told
            otherwise. warmup_rounds, min_rounds: see ``measure``.
        dtype: of the differentiable input. device. seed: of the inputs. ragged: some places are masked.
        batch, mu: the rest of the input.
    """

    kernel: ClassVar[str]
    unit: ClassVar[str]
    default_sizes: ClassVar[tuple[tuple[int, int], ...]]
    modes: ClassVar[tuple[str, ...]] = MODES
    warmup_rounds: ClassVar[int] = WARMUP_ROUNDS
    min_rounds: ClassVar[int] = 11
    objective: ClassVar[HybridObjective] = HybridObjective(SAPO(), NLL("phi"))
    floor_name: ClassVar[str] = "copy"  # of the contestant that does the least that anybody must
    dtype: torch.dtype
    device: str
    seed: int
    ragged: bool = False

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]: ...

    @property
    def x(self) -> str:
        """What sets the case apart from others of its kernel, as in records; float32 goes without saying."""
        return self.title.removeprefix(f"{self.kernel} ").replace(" float32", "")

    @property
    def title(self) -> str:
        first, second = self.size
        return f"{self.kernel} {first}x{second} {dtype_name(self.dtype)}" + (" ragged" if self.ragged else "")

    @property
    @abstractmethod
    def batch(self) -> TokenBatch: ...

    @property
    def policy_batch(self) -> TokenBatch:
        """What peers that know no demonstrations are given; their loss is the policy branch's."""
        return self.batch

    @cached_property
    def mu(self) -> Tensor:
        return torch.tensor(0.4, device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))

    @cached_property
    def live_tokens(self) -> int:
        return int(self.batch.mask.sum())

    @abstractmethod
    def leaf(self) -> Tensor:
        """The input to differentiate by, a new leaf over the same memory with the same values every time."""

    @property
    def leaf_bytes(self) -> int:
        return self.size[0] * self.size[1] * self.dtype.itemsize

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        """Further leaves that the loss is differentiated by."""
        return ()

    def release(self) -> None:
        """Give back the memory of inputs and answers, which are made anew when they are asked for."""
        for name in ("_inputs", "_work", "_answers", "_expected", "_weight", "mu", "policy_batch"):
            vars(self).pop(name, None)

    @abstractmethod
    def bytes(self, mode: str) -> int:
        """The least that any implementation moves in a mode: each input that counts read once, each output written
        once. What is one number a sequence is left out."""

    def floor(self, mode: str) -> Contestant:
        """The least that anybody must do in a mode: a copy of as many bytes."""
        return copy_contestant(*self.copy_buffers(self.bytes(mode) // 2), self.leaf)

    def copy_buffers(self, num_bytes: int) -> tuple[Tensor, Tensor]:
        """From where to where the copy goes that measures the floor; uint8."""
        source = torch.ones(max(1, num_bytes), dtype=torch.uint8, device=self.device)
        return source, torch.empty_like(source)

    @property
    def logprob_error(self) -> float:
        """Absolute error that a sound implementation may have made in the log-probs before the loss begins."""
        return 0.0

    @property
    def entropy_error(self) -> float:
        return 0.0

    @abstractmethod
    def _logprobs(self) -> tuple[Tensor, dict[str, Any]]:
        """Log-probs ``(S, T)`` in float64, and entropy and sum of p squared where the case has them."""

    @cached_property
    def _expected(self) -> dict[str, Expected]:
        """For all outputs (``hybrid``) and for the policy branch alone (``policy``)."""
        (logp, rows), found = self._logprobs(), {}
        for name, batch, mu in (
            ("hybrid", self.batch, self.mu.double()),
            ("policy", self.policy_batch, torch.zeros_like(self.mu, dtype=torch.float64)),
        ):

            def differentiated(shift: float, batch: TokenBatch = batch, mu: Tensor = mu) -> tuple[HybridLoss, Tensor]:
                leaf = (logp + shift).requires_grad_()
                out = reference.hybrid_loss(leaf, batch, self.objective, mu, **rows)
                return out, torch.autograd.grad(out.loss, leaf)[0]

            out, slope = differentiated(0.0)
            moved = [(differentiated(sign * self.logprob_error)[1] - slope).abs() for sign in (1.0, -1.0)]
            found[name] = Expected(out, slope, torch.maximum(*moved))
        return found

    @abstractmethod
    def _compare_gradient(self, gradient: Tensor, want: Expected) -> float: ...

    def _compare_others(self, gradients: tuple[Tensor, ...], want: Expected) -> float:
        """Those of ``parameters``."""
        return 0.0

    def check(self, outputs: Outputs, gradient: Tensor, *others: Tensor, policy_only: bool = False) -> float:
        """Compare with float64; returns the largest error in units of its bound (see ``check``), else WrongResult."""
        expected = self._expected["policy" if policy_only else "hybrid"]
        want, dtype, error = expected.result, self.dtype, self.logprob_error
        wide = torch.promote_types(dtype, torch.float32)
        condition = error / rounding(dtype) * expected.slope.abs().sum()
        worst = [
            compare("loss", outputs.loss, want.loss, scalar_bound(want.loss, dtype, condition)),
            self._compare_gradient(gradient, expected),
            self._compare_others(others, expected),
        ]
        for name, got, right, own in (
            ("logprobs", outputs.logprobs, want.logprobs, error),
            ("entropy", outputs.entropy, want.token_entropy, self.entropy_error),
        ):
            if got is not None and right is not None:
                bound = elementwise_bound(right, wide) + torch.where(self.batch.mask, own, 0.0)
                worst.append(compare(name, got, right, bound))
        if outputs.rows is not None:
            rows = want.signals.rows
            bound = column_bound(rows, dtype) + 16 * error * _without_cancellation(rows).abs().amax(0)
            worst.append(compare("signals", outputs.rows, rows, bound))
        names = want.metrics.keys() - UNTIMED
        if outputs.metrics is not None and outputs.metrics.keys() - UNTIMED != names:
            raise WrongResult(f"metrics are {', '.join(outputs.metrics)}; the reference has {', '.join(sorted(names))}")
        for name, got in (outputs.metrics or {}).items():
            value = want.metrics[name]
            worst.append(compare(name, got, value, metric_bound(value, dtype) + 2 * error * (1.0 + value.abs())))
        return max(worst)


def _without_cancellation(rows_SC: Tensor) -> Tensor:
    """The signals' sums with ``n = ||1_y - p||^2 = 1 - 2 p + sum p^2`` replaced by those without it: where p is close
    to 1 so little is left of it that its error shows in terms of 1."""
    rows_SC = rows_SC.clone()
    rows_SC[:, OWN_NORM] = torch.maximum(rows_SC[:, CS2], rows_SC[:, CR2])
    rows_SC[:, DIFF_NORM] = rows_SC[:, DISAGREEMENT]
    return rows_SC


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def make_batch(targets: Tensor, mask: Tensor, old: Tensor, generator: torch.Generator, device: str) -> TokenBatch:
    """A padded batch of rollouts and demonstrations on the device."""
    S = targets.shape[0]
    return TokenBatch.from_padded(
        targets.to(device),
        mask.to(device),
        is_expert_S=(torch.arange(S) % EXPERT_SHARE == 0).to(device),
        advantages=torch.randn(S, generator=generator).to(device),
        old_logprobs=old.to(device),
    )
