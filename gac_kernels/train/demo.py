"""What the package is for, in some two minutes on two CPU cores: scarce demonstrations, plentiful verifiable problems.

A tiny Qwen2 starts on two-digit addition with 160 worked demonstrations. Two runs go on from that one model for the
same number of optimizer steps: SFT alone, on the same demonstrations, and SFT + RL mixed by GAC, which also answers
problems without a demonstration and is told whether the answer was right. Both are judged on the same 500 problems,
which neither ever saw.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, count, pairwise
from pathlib import Path
from typing import Any

import torch

from ..objectives import NLL, HybridObjective
from . import TrainConfig, TrainResult, train
from ._extras import require
from .metrics import METRICS_FILE, read_metrics
from .report import write_report

POOL = 160  # demonstrations, of 8,100 problems
PROBLEMS, SMOKE_PROBLEMS = 500, 50  # held out
THREADS = 2
_BLOCKS = "▁▂▃▄▅▆▇█"


def warm_config(output: Path, seed: int, *, smoke: bool = False) -> TrainConfig:
    """The warm start that both arms share. ``smoke``: the same on a budget of seconds, too short to learn anything."""
    return TrainConfig(
        output / "warm-start",
        digits=2,
        demonstration_pool=POOL,
        tiny_hidden=32 if smoke else 128,
        warmup_sft_steps=6 if smoke else 300,
        warmup_sft_batch=8 if smoke else 32,
        steps=0,
        max_new_tokens=24,
        eval_size=SMOKE_PROBLEMS if smoke else PROBLEMS,
        eval_batch=500,
        checkpoint_every=0,
        seed=seed,
    )


def arm_configs(warm: TrainConfig, *, smoke: bool = False) -> dict[str, TrainConfig]:
    """The arms by name, each from the model that the finished warm start left: ``sft`` and ``gac``."""
    going_on = replace(
        warm,
        model=str(warm.output / "model"),
        warmup_sft_steps=0,
        steps=6 if smoke else 150,
        learning_rate=8e-4,
        eval_every=3 if smoke else 50,
    )
    sft = replace(
        going_on,
        output=warm.output.with_name("sft"),
        objective=HybridObjective(supervised=NLL("none")),
        controller="fixed",
        mu=1.0,
        prompts_per_step=0,
        demonstrations_per_step=warm.warmup_sft_batch,
    )
    gac = replace(
        going_on,
        output=warm.output.with_name("gac"),
        controller="gac",
        prompts_per_step=4 if smoke else 32,
        group_size=4,
        demonstrations_per_step=16,
    )
    return {"sft": sft, "gac": gac}


def run_demo(output: str | Path, seed: int = 0, *, smoke: bool = False, progress: bool = True) -> dict[str, Any]:
    """Run the demo, print what came out, and write ``output/report.html``.

    Args:
        output: a directory that holds no earlier demo.
        seed: of the weights, the data order and the sampling.
        smoke: go through every part in a few seconds; the accuracies then mean nothing, and that is said.
        progress: show each run's progress on standard error.

    Returns:
        ``accuracy_before`` (both runs start there), ``accuracy_sft``, ``accuracy_gac``: shares of the held-out
        problems; ``standard_error`` of the difference of the latter two and ``clearly_better``: whether GAC is ahead by
        more than two of them; ``mu``: its path, one value a step; ``controller_share`` of the GAC run's step time;
        ``seconds`` in all; ``report``: its path.

    Raises:
        ValueError: ``output`` holds earlier runs.
    """
    output, began = Path(output), time.perf_counter()
    warm = warm_config(output, seed, smoke=smoke)
    with _threads(THREADS):
        before = _announced("warm start", warm, progress).accuracy_after
        arms = arm_configs(warm, smoke=smoke)
        sft, gac = (_announced(name, config, progress).accuracy_after for name, config in arms.items())
    problems = SMOKE_PROBLEMS if smoke else PROBLEMS
    outcome = _outcome(before, sft, gac, problems, read_metrics(arms["gac"].output / METRICS_FILE))
    extra = {
        "Held-out accuracy of the shared warm start": f"{outcome['accuracy_before']:.1%}",
        "after SFT alone": f"{outcome['accuracy_sft']:.1%}",
        "after GAC": f"{outcome['accuracy_gac']:.1%}",
        "Controller's share of a step": f"{outcome['controller_share']:.2%}",
    }
    runs = {"SFT alone": arms["sft"].output, "GAC": arms["gac"].output}
    outcome["report"] = str(write_report(output, title="SFT alone and GAC from one warm start", extra=extra, runs=runs))
    outcome["seconds"] = time.perf_counter() - began
    _print(outcome, problems)
    if smoke:
        print("This was the smoke run: too short to learn anything.")
    return outcome


def _announced(name: str, config: TrainConfig, progress: bool) -> TrainResult:
    if progress:
        print(f"{name}: {config.total_steps} steps", file=sys.stderr)
    return train(config, progress=progress)


def _outcome(before: float, sft: float, gac: float, problems: int, log: list[dict[str, Any]]) -> dict[str, Any]:
    # Of two independent shares; the problems are the same for both, so it errs on the wide side.
    error = math.sqrt((sft * (1 - sft) + gac * (1 - gac)) / problems)
    steps = [line for line in log if line["step"] > 0]
    return {
        "accuracy_before": before,
        "accuracy_sft": sft,
        "accuracy_gac": gac,
        "standard_error": error,
        "clearly_better": gac - sft > 2 * error,
        "mu": [line["mu"] for line in steps],
        "controller_share": sum(s["controller_seconds"] for s in steps) / sum(s["step_seconds"] for s in steps),
    }


def sparkline(values: list[float], width: int = 50) -> str:
    """``values`` in [0, 1] as ``width`` blocks or fewer, each the mean of its stretch."""
    width = min(width, len(values))
    cuts = [round(i * len(values) / width) for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(cuts)]
    return "".join(_BLOCKS[min(len(_BLOCKS) - 1, max(0, int(mean * len(_BLOCKS))))] for mean in means)


def _print(outcome: dict[str, Any], problems: int) -> None:
    purpose = {"package": "rich", "purpose": "the demo's summary"}
    console = require("rich.console", **purpose).Console()
    table = require("rich.table", **purpose).Table(title=f"Two-digit addition, {problems} held-out problems")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    before = outcome["accuracy_before"]
    for name, key in (("SFT alone", "accuracy_sft"), ("GAC (SFT + RL)", "accuracy_gac")):
        after = outcome[key]
        table.add_row(name, f"{before:.1%}", f"{after:.1%}", f"{100 * (after - before):+.1f} points")
    console.print(table)
    ahead, error, mu = outcome["accuracy_gac"] - outcome["accuracy_sft"], outcome["standard_error"], outcome["mu"]
    verdict = "clearly ahead of" if outcome["clearly_better"] else "not clearly ahead of"
    console.print(f"GAC is {verdict} SFT alone: {100 * ahead:+.1f} points, standard error {100 * error:.1f}.")
    places = [0, len(mu) // 4, len(mu) // 2, 3 * len(mu) // 4, len(mu) - 1]
    values = ", ".join(f"{mu[place]:.2f} (step {place + 1})" for place in dict.fromkeys(places))
    console.print(f"mu, weight of the demonstrations, 0 to 1: {sparkline(mu)}\n  {values}", soft_wrap=True)
    console.print(f"The controller took {outcome['controller_share']:.2%} of the step time.")
    console.print(f"{outcome['seconds']:.0f} s in all. Report: {outcome['report']}", soft_wrap=True)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(argv: list[str] | None = None) -> int:
    """``python -m gac_kernels.train.demo --output DIR [--seed N] [--smoke]``."""
    parser = argparse.ArgumentParser(prog="python -m gac_kernels.train.demo", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="a directory for the runs and the report")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="every part in a few seconds, too short to learn anything")
    args = parser.parse_args(argv)
    if argv is None and "OMP_WAIT_POLICY" not in os.environ:
        # Read when torch is loaded, hence a new start: threads that spin while they wait make a step on a machine that
        # has other work, too, several times as long.
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {"OMP_WAIT_POLICY": "passive"})
    run_demo(_free(args.output), args.seed, smoke=args.smoke)
    return 0


def _free(output: Path) -> Path:
    """``output``, or the first of ``output-2``, ``output-3``, ... that is not there yet: an earlier demo stays."""
    names = chain([output], (output.with_name(f"{output.name}-{number}") for number in count(2)))
    return next(name for name in names if not name.exists())


if __name__ == "__main__":
    sys.exit(main())
