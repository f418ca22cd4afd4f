"""Benchmark cases: inputs, bytes that must move, and what is right.

A case is checked before it is timed, against the reference formulas in float64 on the very inputs that are timed.
Shapes: S sequences, T tokens a sequence, padded; N = S T places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..objectives import NLL, SAPO, HybridObjective
from ..types import HybridLoss, TokenBatch
from .check import WrongResult, column_bound, compare, elementwise_bound, metric_bound, scalar_bound

MODES = ("forward", "backward", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
METRICS = ("ratio_mean", "ratio_max", "approx_kl", "effective_update_ratio")
EXPERT_SHARE = 4  # one row in four is a demonstration


class Outputs(NamedTuple):
    """What a provider returns; None for what it does not compute."""

    loss: Tensor
    logprobs: Tensor | None = None
    rows: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


@dataclass(frozen=True, eq=False)
class TokenCase:
    """The hybrid loss of ready log-probs: SAPO on three rows in four, NLL with phi on the others, off-policy.

    Lengths are drawn from T / 2 to T, log-probs from -12 to 0, log-ratios from a normal distribution of width 0.2.

    Attributes:
        sequences, tokens: S and T. dtype: of the log-probs and old log-probs. device. seed: of the inputs.
    """

    sequences: int
    tokens: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    seed: int = 0

    kernel = "token_loss"
    objective = HybridObjective(SAPO(), NLL("phi"))

    def __post_init__(self) -> None:
        if self.sequences < EXPERT_SHARE or self.tokens < 1:
            raise ValueError(f"tokens must be SxT with S >= {EXPERT_SHARE} and T >= 1, got {self.x}")

    @property
    def x(self) -> str:
        return f"{self.sequences}x{self.tokens}"

    @cached_property
    def _inputs(self) -> tuple[Tensor, TokenBatch, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        S, T = shape = self.sequences, self.tokens
        length_S = torch.randint((T + 1) // 2, T + 1, (S,), generator=generator)
        logp = -12.0 * torch.rand(shape, generator=generator).square()
        old = (logp + 0.2 * torch.randn(shape, generator=generator)).clamp(max=0.0)
        batch = TokenBatch.from_padded(
            torch.randint(0, 32000, shape, generator=generator).to(self.device),
            (torch.arange(T) < length_S[:, None]).to(self.device),
            is_expert_S=(torch.arange(S) % EXPERT_SHARE == 0).to(self.device),
            advantages=torch.randn(S, generator=generator).to(self.device),
            old_logprobs=old.to(self.device, self.dtype),
        )
        mu = torch.tensor(0.4, device=self.device, dtype=torch.promote_types(self.dtype, torch.float32))
        return logp.to(self.device, self.dtype), batch, mu

    @property
    def logprobs(self) -> Tensor:
        """``(S, T)``, a new leaf each time it is asked for, over the same memory."""
        return self._inputs[0].detach().requires_grad_()

    @property
    def batch(self) -> TokenBatch:
        return self._inputs[1]

    @property
    def mu(self) -> Tensor:
        return self._inputs[2]

    @cached_property
    def live_tokens(self) -> int:
        return int(self.batch.mask.sum())

    def bytes(self, mode: str) -> int:
        """The least that any implementation moves: each input that counts read once, each output written once.

        Inputs: log-probs and old log-probs of the live tokens, the mask. Outputs: the log-probs with 0 where masked
        (forward), the gradient (backward, which also has to read one slope a live token where it stands alone).
        What is one number a sequence is left out.
        """
        item, places = self.dtype.itemsize, self.sequences * self.tokens
        result = torch.promote_types(self.dtype, torch.float32).itemsize
        inputs, logprobs, gradient = 2 * item * self.live_tokens + places, result * places, item * places
        return {
            "forward": inputs + logprobs,
            "backward": item * self.live_tokens + gradient,
            "full": inputs + logprobs + gradient,
        }[mode]

    @cached_property
    def _expected(self) -> dict[str, tuple[HybridLoss, Tensor]]:
        """For all outputs (``hybrid``) and for the policy branch alone (``policy``): the result and its gradient."""
        logp, batch, mu = self._inputs
        expected = {}
        for name, weight in (("hybrid", mu.double()), ("policy", torch.zeros_like(mu, dtype=torch.float64))):
            leaf = logp.double().requires_grad_()
            out = reference.hybrid_loss(leaf, batch, self.objective, weight)
            expected[name] = out, torch.autograd.grad(out.loss, leaf)[0]
        return expected

    def check(self, outputs: Outputs, gradient: Tensor, *, policy_only: bool = False) -> float:
        """Compare with float64; returns the largest error in units of its bound (see ``check``), else WrongResult."""
        want, want_gradient = self._expected["policy" if policy_only else "hybrid"]
        worst = [
            compare("loss", outputs.loss, want.loss, scalar_bound(want.loss, self.dtype)),
            compare("gradient", gradient, want_gradient, elementwise_bound(want_gradient, self.dtype)),
        ]
        if outputs.logprobs is not None:
            bound = elementwise_bound(want.logprobs, torch.promote_types(self.dtype, torch.float32))
            worst.append(compare("logprobs", outputs.logprobs, want.logprobs, bound))
        if outputs.rows is not None:
            rows = want.signals.rows
            worst.append(compare("signals", outputs.rows, rows, column_bound(rows, self.dtype)))
        if outputs.metrics is not None and outputs.metrics.keys() != want.metrics.keys():
            raise WrongResult(f"metrics are {', '.join(outputs.metrics)}; the reference has {', '.join(want.metrics)}")
        for name, got in (outputs.metrics or {}).items():
            value = want.metrics[name]
            worst.append(compare(name, got, value, metric_bound(value, self.dtype)))
        return max(worst)


CASES = {"token": TokenCase}
