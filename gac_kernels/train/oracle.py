"""What the estimators estimate, from the gradients of all parameters, and the estimators on sequences of their own.

Units: all is about the gradients of the two branches' mean losses (mu and 1 - mu taken out). The noise of a branch is
the trace of the covariance of its gradient over batches of one *step's* size; it is measured on batches ``parts`` times
smaller, and divided by ``parts``, for the noise of a mean of independent sequences falls with their number.

Shapes: S sequences, T response places, 3 the signals (sigma_s^2, sigma_r^2, Delta^2).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controller import optimal_mu
from ..objectives import GRPO, NLL, HybridObjective
from ..signals import (
    ADVANTAGE,
    CR,
    CR2,
    CS,
    CS2,
    CSCR,
    DIFF_NORM,
    DISAGREEMENT,
    EXPERT,
    OWN_NORM,
    Signals,
    concatenate,
    estimate,
)
from .collect import Collector
from .loop import Trainer
from .policy import Policy
from .rollouts import RolloutBatch
from .tasks import Example, Task

SHARES = 3  # two oracle halves and the estimators: no problem is in two of them
ESTIMATORS = {"coefficient": ("coefficient", False), "coefficient-znorm": ("coefficient", True)} | {
    name: (name, False) for name in ("logit", "hidden")
}
SEARCH = 4096  # problems looked at for one of a share


class Share:
    """The problems of a task that fall to one of ``SHARES`` by a checksum of their prompt.

    Demonstrations are drawn with replacement: without it batches of a small pool are not independent, and the mean's
    noise is then not the batches' noise over their number.
    """

    def __init__(self, task: Task, part: int, seed: int) -> None:
        self._task, self._part, self._seed = task, part, seed
        examples = [task.demonstration(position) for position in range(task.demonstrations)]
        self._pool = [example for example in examples if self._owns(example)]
        if not self._pool:
            raise ValueError(
                f"task needs demonstrations in each of {SHARES} disjoint shares, got none in share {part} "
                f"of {task.demonstrations}"
            )
        self.demonstrations = len(self._pool)

    def _owns(self, example: Example) -> bool:
        return zlib.crc32(f"share/{example.prompt}".encode()) % SHARES == self._part

    def prompt(self, position: int) -> Example:
        """The first problem of the share from a place of its own on."""
        first = random.Random(f"{self._seed}/{self._part}/{position}").randrange(1 << 40)
        for place in range(first, first + SEARCH):
            if self._owns(example := self._task.prompt(place)):
                return example
        raise ValueError(f"task needs prompts in each of {SHARES} disjoint shares, got none in share {self._part}")

    def demonstration(self, position: int) -> Example:
        """One of the pool, each equally likely at every position."""
        return random.Random(f"demonstration/{self._seed}/{self._part}/{position}").choice(self._pool)

    def evaluation(self) -> list[Example]:
        """The task's own."""
        return self._task.evaluation()

    def reward(self, example: Example, completion: str) -> float:
        """The task's own."""
        return self._task.reward(example, completion)

    def texts(self) -> Iterable[str]:
        """The task's own."""
        return self._task.texts()


class Moments:
    """Running sum and sum of squared norms of a branch's gradients: one gradient's memory, however many come.

    The sum stays in the gradients' dtype (float32 at least), norms are added up in float64.
    """

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sums: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Take in the gradient of one batch, one tensor a parameter."""
        wide = [g.detach().to(torch.promote_types(g.dtype, torch.float32)) for g in gradients]
        self.squares += _dot(wide, wide)
        if self.sums:
            for total, gradient in zip(self.sums, wide, strict=True):
                total += gradient
        else:
            self.sums = [gradient.clone() for gradient in wide]
        self.count += 1

    def __add__(self, other: Moments) -> Moments:
        both = Moments()
        both.count, both.squares = self.count + other.count, self.squares + other.squares
        both.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        return both

    @property
    def variance(self) -> float:
        """Trace of the covariance of one batch's gradient, unbiased (n - 1)."""
        if self.count < 2:
            raise ValueError(f"a variance needs at least 2 batches, got {self.count}")
        return max(0.0, self.squares - _dot(self.sums, self.sums) / self.count) / (self.count - 1)


