"""Writes checkpoints in child processes that die by SIGKILL. A program of its own, started by test_checkpoint.py:

    killed_writer.py DIRECTORY SECONDS

First every line of the writing code in turn is the one before which a child dies; then, for SECONDS, a run is killed at
random moments and resumes each time.

It forks (one thread, torch imported once), so a child costs milliseconds. Any broken promise is an AssertionError;
the last line of its output is a JSON object of counts.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from gac_kernels.train import checkpoint
from gac_kernels.train.checkpoint import load_checkpoint, save_checkpoint

# Lines that leave the disk as it is: a kill there is a kill at the caller's line.
READ_ONLY = {
    "_check_count",
    "_checkpoints",
    "_flush",
    "_seal",
    "_sha256",
    "_verify",
    "<genexpr>",
    "<listcomp>",
    "<lambda>",
}


def content(step: int, size: int) -> dict[str, Any]:
    """What step `step` saves: a function of the step alone, so that a loaded checkpoint can be judged."""
    weight = torch.arange(size, dtype=torch.float32) + step
    return {
        "tensors": {"embedding": weight, "head": weight, "bias": torch.full((3,), step, dtype=torch.bfloat16)},
        "state": {"step": step, "moment": weight[::2] * 0.5, "rng": (3, (step,) * 5, None)},
    }


def check(directory: Path, size: int) -> int:
    """Load without a warning, compare with what that step saved, return the step (-1: none)."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(directory)
    if found is None:
        return -1
    expected = content(found.step, size)
    assert found.tensors.keys() == expected["tensors"].keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected["tensors"].items())
    assert torch.equal(found.state.pop("moment"), expected["state"].pop("moment"))
    assert found.state == expected["state"]
    return found.step


def run_child(body: Callable[[], None]) -> int:
    """Fork, run `body`, return the child's process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            body()
            code = 0
        finally:
            os._exit(code)
    return child


def killed(child: int) -> bool:
    """Wait for a child: True if SIGKILL ended it, False if it finished; anything else is a failure."""
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return True
    assert os.waitstatus_to_exitcode(status) == 0, f"the child failed: {status}"
    return False


def kill_at_line(count: int, body: Callable[[], None]) -> None:
    """Run `body`; SIGKILL this process before the `count`-th line of the code that writes."""
    seen = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != checkpoint.__file__ or frame.f_code.co_name in READ_ONLY:
            return None
        if event == "line":
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    body()


def every_line(directory: Path) -> dict[str, int]:
    size, counts = 8, {"kills": 0, "old": 0, "new": 0, "leftovers": 0}
    start = directory / "start"
    for step in (1, 2):
        save_checkpoint(start, step, **content(step, size))
    for step in (3, 2):  # a new step, and one that replaces its own predecessor
        for line in range(1, 10_000):
            shutil.copytree(start, directory / "run")
            child = run_child(lambda n=line, s=step: kill_at_line(n, lambda: save_again(directory / "run", s, size)))
            was_killed = killed(child)
            found = check(directory / "run", size)
            assert found in (2, step), f"killed at line {line} of saving step {step}: loaded step {found}"
            counts["leftovers"] += any(path.name.startswith(".") for path in (directory / "run").iterdir())
            save_again(directory / "run", step, size)  # the next run gets on, and clears away what was left
            kept = sorted(path.name for path in (directory / "run").iterdir())
            assert kept == [f"step-{s:08d}" for s in (step - 1, step)], kept
            shutil.rmtree(directory / "run")
            if not was_killed:
                assert found == step
                break
            counts["kills"] += 1
            counts["new" if found == 3 else "old"] += 1
    return counts


def save_again(directory: Path, step: int, size: int) -> None:
    save_checkpoint(directory, step, **content(step, size))


def at_random(directory: Path, seconds: float) -> dict[str, int]:
    size, counts, durable = 100_000, {"kills": 0, "leftovers": 0, "steps": 0}, -1
    rng, end = random.Random(0), time.monotonic() + seconds
    begin = time.monotonic()
    save_checkpoint(directory / "probe", 0, **content(0, size))
    one_save = time.monotonic() - begin
    run = directory / "run"
    while time.monotonic() < end:
        reading, writing = os.pipe()

        def train(report: int = writing) -> None:
            step = check(run, size)
            while True:
                step += 1
                save_checkpoint(run, step, **content(step, size))
                os.write(report, step.to_bytes(4, "little"))

        child = run_child(train)
        time.sleep(rng.uniform(0.0, 4 * one_save))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        os.close(writing)
        reported = os.read(reading, 1 << 16)
        os.close(reading)
        durable = max(durable, int.from_bytes(reported[-4:], "little") if reported else -1)
        found = check(run, size) if run.exists() else -1
        assert found in (durable, durable + 1), f"step {durable} was saved, loaded step {found}"
        durable = found
        counts["kills"] += 1
        counts["leftovers"] += run.exists() and any(path.name.startswith(".") for path in run.iterdir())
    return counts | {"steps": durable}


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # slow, and of no effect on what a killed process leaves: the page cache survives it
    where = Path(sys.argv[1])
    print(json.dumps({"lines": every_line(where / "lines"), "random": at_random(where / "random", float(sys.argv[2]))}))
