"""What is trained on: prompts, demonstrations, held-out problems and a reward that a program can verify.

A task is a pure function of (seed, position): the example at a position never depends on what was drawn before. So a
resumed run continues from one integer, and ranks can take disjoint positions without talking to each other.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Protocol

from .config import TrainConfig

EVAL_SIZE = 256  # held-out problems, unless told otherwise


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads, the answer that earns the reward, and how a teacher would write it.

    Attributes:
        where: the file and line that it came from, for messages.
    """

    prompt: str
    answer: str
    demonstration: str | None = None
    where: str = field(default="", compare=False)


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


_FIELDS = {"prompt": True, "answer": True, "demonstration": False}  # name -> required
# What may stand directly before the answer at the end of a completion. A digit, letter, sign or point may not: the
# answer 5 is not found at the end of 15, x5, -5 or 1.5.
_BEFORE_ANSWER = re.compile(r"[\s=:#(\[{$\"'*>]")
_TRAILING = " .!*\"')]}$"


def normalise(text: str) -> str:
    """NFKC, lower case, runs of white space as one space, no white space or closing punctuation at the end."""
    return re.sub(r"\s+", " ", unicodedata.normalize("NFKC", text).casefold()).strip().rstrip(_TRAILING)


def ends_with_answer(completion: str, answer: str) -> bool:
    """Whether the normalised completion ends with the normalised answer as a whole (not as part of a longer one)."""
    text, wanted = normalise(completion), normalise(answer)
    if not wanted or not text.endswith(wanted):
        return False
    before = text[: len(text) - len(wanted)]
    return not before or bool(_BEFORE_ANSWER.match(before[-1]))


class JsonlTask:
    """A user's own problems: one JSON object a line with ``prompt``, ``answer`` and, optionally, ``demonstration``.

    ``eval_size`` lines (None: 256, at most a fifth), chosen by the seed, are held out. The reward is 1 if the
    completion ends with the answer after normalisation (:func:`ends_with_answer`). Blank lines are skipped; anything
    else that does not fit raises ValueError naming file, line and field.
    """

    def __init__(
        self, path: str | Path, *, demonstrations: int | None = None, eval_size: int | None = None, seed: int = 0
    ) -> None:
        self.path, self.seed = Path(path), seed
        examples = self._read()
        if eval_size is None:
            eval_size = max(1, min(EVAL_SIZE, len(examples) // 5))
        if not 0 < eval_size < len(examples):
            raise ValueError(
                f"eval_size must leave a line to train on: expected 1 to {len(examples) - 1} for the "
                f"{len(examples)} problems of {self.path}, got {eval_size}"
            )
        random.Random(f"split/{seed}").shuffle(examples)
        self._evaluation, self._training = examples[:eval_size], examples[eval_size:]
        self._demonstrations = [e for e in self._training if e.demonstration is not None][:demonstrations]
        self.demonstrations = len(self._demonstrations)

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

    def _read(self) -> list[Example]:
        examples = []
        with self.path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    examples.append(_parse(line, f"{self.path}, line {number}"))
        if not examples:
            raise ValueError(f"{self.path}: holds no problem; expected one JSON object a line")
        return examples


def _parse(line: bytes, where: str) -> Example:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error})") from error
    except (ValueError, RecursionError) as error:  # beside JSON's own: integers too long, brackets too deep
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for name in record:
        if name not in _FIELDS:
            raise ValueError(f"{where}: unknown field {name!r}; expected {', '.join(_FIELDS)}")
    for name, required in _FIELDS.items():
        value = record.get(name)
        if value is None and not required:
            continue
        if name not in record:
            raise ValueError(f"{where}: field {name!r} is missing")
        if not isinstance(value, str):
            raise ValueError(f"{where}: field {name!r} must be a string, got {type(value).__name__}")
        if not value.strip():
            raise ValueError(f"{where}: field {name!r} must not be empty")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{where}: field {name!r} must be text, got half a surrogate pair")
    return Example(record["prompt"], record["answer"], record.get("demonstration"), where)


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