def distance2(a: Moments, b: Moments) -> float:
    """Squared distance of the means less what sampling adds to it: unbiased, so it may come out below 0."""
    apart = [x / a.count - y / b.count for x, y in zip(a.sums, b.sums, strict=True)]
    return _dot(apart, apart) - a.variance / a.count - b.variance / b.count


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return float(sum((x.double() * y.double()).sum() for x, y in zip(a, b, strict=True)))


@dataclass(frozen=True)
class Half:
    """Moments of both branches over one set of batches."""

    supervised: Moments
    policy: Moments

    def __add__(self, other: Half) -> Half:
        return Half(self.supervised + other.supervised, self.policy + other.policy)

    def signals(self, parts: int) -> tuple[float, float, float]:
        """(sigma_s^2, sigma_r^2, Delta^2) of a step ``parts`` times as large as the batches."""
        distance = distance2(self.supervised, self.policy)
        return self.supervised.variance / parts, self.policy.variance / parts, distance


def optimum(signals: Sequence[float], alpha: float = 0.5) -> float:
    """mu* of (sigma_s^2, sigma_r^2, Delta^2); a distance below 0 counts as 0, and nothing at all has none: nan."""
    sigma_s2, sigma_r2, delta2 = signals[0], signals[1], max(0.0, signals[2])
    if delta2 + sigma_s2 + sigma_r2 <= 0.0:
        return float("nan")
    return float(optimal_mu(sigma_s2, sigma_r2, delta2, alpha))


def branch(rows: RolloutBatch, *, expert: bool) -> RolloutBatch:
    """The rows of one branch alone."""
    keep = rows.is_expert if expert else ~rows.is_expert
    return replace(rows, **{name: value[keep] for name, value in rows.state_dict().items()})


def branch_gradient(
    policy: Policy, rows: RolloutBatch, objective: HybridObjective, *, expert: bool
) -> tuple[Tensor, ...]:
    """Gradient of a branch's mean loss over all parameters: mu = 1 for demonstrations, 0 for rollouts."""
    loss, _ = policy(branch(rows, expert=expert), 1.0, objective, 1.0 if expert else 0.0)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


