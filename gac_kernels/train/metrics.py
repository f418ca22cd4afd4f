"""Where a run's numbers go: metrics.jsonl (the record), TensorBoard, and the terminal.

`metrics.jsonl` holds one JSON object a line, `step` first. `step` counts finished optimizer steps, so 0 is "before
training" and a checkpoint of step r goes with exactly the lines up to r. The loop's checkpoints hold these lines too: a
log that was damaged, cut or deleted is mended when the run goes on.
"""

from __future__ import annotations

import json
import math
import os
import warnings
import zlib
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from ._display import Number, display
from ._extras import require
from ._reading import parse_json, read_bytes

__all__ = ["MetricsWriter", "read_metrics"]

METRICS_FILE, TENSORBOARD_DIRECTORY = "metrics.jsonl", "tensorboard"
_MAX_BYTES = 1 << 30


class MetricsWriter:
    """Appends a run's metrics to `output/metrics.jsonl` and `output/tensorboard`, and shows its progress.

    Args:
        output: the run's directory, made if need be.
        resume_step: the step to continue after. Lines of later steps and a torn last line, both left by a run that was
            killed, are dropped. None starts anew: a metrics.jsonl that is there is replaced.
        resume_log: what `packed` gave at `resume_step`: the file is brought to these lines, to the byte. Where it had
            lost, changed or doubled any of them a RuntimeWarning says so. None: the file's own lines are all there is.
        total_steps: where the progress bar ends; None if unknown.
        show: a progress bar on standard error if that is a terminal, else a plain line now and then. False: nothing.

    Raises:
        ImportError: tensorboard (or rich, for the bar) is missing; names the extra that brings it.
        ValueError: the metrics.jsonl to continue is malformed before its last line, and there is no `resume_log`; names
            file and line.
    """

    def __init__(
        self,
        output: Path,
        *,
        resume_step: int | None = None,
        resume_log: Tensor | None = None,
        total_steps: int | None = None,
        show: bool = True,
    ) -> None:
        need = {"package": "tensorboard", "purpose": "logging to TensorBoard"}
        summary_writer = require("torch.utils.tensorboard", **need).SummaryWriter
        self._summary = require("tensorboard.compat.proto.summary_pb2", **need).Summary
        first_step = 0 if resume_step is None else resume_step + 1
        self._last_step = first_step - 1
        self._display = display(self._last_step, total_steps) if show else None
        output = Path(output)
        output.mkdir(parents=True, exist_ok=True)
        path = output / METRICS_FILE
        self._packer, self._packed = zlib.compressobj(1), bytearray()
        if resume_step is None:
            path.unlink(missing_ok=True)
        else:
            self._add(_resumed(path, resume_step, None if resume_log is None else _unpack(resume_log)))
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
        line = json.dumps({"step": step, **finite}, allow_nan=False) + "\n"
        self._file.write(line)
        self._file.flush()
        self._add(line.encode())
        # One event for all values: an `add_scalar` for each costs eight times as much.
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._tensorboard.file_writer.add_summary(self._summary(value=scalars), step)
        self._tensorboard.flush()
        if self._display is not None:
            self._display.update(step, numbers)

    def packed(self) -> Tensor:
        """All lines so far, compressed: 1-D uint8, for a checkpoint and `resume_log`."""
        return torch.frombuffer(self._packed + self._packer.copy().flush(), dtype=torch.uint8)

    def _add(self, lines: bytes) -> None:
        self._packed += self._packer.compress(lines)

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
    try:
        lines = read_bytes(path, _MAX_BYTES).splitlines(keepends=True)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return _parsed(lines, path)


def _parsed(lines: list[bytes], path: Path) -> list[tuple[dict[str, Any], bytes]]:
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = parse_json(line)
            if not isinstance(record, dict) or type(record.get("step")) is not int or not 0 <= record["step"] < 1 << 53:
                raise ValueError('expected an object with an integer "step"')
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise ValueError(f"{path}, line {number}: {error}") from error
        records.append((record, line))
    return records


def _unpack(packed: Tensor) -> bytes:
    return zlib.decompress(packed.numpy().tobytes())


def _resumed(path: Path, step: int, log: bytes | None) -> bytes:
    """Bring the file to the lines up to `step` and return them; a kill leaves the old file or the new one."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory: move it away to go on")
    if log is None:
        kept = _own_lines(path, step)
    else:
        kept = log
        if reason := _damage(path, step, log):
            _say(f"{path}: {reason}; its lines up to step {step} were restored from the checkpoint")
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _damage(path: Path, step: int, log: bytes) -> str | None:
    """What is wrong with a file that should begin with `log` and go on with later steps; None if nothing is."""
    try:
        data = read_bytes(path, _MAX_BYTES)
    except FileNotFoundError:
        return "is missing" if log else None
    except (OSError, ValueError) as error:
        return f"cannot be read ({error})"
    lines, wanted = data.splitlines(keepends=True), log.splitlines(keepends=True)
    if lines[: len(wanted)] != wanted:
        number = next((n for n, (a, b) in enumerate(zip(lines, wanted, strict=False)) if a != b), len(lines)) + 1
        return f"line {number} is {'not what was logged' if number <= len(lines) else 'missing'}"
    for number, line in enumerate(lines[len(wanted) :], start=len(wanted) + 1):
        try:
            record = parse_json(line)
        except ValueError:
            break  # it goes with the later steps
        if isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step:
            return f"line {number} holds step {record['step']} again"
    return None


def _own_lines(path: Path, step: int) -> bytes:
    """The file's lines up to `step`, where nothing else holds them; each step's first where they come again."""
    without = f"the checkpoint of step {step} is of an earlier version and does not hold the lines"
    if not path.exists():
        if step > 0:
            _say(f"{path} is missing, and {without}: the log begins at step {step + 1}")
        return b""
    try:
        records = _parse(path)
    except ValueError as error:
        raise ValueError(f"{error}; {without}: move the file away to go on with a new one") from error
    kept, last, before = [], -1, -1
    for record, line in records:
        if last <= record["step"] <= step and (record["step"] > last or before == last):
            kept.append(line.rstrip(b"\r\n") + b"\n")
            last = record["step"]
        before = record["step"]
    again = sum(record["step"] <= step for record, _ in records) - len(kept)
    if again:
        _say(f"{path}: {again} lines of earlier steps came again and were dropped")
    if last < step:
        _say(f"{path} ends before step {step}, and {without}: steps are missing in it")
    return b"".join(kept)


def _say(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=2)


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
