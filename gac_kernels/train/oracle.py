"""What the estimators estimate, from the gradients of all parameters.

Units: all is about the gradients of the two branches' mean losses (mu and 1 - mu taken out). The noise of a branch is
the trace of the covariance of its gradient over batches of one *step's* size; it is measured on batches ``parts`` times
smaller, and divided by ``parts``, for the noise of a mean of independent sequences falls with their number.

The truth must vary for a correlation to mean anything, and not along the run alone. So every branch is looked at in
several conditions at the same weights: demonstrations of which a share is another problem's (``EXCHANGED``), verdicts
of which a share is turned over (``INVERTED``). The first condition of each is the data as they are. Conditions of one
branch share their problems and rollouts, and every pair of them, one of each branch, is a point: its noises are those
of its two conditions, its distance is measured between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..controller import optimal_mu
from ..gradients import accumulate_moments_, gradient_moments
from ..objectives import HybridObjective
from .loop import Trainer
from .policy import Policy
from .rollouts import Answered, RolloutBatch, Sampling, assemble, generate
from .shares import SHARES, Share
from .tasks import Example

EXCHANGED = (0.0, 0.5, 1.0)  # share of the demonstrations that stand under another problem's prompt
INVERTED = (0.0, 0.5, 1.0)  # share of the verdicts (rewards 0 and 1) that are turned over; 0.5 is a coin toss


class Moments:
    """Running sum and sum of squared norms of a branch's gradients: one gradient's memory, however many come.

    The sum stays in the gradients' dtype (float32 at least), norms are added up in float64.
    """

    def __init__(self) -> None:
        self.count, self.squares = 0, 0.0
        self.sums: list[Tensor] = []

    def add(self, gradients: Sequence[Tensor]) -> None:
        """Take in the gradient of one batch, one tensor a parameter."""
        if not self.sums:
            wide = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
            self.sums = [g.new_zeros(g.shape, dtype=dtype) for g, dtype in zip(gradients, wide, strict=True)]
        self.squares += float(accumulate_moments_(self.sums, gradients))
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
        return max(0.0, self.squares - float(gradient_moments(self.sums, self.sums)[0]) / self.count) / (self.count - 1)


def distance2(a: Moments, b: Moments) -> float:
    """Squared distance of the means less what sampling adds to it: unbiased, so it may come out below 0."""
    of_a, of_b, both = gradient_moments(a.sums, b.sums).tolist()
    apart = of_a / a.count**2 + of_b / b.count**2 - 2.0 * both / (a.count * b.count)
    return float(apart - a.variance / a.count - b.variance / b.count)


@dataclass(frozen=True)
class Half:
    """Moments of both branches over one set of batches, one a condition."""

    supervised: list[Moments]
    policy: list[Moments]

    def __add__(self, other: Half) -> Half:
        return Half(
            [a + b for a, b in zip(self.supervised, other.supervised, strict=True)],
            [a + b for a, b in zip(self.policy, other.policy, strict=True)],
        )

    def signals(self, parts: int, exchanged: int, inverted: int) -> tuple[float, float, float]:
        """(sigma_s^2, sigma_r^2, Delta^2) of a step ``parts`` times as large as the batches, in a pair of conditions
        given by their places in ``EXCHANGED`` and ``INVERTED``."""
        supervised, policy = self.supervised[exchanged], self.policy[inverted]
        return supervised.variance / parts, policy.variance / parts, distance2(supervised, policy)


def optimum(signals: Sequence[float], alpha: float = 0.5, *, cap: float | None = None) -> float:
    """mu* of (sigma_s^2, sigma_r^2, Delta^2); a distance below 0 counts as 0, and nothing at all has none: nan.

    cap: the distance counts for at most this multiple of the noise, as under ``disagreement_cap``.
    """
    sigma_s2, sigma_r2, delta2 = signals[0], signals[1], max(0.0, signals[2])
    if cap is not None:
        delta2 = min(delta2, cap * (sigma_s2 + sigma_r2))
    if delta2 + sigma_s2 + sigma_r2 <= 0.0:
        return float("nan")
    return float(optimal_mu(sigma_s2, sigma_r2, delta2, alpha))


def branch_gradient(
    policy: Policy, rows: RolloutBatch, objective: HybridObjective, *, expert: bool
) -> tuple[Tensor, ...]:
    """Gradient over all parameters of the mean loss of rows of one branch: mu = 1 for demonstrations, 0 for rollouts.

    On the policy's own rollouts, so at importance ratios of 1.
    """
    loss, _ = policy(rows, 1.0, objective, 1.0 if expert else 0.0)
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.autograd.grad(loss, parameters, materialize_grads=True)


@dataclass(frozen=True)
class Drawn:
    """Problems of one share with their completions, and what the conditions change of them.

    Attributes:
        answered: whole groups, one after the other. verdict_luck: one number in [0, 1) a completion.
        demonstrations: as many. others: what stands in for each. exchange_luck: one number in [0, 1) each.
    """

    answered: list[Answered]
    verdict_luck: list[float]
    demonstrations: list[Example]
    others: list[Example]
    exchange_luck: list[float]

    def rollouts(self, inverted: float) -> list[Answered]:
        """The completions, the luckless of the share ``inverted`` with the opposite verdict."""
        return [
            replace(row, reward=1.0 - row.reward) if luck < inverted else row
            for row, luck in zip(self.answered, self.verdict_luck, strict=True)
        ]

    def shown(self, exchanged: float) -> list[tuple[int, Example]]:
        """(slot, demonstration), the luckless of the share ``exchanged`` with another problem's text."""
        texts = (
            other.demonstration if luck < exchanged else own.demonstration
            for own, other, luck in zip(self.demonstrations, self.others, self.exchange_luck, strict=True)
        )
        return [
            (slot, replace(own, demonstration=text))
            for slot, (own, text) in enumerate(zip(self.demonstrations, texts, strict=True))
        ]