class Oracle:
    """Fresh sequences at the trainer's present weights, in shares that never meet; changes nothing in the trainer.

    Args:
        trainer: of one rank, with temperature 1.
        parts: batches that a step's sequences are cut into; must divide prompts and demonstrations of a step.
    """

    def __init__(self, trainer: Trainer, parts: int, seed: int) -> None:
        config, own = trainer.config, trainer.collector
        for name in ("prompts_per_step", "demonstrations_per_step"):
            if getattr(config, name) % parts or not getattr(config, name):
                raise ValueError(f"{name} must be a positive multiple of {parts}, got {getattr(config, name)}")
        if config.temperature != 1.0:
            raise ValueError(f"temperature must be 1.0 for the oracle, got {config.temperature}")
        self.trainer, self.parts = trainer, parts
        whole, cut = replace(config, micro_batches=1), replace(config, micro_batches=parts)
        self.collectors = [
            Collector(c, Share(own.task, part, seed), own.codec, own.ranks) for part, c in enumerate((cut, cut, whole))
        ]
        self._generator = torch.Generator().manual_seed(seed)

    def halves(self, batches: int) -> tuple[Half, Half]:
        """Two independent halves of ``batches`` batches each (rounded up to whole steps)."""
        first, second = (self._half(collector, batches) for collector in self.collectors[:2])
        return first, second

    def _half(self, collector: Collector, batches: int) -> Half:
        half, objective = Half(Moments(), Moments()), self.trainer.config.objective
        while half.policy.count < batches:
            for rows in self._collect(collector).micro_batches():
                half.supervised.add(branch_gradient(self.trainer.policy, rows, objective, expert=True))
                half.policy.add(branch_gradient(self.trainer.policy, rows, objective, expert=False))
        return half

    def _collect(self, collector: Collector) -> RolloutBatch:
        # Draws of its own: the run goes on as if nobody had looked, for its trainer keeps its own state too.
        device = torch.device(self.trainer.config.device)
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
            return collector.rollouts(self.trainer.policy, self.trainer.mixing).batch

    def fresh(self) -> RolloutBatch:
        """A step's batch from the estimators' share."""
        return self._collect(self.collectors[2])

    def signals(self, rows: RolloutBatch) -> dict[str, Signals]:
        """Of the ordinary pass, and of the three falsified ones: ``advantages``, ``phi``, ``constant``."""
        objective = self.trainer.config.objective
        live_S = ~rows.is_expert
        shuffled, ones = rows.advantages.clone(), rows.advantages.clone()
        shuffled[live_S] = self._shuffle(shuffled[live_S])
        ones[live_S] = 1.0
        return {
            "ordinary": self._pass(rows, objective),
            "advantages": self._pass(replace(rows, advantages=shuffled), objective),
            "phi": self._phi_shuffled(rows, objective),
            "constant": self._pass(replace(rows, advantages=ones), replace(objective, supervised=NLL("none"))),
        }

    def _pass(self, rows: RolloutBatch, objective: HybridObjective) -> Signals:
        _, result = self.trainer.policy(rows, 1.0, objective, 0.5)
        return result.signals

    def _phi_shuffled(self, rows: RolloutBatch, objective: HybridObjective) -> Signals:
        """Demonstrations whose token coefficients are each other's: run as rollouts, whose coefficient is -advantage
        at a ratio of 1 and can be given a token; the columns are then put where a demonstration has them."""
        rollouts, experts = branch(rows, expert=False), branch(rows, expert=True)
        _, found = self.trainer.policy(experts, 1.0, objective, 0.5)
        p_ST = found.logprobs.exp()
        phi_ST = torch.ones_like(p_ST)
        if isinstance(objective.supervised, NLL) and objective.supervised.weight == "phi":
            phi_ST = p_ST * (1.0 - p_ST)
        phi_ST[experts.response_mask] = self._shuffle(phi_ST[experts.response_mask])
        as_rollouts = replace(experts, advantages=phi_ST, is_expert=torch.zeros_like(experts.is_expert))
        signals = self._pass(as_rollouts, replace(objective, policy=GRPO()))
        columns = list(signals.rows.detach().unbind(1))
        ours = found.signals.rows.detach().unbind(1)
        columns[EXPERT], columns[CS], columns[CS2] = ours[EXPERT], columns[CR], columns[CR2]
        columns[DISAGREEMENT], columns[DIFF_NORM] = columns[CR2], columns[OWN_NORM]
        columns[ADVANTAGE] = columns[CR] = columns[CR2] = columns[CSCR] = torch.zeros_like(ours[EXPERT])
        moved = replace(signals, rows=torch.stack(columns, dim=1))
        return concatenate([self._pass(rollouts, objective), moved])

    def _shuffle(self, values: Tensor) -> Tensor:
        return values[torch.randperm(len(values), generator=self._generator).to(values.device)]


def estimates(signals: Signals) -> dict[str, tuple[float, float, float]]:
    """The three signals by every estimator that the pass can feed (``hidden`` needs a head that is understood)."""
    found = {}
    for name, (estimator, znorm) in ESTIMATORS.items():
        if estimator == "hidden" and signals.hidden is None:
            continue
        values, present = estimate(signals, estimator, trim=0.1, znorm=znorm)
        a, b, c = torch.where(present, values, torch.nan).tolist()
        found[name] = (a, b, c)
    return found
