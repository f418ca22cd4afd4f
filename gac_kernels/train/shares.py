"""A task's problems in disjoint shares: what one half of a measurement has seen, no other part of it sees."""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterable

from .tasks import Example, Task

SHARES = 3  # two oracle halves and the estimators
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