class Oracle:
    """Fresh sequences at the trainer's present weights, in shares that never meet; changes nothing in the trainer.

    Args:
        trainer: of one rank, with temperature 1.
        parts: batches that a step's sequences are cut into; must divide prompts and demonstrations of a step.
        conditions: how many of ``EXCHANGED`` and of ``INVERTED`` are looked at. Each takes the memory of three
            gradients a branch: of two halves and their sum.
    """

    def __init__(self, trainer: Trainer, parts: int, seed: int, *, conditions: int = len(EXCHANGED)) -> None:
        config, own = trainer.config, trainer.collector
        for name in ("prompts_per_step", "demonstrations_per_step"):
            if getattr(config, name) % parts or not getattr(config, name):
                raise ValueError(f"{name} must be a positive multiple of {parts}, got {getattr(config, name)}")
        if config.temperature != 1.0:
            raise ValueError(f"temperature must be 1.0 for the oracle, got {config.temperature}")
        if config.reference or config.objective.kl_coef:
            raise ValueError("objective must have no KL term for the oracle, which holds no reference model")
        self.trainer, self.parts, self.codec = trainer, parts, own.codec
        self.exchanged, self.inverted = EXCHANGED[:conditions], INVERTED[:conditions]
        self.shares = [Share(own.task, part, seed) for part in range(SHARES)]
        self._generator, self._positions = torch.Generator().manual_seed(seed), [0] * SHARES

    def halves(self, batches: int) -> tuple[Half, Half]:
        """Two independent halves of ``batches`` batches each."""
        first, second = (self._half(part, batches) for part in (0, 1))
        return first, second

    def draw(self, part: int, prompts: int, demonstrations: int) -> Drawn:
        """Fresh problems of a share, answered by the policy."""
        config, share, place = self.trainer.config, self.shares[part], self._positions[part]
        self._positions[part] += max(prompts, 2 * demonstrations)
        examples = [share.prompt(place + i) for i in range(prompts)]
        answered = self._answer([e for e in examples for _ in range(config.group_size)])
        shown = [share.demonstration(place + i) for i in range(2 * demonstrations)]
        return Drawn(
            [replace(row, group=place // config.group_size) for place, row in enumerate(answered)],
            self._luck(len(answered)),
            shown[:demonstrations],
            shown[demonstrations:],
            self._luck(demonstrations),
        )

    def policy_batches(self, drawn: Drawn, inverted: float, batches: int) -> list[RolloutBatch]:
        """The rollouts alone, cut into ``batches``."""
        return self._assemble(drawn.rollouts(inverted), [], batches)

    def supervised_batches(self, drawn: Drawn, exchanged: float, batches: int) -> list[RolloutBatch]:
        """The demonstrations alone, cut into ``batches``."""
        return self._assemble([], drawn.shown(exchanged), batches)

    def shuffle(self, values: Tensor) -> Tensor:
        """In an order of the oracle's own."""
        return values[torch.randperm(len(values), generator=self._generator).to(values.device)]

    def _half(self, part: int, batches: int) -> Half:
        config, policy = self.trainer.config, self.trainer.policy
        prompts, demonstrations = (
            batches * count // self.parts for count in (config.prompts_per_step, config.demonstrations_per_step)
        )
        drawn = self.draw(part, prompts, demonstrations)

        def moments(parts: Iterable[RolloutBatch], *, expert: bool) -> Moments:
            found = Moments()
            for rows in parts:
                found.add(branch_gradient(policy, rows, config.objective, expert=expert))
            return found

        return Half(
            [moments(self.supervised_batches(drawn, share, batches), expert=True) for share in self.exchanged],
            [moments(self.policy_batches(drawn, share, batches), expert=False) for share in self.inverted],
        )

    def _answer(self, examples: Sequence[Example]) -> list[Answered]:
        """One completion an example, ``eval_batch`` of them decoded at once."""
        config, policy, codec = self.trainer.config, self.trainer.policy, self.codec
        sampling, task, found = Sampling(config.max_new_tokens, config.temperature), self.shares[0], []
        with self._own_draws():
            for start in range(0, len(examples), config.eval_batch):
                part = examples[start : start + config.eval_batch]
                prompts = [codec.prompt(example.prompt) for example in part]
                for example, prompt, ids in zip(part, prompts, generate(policy, codec, prompts, sampling), strict=True):
                    found.append(Answered(0, prompt, ids, task.reward(example, codec.text(ids))))
        return found

    def _assemble(
        self, answered: Sequence[Answered], demonstrations: Sequence[tuple[int, Example]], batches: int
    ) -> list[RolloutBatch]:
        config = self.trainer.config
        return assemble(
            self.codec,
            answered,
            demonstrations,
            group_size=config.group_size,
            micro_batches=batches,
            baseline=config.advantage_baseline,
            scale=config.advantage_scale,
            device=config.device,
        ).micro_batches()

    def _luck(self, count: int) -> list[float]:
        return torch.rand(count, generator=self._generator, dtype=torch.float64).tolist()

    @contextmanager
    def _own_draws(self) -> Iterator[None]:
        """The run goes on as if nobody had looked, for its trainer keeps its own state too."""
        device = torch.device(self.trainer.config.device)
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type="cuda"):
            torch.manual_seed(int(torch.randint(1 << 62, (), generator=self._generator)))
            yield
