"""A function of a token, ready to be evaluated: traced, and checked against autograd of itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .eager import LOG_RATIO_BOUND, TensorToken, eager_loss
from .expression import ZERO
from .function import PolicyObjective, SupervisedObjective
from .steps import LEAVES, Steps
from .trace import Program, trace

Total = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Term:
    """An objective's program in torch's operations: as fast as eager code, without autograd, and torch.compile sees
    through it."""

    program: Program
    summands: Steps
    own: Steps  # loss, own slope, pulls
    through: Steps  # what the sums bring to the slope
    seen: Steps  # clipped, update: those that there are
    reads_entropy: bool
    reads_reference: bool

    @property
    def coupled(self) -> bool:
        """Whether a token waits for its sequence."""
        return bool(self.program.sums)

    def __call__(
        self,
        logp_N: Tensor,
        values: Mapping[str, Tensor | None],
        counts_N: Tensor,
        total: Total,
        factor_N: Tensor | None,
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Loss and slope of each token, and ``clipped`` or ``update``, all ``(N,)`` without graph.

        Args:
            logp_N: log-probs.
            values: ``old_logp`` (None: on-policy), ``ref_logp``, ``advantage``, ``entropy``; None where not read.
            counts_N: bool, the tokens that take part.
            total: of values that are 0 elsewhere, the sum over each token's sequence.
            factor_N: multiplies loss and slope. Through sums over the sequence the factors of all tokens reach each.
        """
        given = self._given(logp_N.detach(), values)

        def over(x_N: Tensor, kind: str) -> Tensor:
            sums_N = total(torch.where(counts_N, x_N, 0.0))
            return sums_N / total(counts_N.to(logp_N.dtype)).clamp(min=1.0) if kind == "mean" else sums_N

        sums = self.program.sums
        totals = [over(x, s.kind) for x, s in zip(self.summands(given, (), ()), sums, strict=True)]
        loss_N, slope_N, *pulls = self.own(given, totals, ())
        if factor_N is not None:
            loss_N, slope_N, *pulls = (factor_N * x for x in (loss_N, slope_N, *pulls))
        if sums:
            gains = [over(x, s.kind) for x, s in zip(pulls, sums, strict=True)]
            slope_N = slope_N + self.through(given, totals, gains)[0]
        names = [name for name in ("clipped", "update") if getattr(self.program, name) is not None]
        seen = dict(zip(names, self.seen(given, totals, ()), strict=True))
        return loss_N, torch.where(counts_N, slope_N, 0.0), seen

    @staticmethod
    def _given(logp_N: Tensor, values: Mapping[str, Tensor | None]) -> tuple[Tensor | None, ...]:
        old_N = values["old_logp"]
        if old_N is None:
            old_N = torch.where(logp_N.isinf(), 0.0, logp_N)
        raw_N = logp_N - old_N
        own = {"logp": logp_N, "old_logp": old_N, "log_ratio": raw_N.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)}
        leaves = {**values, **own}
        return *(leaves[name] for name in LEAVES), ~(raw_N.abs() > LOG_RATIO_BOUND)


@lru_cache(maxsize=256)
def term_of(objective: PolicyObjective | SupervisedObjective) -> Term:
    """The term of an objective, checked once against autograd in float64.

    Raises:
        TypeError, AttributeError: in the objective's own line, where it does what has no meaning for a single token.
        ValueError: where its loss is not finite, has no gradient, or is not what its function gives on tensors.
    """
    program = trace(objective)
    roots = {
        "summands": [s.value for s in program.sums],
        "own": [program.loss, program.slope, *(s.pull for s in program.sums)],
        "through": [program.through] if program.sums else [],
        "seen": [n for n in (program.clipped, program.update) if n is not None],
    }
    functions = {name: Steps(nodes, program.params, len(program.sums)) for name, nodes in roots.items()}
    leaves = program.leaves
    term = Term(program, **functions, reads_entropy="entropy" in leaves, reads_reference="ref_logp" in leaves)
    if program.slope is ZERO and program.through is ZERO:
        raise ValueError(f"{type(objective).__name__}.loss(t) has no gradient: nothing in it depends on t.logp, or all "
                         "of it is detached")  # fmt: skip
    _check(objective, term)
    return term


def _check(objective: PolicyObjective | SupervisedObjective, term: Term) -> None:
    """Holds a term to autograd of its function, on ordinary tokens of two sequences."""
    generator, sizes = torch.Generator().manual_seed(0), (37, 11)
    ids_N = torch.repeat_interleave(torch.arange(2), torch.tensor(sizes))

    def random(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(sum(sizes), generator=generator, dtype=torch.float64)

    def total(x_N: Tensor) -> Tensor:
        return x_N.new_zeros(2).index_add(0, ids_N, x_N)[ids_N]

    logp_N, counts_N = random(-4.0, -0.01), random(0.0, 1.0) < 0.8
    values = {
        "old_logp": (logp_N + random(-0.5, 0.5)).clamp(max=-1e-3),
        "ref_logp": (logp_N + random(-1.0, 1.0)).clamp(max=-1e-3),
        "advantage": random(-2.0, 2.0),
        "entropy": random(0.1, 3.0),
    }
    leaf = logp_N.clone().requires_grad_()
    with torch.enable_grad():
        want_N = eager_loss(objective, TensorToken(leaf, values, counts_N, total))
        summed = torch.where(counts_N, want_N, 0.0).sum()
        slope_N = torch.autograd.grad(summed, leaf, allow_unused=True)[0] if summed.requires_grad else None
    slope_N = torch.zeros_like(logp_N) if slope_N is None else slope_N
    loss_N, got_N, _ = term(logp_N, values, counts_N, total, None)
    for name, got, want in (("loss", loss_N, want_N.detach()), ("slope", got_N, slope_N)):
        got, want, kind = got[counts_N], want[counts_N], type(objective).__name__
        if not bool(torch.isfinite(want).all()):
            odd = want[~want.isfinite()][0].item()
            raise ValueError(
                f"{kind}.loss(t) must be finite and have a finite gradient; its {name} is {odd} of a token"
            )
        error = ((got - want).abs() / (1 + want.abs())).nan_to_num(nan=math.inf)
        if not bool(error.max() < 1e-9):
            n = int(error.argmax())
            at = ", ".join(f"{k} = {v[counts_N][n].item():.6g}" for k, v in {"logp": logp_N, **values}.items())
            raise ValueError(
                f"{kind}.loss(t) differs between its trace and autograd: {name} {got[n].item():.6g} and "
                f"{want[n].item():.6g} of a token with {at}. loss(t) must be a function of the token alone, the same "
                "at every call"
            )
