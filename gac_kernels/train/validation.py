"""Points at which the estimators stand beside the oracle, and what the points say.

A point is a pair of conditions (see ``oracle``) at a checkpoint of a run. Shapes: M points, 4 values as in ``SIGNALS``.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..statistics import chance, contrast, correlate, mean, reliability, within
from .config import TrainConfig
from .falsify import KINDS, estimates, fresh_signals
from .loop import Trainer
from .oracle import Oracle, optimum

SIGNALS = ("sigma_s2", "sigma_r2", "delta2", "mu_star")
CONTROLS = tuple(kind for kind in KINDS if kind != "ordinary")
PAPER = "coefficient"
VIEWS = {
    "all": "all points",
    "within": "conditions at one checkpoint: each value less its checkpoint's mean",
    "run": "along the runs: the data as they are, nothing exchanged or inverted",
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        checkpoints: places of each run. oracle_batches: small batches of each half of the oracle, for each condition.
        groups: steps of fresh sequences that the estimators average over. parts: small batches of a step's size.
        conditions: how many of each branch.
    """

    checkpoints: int
    oracle_batches: int
    groups: int
    parts: int
    conditions: int


@dataclass
class Points:
    """What was measured.

    Attributes:
        place: (M) which checkpoint of which run, as (run, optimizer steps done). condition: (M) (exchanged, inverted).
        first, second, oracle: (M, 4) of the two halves and of both together.
        kinds: kind of pass ("ordinary" or a control) -> estimator -> (M, 4).
    """

    place: list[tuple[int, int]] = field(default_factory=list)
    condition: list[tuple[int, int]] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    second: list[list[float]] = field(default_factory=list)
    oracle: list[list[float]] = field(default_factory=list)
    kinds: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def take(self, oracle: Oracle, sizes: Sizes, run: int) -> None:
        """Measure at the trainer's present weights."""
        first, second = oracle.halves(sizes.oracle_batches)
        whole = first + second
        found = fresh_signals(oracle, sizes.groups)
        for i in range(len(oracle.exchanged)):
            for j in range(len(oracle.inverted)):
                self.place.append((run, oracle.trainer.steps_done))
                self.condition.append((i, j))
                for half, values in ((first, self.first), (second, self.second), (whole, self.oracle)):
                    signals = half.signals(oracle.parts, i, j)
                    values.append([*signals, optimum(signals)])
                for kind, by_condition in found.items():
                    for name, estimated in estimates(by_condition[i, j]).items():
                        self.kinds.setdefault(kind, {}).setdefault(name, []).append(estimated)

    def extend(self, other: Points) -> None:
        """Those of another run behind ours."""
        for name in ("place", "condition", "first", "second", "oracle"):
            getattr(self, name).extend(getattr(other, name))
        for kind, by_name in other.kinds.items():
            for estimator, values in by_name.items():
                self.kinds.setdefault(kind, {}).setdefault(estimator, []).extend(values)


def validation_config(model: str, task: str, seed: int, *, run: int, smoke: bool) -> TrainConfig:
    """The run that points lie on: half the demo's rollouts. The first run's mixture is moved by GAC, the others' is
    fixed, at 0.1 and 0.9 in turn, so that the weights take different ways. Run k has seed + k: seeds that are compared
    should lie as far apart as there are runs. ``smoke``: a tiny run."""
    sizes: dict[str, Any] = {"prompts_per_step": 16, "group_size": 4, "demonstrations_per_step": 16, "steps": 40}
    if model == "tiny":
        sizes |= {"tiny_hidden": 64, "warmup_sft_steps": 240, "warmup_sft_lr": 4e-3, "learning_rate": 1e-3}
        if task == "arithmetic":
            sizes |= {"demonstration_pool": 1024, "max_new_tokens": 24}  # a worked answer has 24 with its end
    if smoke:
        sizes |= {"prompts_per_step": 4, "demonstrations_per_step": 4, "steps": 4}
        if model == "tiny":
            sizes |= {"tiny_hidden": 16, "tiny_layers": 1, "warmup_sft_steps": 20}
    if run:
        sizes |= {"controller": "fixed", "mu": (0.1, 0.9)[(run - 1) % 2]}
    return TrainConfig(
        Path("unused"), model=model, task=task, seed=seed + run, eval_size=16, checkpoint_every=0, **sizes
    )


def measure_run(config: TrainConfig, sizes: Sizes, run: int, progress: Callable[[], None]) -> Points:
    """Run ``config`` and stop at places evenly from the middle of the warm start to the end; without a warm start not
    at the very start, where all runs have the same weights."""
    trainer = Trainer(config)
    oracle = Oracle(trainer, sizes.parts, config.seed * 1009 + run, conditions=sizes.conditions)
    points = Points()
    start = config.warmup_sft_steps // 2 or config.steps // sizes.checkpoints
    places = np.linspace(start, config.total_steps, sizes.checkpoints).round().astype(int)
    for place in places.tolist():
        while trainer.steps_done < place:
            trainer.step()
        points.take(oracle, sizes, run)
        progress()
    return points


