"""Where a run's numbers go: metrics.jsonl (the record), TensorBoard, and the terminal.

`metrics.jsonl` holds one JSON object a line, `step` first. `step` counts finished optimizer steps, so 0 is "before
training" and a checkpoint of step r goes with exactly the lines up to r.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._extras import require

__all__ = ["MetricsWriter", "read_metrics"]

Number = int | float

METRICS_FILE, TENSORBOARD_DIRECTORY = "metrics.jsonl", "tensorboard"
SHOWN = {"mu": "mu", "reward": "reward", "eval/accuracy": "accuracy"}
_SECONDS_BETWEEN_LINES = 10.0


class MetricsWriter:
    """Appends a run's metrics to `output/metrics.jsonl` and `output/tensorboard`, and shows its progress.

    Args:
        output: the run's directory, made if need be.
        resume_step: the step to continue after. Lines of later steps and a torn last line, both left by a run that was
            killed, are dropped. None starts anew: a metrics.jsonl that is there is replaced.
        total_steps: where the progress bar ends; None if unknown.
        show: a progress bar on standard error if that is a terminal, else a plain line now and then. False: nothing.

    Raises:
        ImportError: tensorboard (or rich, for the bar) is missing; names the extra that brings it.
        ValueError: the metrics.jsonl to continue is malformed before its last line; names file and line.
    """

    def __init__(
        self, output: Path, *, resume_step: int | None = None, total_steps: int | None = None, show: bool = True
    ) -> None:
        need = {"package": "tensorboard", "purpose": "logging to TensorBoard"}
        summary_writer = require("torch.utils.tensorboard", **need).SummaryWriter
        self._summary = require("tensorboard.compat.proto.summary_pb2", **need).Summary
        first_step = 0 if resume_step is None else resume_step + 1
        self._last_step = first_step - 1
        self._display = _display(self._last_step, total_steps) if show else None
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        path = output / METRICS_FILE
        if resume_step is None:
            path.unlink(missing_ok=True)
        else:
            _drop_from(path, first_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        # Tells TensorBoard to forget what an earlier, killed sitting wrote from this step on.
        self._tensorboard = summary_writer(str(output / TENSORBOARD_DIRECTORY), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record `values` at `step`: the one place that reads the device (one copy a device and dtype).

        Args:
            step: finished optimizer steps, never less than at the call before.
            values: name -> number or one-element tensor. Values that are not finite become null in metrics.jsonl.

        Raises:
            ValueError: `step` goes back, a tensor has more than one element, or a name is "step".
            TypeError: a value is no number; names it.
        """
        if step < self._last_step:
            raise ValueError(f"step must not go back: {step} after {self._last_step}")
        if "step" in values:
            raise ValueError('values must not hold "step": it is an argument of its own')
        self._last_step = step
        numbers = _numbers(values)
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")
        self._file.flush()
        # One event for all values: an `add_scalar` for each costs eight times as much.
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._tensorboard.file_writer.add_summary(self._summary(value=scalars), step)
        self._tensorboard.flush()
        if self._display is not None:
            self._display.update(step, numbers)

    def close(self) -> None:
        """Close all files and the progress bar; further calls do nothing."""
        self._file.close()
        self._tensorboard.close()
        if self._display is not None:
            self._display.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read a metrics.jsonl: one dictionary a line, `None` where a value was not finite.

    A last line without its newline that does not parse is what a kill leaves of a write: it is dropped.

    Raises:
        ValueError: any other line is not a JSON object with an integer "step"; names file and line.
        FileNotFoundError: there is no such file.
    """
    return [record for record, _ in _parse(Path(path))]


def _parse(path: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Every whole record, with the bytes of its line."""
    records = []
    lines = path.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line, parse_constant=_refuse_constant)
            if not isinstance(record, dict) or type(record.get("step")) is not int:
                raise ValueError('expected an object with an integer "step"')
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append((record, line))
    return records


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _drop_from(path: Path, step: int) -> None:
    """Rewrite the file without the records from `step` on, so that a kill leaves the old file or the new one."""
    if not path.exists():
        return
    kept = [line.rstrip(b"\n") + b"\n" for record, line in _parse(path) if record["step"] < step]
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _numbers(values: Mapping[str, float | Tensor]) -> dict[str, Number]:
    """Plain numbers in the order given; tensors are read together, one copy for each device and dtype."""
    numbers: dict[str, Number] = {}
    groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, value in values.items():
        if isinstance(value, Tensor):
            if value.numel() != 1:
                raise ValueError(f"values[{name!r}] must have one element, got shape {tuple(value.shape)}")
            groups.setdefault((value.device, value.dtype), []).append(name)
            numbers[name] = math.nan  # holds the place
        elif isinstance(value, Integral):
            numbers[name] = int(value)
        elif isinstance(value, Real):
            numbers[name] = float(value)
        else:
            raise TypeError(f"values[{name!r}] must be a number or a tensor, got {type(value).__name__}")
    for names in groups.values():
        stacked = torch.stack([torch.as_tensor(values[name]).detach().reshape(()) for name in names])
        numbers.update(zip(names, stacked.tolist(), strict=True))
    return numbers


# The terminal -------------------------------------------------------------------------------------------------------


def _text(value: Number | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _display(done: int, total: int | None) -> _Bar | _Lines:
    """Standard error carries it: standard output is left to results."""
    return _Bar(done, total) if sys.stderr.isatty() else _Lines(total)


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
