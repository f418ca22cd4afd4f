"""All runs that are missing, over processes of one thread each."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .arms import Run
from .runs import execute, make_start, read_result, result_file


def run_all(runs: Sequence[Run], output: Path, processes: int) -> list[dict[str, Any]]:
    """The results of ``runs`` in order, making those that are not in ``output``: first their starts, then they.

    A run that fails ends the study with its error; what is finished stays and the next call goes on from there.
    """
    missing = [run for run in runs if read_result(result_file(run, output), run.fingerprint) is None]
    if missing:
        output.mkdir(parents=True, exist_ok=True)
        starts = sorted({run.seed for run in missing})
        size = missing[0].size
        # forkserver: a plain fork after OpenMP has started can hang.
        with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("forkserver")) as pool:
            _finish(
                pool, "starts", {f"start of seed {seed}": partial(make_start, seed, size, output) for seed in starts}
            )
            _finish(pool, "runs", {run.name: partial(execute, run, output) for run in missing})
    results = [read_result(result_file(run, output), run.fingerprint) for run in runs]
    return [result for result in results if result is not None]


def _finish(pool: ProcessPoolExecutor, title: str, jobs: dict[str, Callable[[], Path]]) -> None:
    """Run these jobs to the end, with a bar on a terminal and a line for each that is done."""
    columns = (
        TextColumn(title), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task(title, total=len(jobs))
        names = {pool.submit(job): name for name, job in jobs.items()}
        try:
            for done, future in enumerate(as_completed(names), 1):
                future.result()
                progress.update(task, completed=done)
                progress.console.print(f"{done}/{len(jobs)}  {names[future]}", highlight=False)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