def measure(configs: list[TrainConfig], sizes: Sizes, progress: Callable[[float], None]) -> Points:
    """The points of all runs, one process a run where there are several; their figures do not depend on how many."""
    total, points = len(configs) * sizes.checkpoints, Points()
    if len(configs) == 1:
        done = iter(range(1, total + 1))
        points.extend(measure_run(configs[0], sizes, 0, lambda: progress(next(done) / total)))
        return points
    context = multiprocessing.get_context("spawn")
    counter = context.Value("i", 0)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(len(configs), cores)
    threads = max(1, cores // workers)
    with ProcessPoolExecutor(workers, context, _start_worker, (counter, threads)) as pool:
        futures = [pool.submit(_measure_in_worker, config, sizes, run) for run, config in enumerate(configs)]
        while wait(futures, timeout=1.0, return_when=FIRST_EXCEPTION).not_done:
            if any(future.done() and future.exception() for future in futures):
                pool.shutdown(cancel_futures=True)
                break
            progress(counter.value / total)
        for future in futures:
            points.extend(future.result())
    return points


_counter: Any = None  # of a worker: checkpoints done, all workers together


def _start_worker(counter: Any, threads: int) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(threads)


def _measure_in_worker(config: TrainConfig, sizes: Sizes, run: int) -> Points:
    def progress() -> None:
        with _counter.get_lock():
            _counter.value += 1

    return measure_run(config, sizes, run, progress)


def conclude(points: Points, seed: int) -> dict[str, Any]:
    """What :func:`view` finds in each of ``VIEWS``: those of "all" at the top, the others by their names; and
    ``mu_error``: estimator -> mean of \\|mu* - the oracle's\\|, which a correlation says nothing about."""
    whole = {name: view(points, name, seed) for name in VIEWS}
    cluster_M = _clusters(points)
    truth = np.array(points.oracle)[:, 3]
    error = {
        name: mean(np.abs(np.array(values)[:, 3] - truth), clusters=cluster_M, seed=seed)
        for name, values in points.kinds["ordinary"].items()
    }
    return {**whole.pop("all"), **whole, "mu_error": error}


def view(points: Points, name: str, seed: int) -> dict[str, Any]:
    """One of ``VIEWS`` of the points.

    Returns:
        ``reliability``: signal -> Correlation of the oracle's halves, stepped up to the whole. ``estimators``: name ->
        signal -> Correlation with the oracle. ``ahead``: name -> signal -> Interval of its Pearson less the paper's
        estimator's. ``falsified``: control -> name -> signal -> Correlation. The control ``points`` is the ordinary
        estimates dealt out to points at random (``within``: inside their checkpoint): its interval is what chance
        makes of estimates that have nothing to do with the oracle. All other intervals resample checkpoints, whose
        points share their weights and rollouts.
    """
    keep_M = np.array([name != "run" or condition == (0, 0) for condition in points.condition])
    cluster_M = _clusters(points)[keep_M]

    def table(values: list[list[float]]) -> NDArray[np.float64]:
        kept = np.array(values)[keep_M]
        return np.stack([within(v, cluster_M) for v in kept.T], axis=1) if name == "within" else kept

    settings: dict[str, Any] = {"clusters": cluster_M, "seed": seed}
    truth, first, second = table(points.oracle), table(points.first), table(points.second)
    tables = {kind: {e: table(v) for e, v in by_name.items()} for kind, by_name in points.kinds.items()}
    ordinary = tables["ordinary"]
    strata = cluster_M if name == "within" else np.zeros(len(cluster_M))

    def each(values: NDArray[np.float64], make: Callable[..., Any]) -> dict[str, Any]:
        return {signal: make(values[:, i], i) for i, signal in enumerate(SIGNALS)}

    def against(x: NDArray[np.float64], i: int) -> Any:
        return correlate(x, truth[:, i], **settings)

    def ahead(x: NDArray[np.float64], i: int) -> Any:
        return contrast(x, ordinary[PAPER][:, i], truth[:, i], **settings)

    def dealt(x: NDArray[np.float64], i: int) -> Any:
        return chance(x, truth[:, i], strata=strata, seed=seed)

    return {
        "reliability": each(first, lambda x, i: reliability(x, second[:, i], **settings)),
        "estimators": {e: each(values, against) for e, values in ordinary.items()},
        "ahead": {e: each(values, ahead) for e, values in ordinary.items() if e != PAPER},
        "falsified": {
            **{kind: {e: each(values, against) for e, values in tables[kind].items()} for kind in CONTROLS},
            "points": {e: each(values, dealt) for e, values in ordinary.items()},
        },
    }


def _clusters(points: Points) -> NDArray[np.intp]:
    """(M) number of each point's checkpoint."""
    numbers = {place: number for number, place in enumerate(dict.fromkeys(points.place))}
    return np.array([numbers[place] for place in points.place], dtype=np.intp)
