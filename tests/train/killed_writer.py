"""Writes checkpoints in child processes that die by SIGKILL. A program of its own, run by test_checkpoint_faults.py:

    killed_writer.py DIRECTORY SECONDS

First every line of the writing code in turn is the one before which a child dies; then, for SECONDS or longer, a run is
killed at random moments and resumes each time.

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
    "<genexpr>",
    "<listcomp>",
    "<lambda>",
}


def content(step: int, size: int, version: int = 0) -> dict[str, Any]:
    """What a step saves: a function of these numbers alone, so that a loaded checkpoint can be judged."""
    weight = torch.arange(size, dtype=torch.float32) + step + 100 * version
    return {
        "tensors": {"embedding": weight, "head": weight, "bias": torch.full((3,), step, dtype=torch.bfloat16)},
        "state": {"step": step, "version": version, "moment": weight[::2] * 0.5, "rng": (3, (step,) * 5, None)},
    }


def check(directory: Path, size: int) -> tuple[int, int]:
    """Load without a warning, compare with what was saved, return (step, version); step -1: none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(directory)
    if found is None:
        return -1, 0
    version = found.state["version"]
    expected = content(found.step, size, version)
    assert found.tensors.keys() == expected["tensors"].keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected["tensors"].items())
    assert torch.equal(found.state.pop("moment"), expected["state"].pop("moment"))
    assert found.state == expected["state"]
    return found.step, version


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
    """A checkpoint is replaced and another one pruned, which takes every line that writes."""
    size, counts = 8, {"kills": 0, "old": 0, "new": 0, "leftovers": 0}
    start, run = directory / "start", directory / "run"
    for step in (1, 2):
        save_checkpoint(start, step, **content(step, size))

    def replace_and_prune() -> None:
        save_checkpoint(run, 2, **content(2, size, version=1), keep=1)

    for line in range(1, 10_000):
        shutil.copytree(start, run)
        was_killed = killed(run_child(lambda n=line: kill_at_line(n, replace_and_prune)))
        found = check(run, size)
        assert found in ((2, 0), (2, 1)), f"killed at line {line}: loaded {found}"
        assert was_killed or found == (2, 1)
        counts["leftovers"] += any(path.name.startswith(".") for path in run.iterdir())
        replace_and_prune()  # the next sitting gets on, and clears away what was left
        assert check(run, size) == (2, 1)
        assert [path.name for path in run.iterdir()] == ["step-00000002"]
        shutil.rmtree(run)
        if not was_killed:
            break
        counts["kills"] += 1
        counts["new" if found == (2, 1) else "old"] += 1
    return counts


def at_random(directory: Path, seconds: float) -> dict[str, int]:
    """For ``seconds``, and on until steps were saved and saves interrupted: a busy disk takes its time."""
    size, counts, durable = 100_000, {"kills": 0, "leftovers": 0, "steps": 0}, -1
    rng, begin = random.Random(0), time.monotonic()
    save_checkpoint(directory / "probe", 0, **content(0, size))
    reach = 4 * (time.monotonic() - begin)
    run = directory / "run"
    while time.monotonic() < begin + seconds or min(counts["kills"] - 4, counts["leftovers"], durable) < 1:
        assert counts["kills"] < 10_000, counts
        reading, writing = os.pipe()

        def train(report: int = writing) -> None:
            step, _ = check(run, size)
            while True:
                step += 1
                save_checkpoint(run, step, **content(step, size))
                os.write(report, step.to_bytes(4, "little"))

        child = run_child(train)
        time.sleep(rng.uniform(0.0, reach))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        os.close(writing)
        reported = os.read(reading, 1 << 16)
        os.close(reading)
        reach *= 0.9 if reported else 1.1  # some die before their first step is saved, some after
        durable = max(durable, int.from_bytes(reported[-4:], "little") if reported else -1)
        found, _ = check(run, size)
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
