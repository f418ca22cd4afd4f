"""What is trained on: prompts, demonstrations, held-out problems and a reward that a program can verify.

A task is a pure function of (seed, position): the example at a position never depends on what was drawn before. So a
resumed run continues from one integer, and ranks can take disjoint positions without talking to each other.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from .answers import check_reward, ends_with_answer
from .config import TrainConfig
from .problems import Example, read_problems

EVAL_SIZE = 256  # held-out problems, unless told otherwise


class Task(Protocol):
    """What the loop asks of a task. Positions are non-negative and have no end."""

    demonstrations: int  # number of distinct demonstrations; 0 where there are none

    def prompt(self, position: int) -> Example:
        """The training problem at ``position``, never one of the held-out problems."""

    def demonstration(self, position: int) -> Example:
        """The demonstration at ``position``: every epoch passes over all of them once, in an order of its own."""

    def evaluation(self) -> list[Example]:
        """The fixed held-out problems."""

    def reward(self, example: Example, completion: str) -> float:
        """1.0 for a completion whose final answer is right, else 0.0."""

    def problems(self) -> Iterable[Example]:
        """Problems whose lengths are those of all: every one of a file, any of a task that makes them alike."""

    def texts(self) -> Iterable[str]:
        """Texts that together hold every character of the task, for the character tokenizer."""


@lru_cache(maxsize=8)
def _shuffled(key: str, size: int) -> tuple[int, ...]:
    order = list(range(size))
    random.Random(key).shuffle(order)
    return tuple(order)


def _epoch_order(seed: int, stream: str, position: int, size: int) -> int:
    """Index of the item at ``position`` of an endless stream of shuffled epochs over ``size`` items."""
    epoch, place = divmod(position, size)
    return _shuffled(f"{stream}/{seed}/{epoch}", size)[place]


class ArithmeticTask:
    """Addition of two numbers of ``digits`` digits, one character a token.

    ``347+185=`` is worked from the last digit to the first, each column with the carry that came in and its sum on two
    places (carry out, digit), and closed by the answer behind ``#``::

        7+5+0=12 4+8+1=13 3+1+1=05 #532

    The reward reads the answer only. Prompts are unlimited; worked demonstrations are scarce, ``demonstrations`` of
    them. A problem is held out if a checksum of its text says so (one in eight), whatever the seed, so no training
    problem is ever asked in the evaluation.
    """

    def __init__(
        self, *, digits: int = 3, demonstrations: int = 128, eval_size: int = EVAL_SIZE, seed: int = 0
    ) -> None:
        if digits < 2:
            raise ValueError(f"digits must be >= 2, got {digits}")
        self.digits, self.demonstrations, self.seed = digits, demonstrations, seed
        # One in eight of the 81 * 100^(digits-1) problems is held out; half of each side at most is drawn, so that
        # drawing distinct problems ends quickly.
        problems = 81 * 100 ** (digits - 1)
        for name, size, limit in (
            ("eval_size", eval_size, problems // 16),
            ("demonstrations", demonstrations, problems // 4),
        ):
            if not 0 <= size <= limit:
                raise ValueError(f"{name} must be in [0, {limit}] with {digits} digits, got {size}")
        self._demonstrations = self._distinct("demonstration", demonstrations, held_out=False)
        self._evaluation = self._distinct("evaluation", eval_size, held_out=True)

    def prompt(self, position: int) -> Example:
        a, b = self._draw(random.Random(f"prompt/{self.seed}/{position}"), held_out=False)
        return Example(f"{a}+{b}=", str(a + b))

    def demonstration(self, position: int) -> Example:
        return self._demonstrations[_epoch_order(self.seed, "demonstration", position, self.demonstrations)]

    def evaluation(self) -> list[Example]:
        return self._evaluation

    def reward(self, example: Example, completion: str) -> float:
        return float(completion.rpartition("#")[2] == example.answer and "#" in completion)

    def problems(self) -> list[Example]:
        return [self.prompt(0)]

    def texts(self) -> list[str]:
        return ["0123456789+= #"]

    @staticmethod
    def work(a: int, b: int) -> str:
        """The worked demonstration of ``a + b``."""
        columns, carry = [], 0
        for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
            total = int(x) + int(y) + carry
            columns.append(f"{x}+{y}+{carry}={total:02d}")
            carry = total // 10
        return " ".join([*columns, f"#{a + b}"])

    def _draw(self, rng: random.Random, *, held_out: bool) -> tuple[int, int]:
        low, high = 10 ** (self.digits - 1), 10**self.digits - 1
        while True:
            a, b = rng.randint(low, high), rng.randint(low, high)
            if (zlib.crc32(f"{a}+{b}".encode()) % 8 == 0) == held_out:
                return a, b

    def _distinct(self, stream: str, size: int, *, held_out: bool) -> list[Example]:
        rng = random.Random(f"{stream}/{self.seed}")
        pairs: dict[tuple[int, int], None] = {}  # a set that keeps its order
        while len(pairs) < size:
            pairs[self._draw(rng, held_out=held_out)] = None
        return [Example(f"{a}+{b}=", str(a + b), self.work(a, b)) for a, b in pairs]


class JsonlTask:
    """A user's own problems: one JSON object a line with ``prompt``, ``answer`` and, optionally, ``demonstration``.

    ``eval_size`` problems (None: 256, at most a fifth), chosen by the seed, are held out: several lines with one prompt
    are one problem (white space aside), evaluated by its first line, and all of them stay on one side. The reward is 1
    for a completion whose final answer is right (see ``answers``). What does not fit raises ValueError naming file,
    line and field (see ``problems``).
    """

    def __init__(
        self, path: str | Path, *, demonstrations: int | None = None, eval_size: int | None = None, seed: int = 0
    ) -> None:
        self.path, self.seed = Path(path), seed
        problems: dict[str, list[Example]] = {}
        for example in read_problems(self.path):
            problems.setdefault(example.problem, []).append(example)
        groups = list(problems.values())
        if eval_size is None:
            eval_size = max(1, min(EVAL_SIZE, len(groups) // 5))
        if not 0 < eval_size < len(groups):
            raise ValueError(
                f"eval_size must leave a problem to train on: expected 1 to {len(groups) - 1} for the "
                f"{len(groups)} problems of {self.path}, got {eval_size}"
            )
        random.Random(f"split/{seed}").shuffle(groups)
        self._evaluation = [lines[0] for lines in groups[:eval_size]]
        self._training = [line for lines in groups[eval_size:] for line in lines]
        self._demonstrations = [e for e in self._training if e.demonstration is not None][:demonstrations]
        self.demonstrations = len(self._demonstrations)
        check_reward(example.answer for example in self.problems())

    def prompt(self, position: int) -> Example:
        return self._training[_epoch_order(self.seed, "prompt", position, len(self._training))]

    def demonstration(self, position: int) -> Example:
        if not self._demonstrations:
            raise ValueError(f"{self.path}: no line that is trained on has the field 'demonstration'")
        return self._demonstrations[_epoch_order(self.seed, "demonstration", position, self.demonstrations)]

    def evaluation(self) -> list[Example]:
        return self._evaluation

    def reward(self, example: Example, completion: str) -> float:
        return float(ends_with_answer(completion, example.answer))

    def problems(self) -> list[Example]:
        return [*self._training, *self._evaluation]

    def texts(self) -> Iterable[str]:
        for example in self.problems():
            yield from (example.prompt, example.answer, example.demonstration or "")


def build_task(config: TrainConfig) -> Task:
    """The task that the config names; raises ValueError where the run needs demonstrations and there are none."""
    pool, size, task = config.demonstration_pool, config.eval_size, config.task
    built: Task
    if task == "arithmetic":
        built = ArithmeticTask(
            digits=config.digits,
            demonstrations=128 if pool is None else pool,
            eval_size=EVAL_SIZE if size is None else size,
            seed=config.seed,
        )
    else:
        built = JsonlTask(task, demonstrations=pool, eval_size=size, seed=config.seed)
    if not built.demonstrations and (config.warmup_sft_steps or config.demonstrations_per_step):
        raise ValueError(
            f"task: {task} has no line with a demonstration to train on; "
            "expected some, or warmup_sft_steps=0, demonstrations_per_step=0, controller='fixed', mu=0.0"
        )
    return built
