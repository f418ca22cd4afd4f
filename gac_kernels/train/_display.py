"""A run's progress on standard error: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping

from ._extras import require

Number = int | float

SHOWN = {"mu": "mu", "reward": "reward", "eval/accuracy": "accuracy"}
_SECONDS_BETWEEN_LINES = 10.0


def display(done: int, total: int | None) -> _Bar | _Lines:
    """Standard error carries it: standard output is left to results."""
    return _Bar(done, total) if sys.stderr.isatty() else _Lines(total)


def _text(value: Number | None) -> str:
    return "-" if value is None else f"{value:.3f}"


class _Bar:
    """A progress bar that stays in place. It appears with the first step."""

    def __init__(self, done: int, total: int | None) -> None:
        progress = require("rich.progress", package="rich", purpose="the progress bar")
        console = require("rich.console", package="rich", purpose="the progress bar").Console(stderr=True)
        self._latest: dict[str, Number | None] = dict.fromkeys(SHOWN)
        self._progress = progress.Progress(
            progress.TextColumn("step"),
            progress.MofNCompleteColumn(),
            progress.BarColumn(),
            *(progress.TextColumn(f"{label} [bold]{{task.fields[{label}]}}") for label in SHOWN.values()),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
        )
        fields = {label: _text(None) for label in SHOWN.values()}
        self._task = self._progress.add_task("train", total=total, completed=max(done, 0), **fields)

    def update(self, step: int, numbers: Mapping[str, Number]) -> None:
        self._progress.start()  # nothing from the second time on
        self._latest |= {name: numbers[name] for name in SHOWN if name in numbers}
        fields = {label: _text(self._latest[name]) for name, label in SHOWN.items()}
        self._progress.update(self._task, completed=step, **fields)

    def close(self) -> None:
        self._progress.stop()


class _Lines:
    """A line at the first step, the last, every evaluation, and otherwise every ten seconds."""

    def __init__(self, total: int | None) -> None:
        self._total = total
        self._next = -math.inf

    def update(self, step: int, numbers: Mapping[str, Number]) -> None:
        now = time.monotonic()
        if now < self._next and step != self._total and "eval/accuracy" not in numbers:
            return
        self._next = now + _SECONDS_BETWEEN_LINES
        of_total = "" if self._total is None else f"/{self._total}"
        shown = [f"{label} {_text(numbers[name])}" for name, label in SHOWN.items() if name in numbers]
        print("  ".join([f"step {step}{of_total}", *shown]), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass
