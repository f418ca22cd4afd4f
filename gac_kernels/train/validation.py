"""Points along a run at which the estimators stand beside the oracle, and what the points say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..statistics import Correlation, correlate
from .config import TrainConfig
from .loop import Trainer
from .oracle import Half, Oracle, estimates, optimum

SIGNALS = ("sigma_s2", "sigma_r2", "delta2", "mu_star")
CONTROLS = ("advantages", "phi", "constant", "points")


@dataclass
class Points:
    """What was measured. ``C`` checkpoints, ``G`` groups of fresh sequences at each, 4 values as in ``SIGNALS``.

    Attributes:
        steps: (C) optimizer steps done. first, second, oracle: (C, 4) of the two halves and of both together.
        kinds: kind of pass ("ordinary" or a control) -> estimator -> (C * G, 4), checkpoint by checkpoint.
        groups: G.
    """

    groups: int
    steps: list[int] = field(default_factory=list)
    first: list[list[float]] = field(default_factory=list)
    second: list[list[float]] = field(default_factory=list)
    oracle: list[list[float]] = field(default_factory=list)
    kinds: dict[str, dict[str, list[list[float]]]] = field(default_factory=dict)

    def take(self, oracle: Oracle, batches: int) -> None:
        """Measure at the trainer's present weights."""
        first, second = oracle.halves(batches)
        self.steps.append(oracle.trainer.steps_done)
        for halves, values in ((first, self.first), (second, self.second), (first + second, self.oracle)):
            values.append(_with_optimum(halves, oracle.parts))
        for _ in range(self.groups):
            for kind, signals in oracle.signals(oracle.fresh()).items():
                for name, found in estimates(signals).items():
                    self.kinds.setdefault(kind, {}).setdefault(name, []).append([*found, optimum(found)])


def _with_optimum(half: Half, parts: int) -> list[float]:
    found = half.signals(parts)
    return [*found, optimum(found)]


def validation_config(model: str, task: str, seed: int, *, smoke: bool) -> TrainConfig:
    """The run that the points lie on: half the demo's rollouts, the mixture moved by GAC; ``smoke``: a tiny one."""
    sizes: dict[str, Any] = {"prompts_per_step": 16, "group_size": 4, "demonstrations_per_step": 16, "steps": 40}
    if model == "tiny" and task == "arithmetic":
        sizes |= {"demonstration_pool": 1024, "max_new_tokens": 28}  # a worked answer has 23
    if smoke:
        sizes |= {"prompts_per_step": 8, "demonstrations_per_step": 8, "steps": 8, "max_new_tokens": 24}
        if model == "tiny":
            sizes |= {"tiny_hidden": 16, "tiny_layers": 1, "warmup_sft_steps": 20}
    return TrainConfig(Path("unused"), model=model, task=task, seed=seed, eval_size=16, checkpoint_every=0, **sizes)


def measure(
    config: TrainConfig, *, checkpoints: int, groups: int, batches: int, parts: int, progress: Callable[[float], None]
) -> Points:
    """Run ``config`` and stop at ``checkpoints`` places, the first right after the warm start, the last at the end."""
    trainer = Trainer(config)
    oracle = Oracle(trainer, parts, config.seed)
    points = Points(groups)
    places = np.linspace(config.warmup_sft_steps, config.total_steps, checkpoints).round().astype(int).tolist()
    for done, place in enumerate(places):
        while trainer.steps_done < place:
            trainer.step()
        points.take(oracle, batches)
        progress((done + 1) / len(places))
    return points


def conclude(points: Points, seed: int) -> dict[str, Any]:
    """``reliability``: signal -> Correlation of the oracle's halves; ``estimators``: name -> signal -> Correlation
    with the oracle; ``falsified``: control -> the same.

    The control ``points`` is the ordinary estimates dealt out to points at random: what the statistics make of
    estimates that have nothing to do with the oracle. Intervals resample checkpoints, which share an oracle.
    """
    checkpoint_C = np.arange(len(points.steps))
    checkpoint_M = np.repeat(checkpoint_C, points.groups)
    first, second = np.array(points.first), np.array(points.second)
    reliability = {
        name: correlate(first[:, i], second[:, i], clusters=checkpoint_C, seed=seed) for i, name in enumerate(SIGNALS)
    }
    truth = np.repeat(np.array(points.oracle), points.groups, axis=0)

    def against(values: Sequence[Sequence[float]]) -> dict[str, Correlation]:
        table = np.array(values)
        return {
            name: correlate(table[:, i], truth[:, i], clusters=checkpoint_M, seed=seed)
            for i, name in enumerate(SIGNALS)
        }

    estimators = {name: against(values) for name, values in points.kinds["ordinary"].items()}
    order = np.random.default_rng(seed).permutation(len(checkpoint_M))
    dealt = {name: np.array(values)[order].tolist() for name, values in points.kinds["ordinary"].items()}
    kinds = {**points.kinds, "points": dealt}
    falsified = {control: {name: against(values) for name, values in kinds[control].items()} for control in CONTROLS}
    return {"reliability": reliability, "estimators": estimators, "falsified": falsified}
