"""Hold the controller's estimators against the gradients of all parameters, along a short run of the training loop.

At checkpoints of the run an oracle measures, by separate backwards of the two branches over many small batches: the
variance of each branch's gradient (sigma_s2, sigma_r2, for a batch of a step's size) and the squared distance of their
means (delta2, less what sampling adds to it), and from them mu_star at alpha = 0.5. Each estimator then sees several
fresh batches of a step's size, of problems that the oracle does not draw.

A correlation is over all fresh batches; the oracle is one a checkpoint. Its interval (95 %, of Pearson's) resamples
checkpoints. "oracle's halves" is the correlation of two independent halves of the oracle: the ceiling that no
estimator should be expected to pass.

Falsified are the estimates with: advantages shuffled among the rollouts of a batch; phi shuffled among its
demonstration tokens; constant coefficients (advantage and phi 1); and, as the floor of the statistics, ordinary
estimates dealt out to points at random. An estimator whose correlation survives a control does not owe it to what
the control destroys.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from ..statistics import Correlation
    from ..train.validation import Points

HELP = "correlation of the controller's estimators with the gradients of the parameters themselves"
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
# (checkpoints, oracle batches a half, fresh batches a checkpoint, batches that a step is cut into)
SIZE, SMOKE_SIZE = (8, 32, 3, 8), (3, 4, 2, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="DIR|tiny", help="default: tiny")
    parser.add_argument("--task", default="arithmetic", metavar="arithmetic|FILE.jsonl", help="default: arithmetic")
    parser.add_argument("--checkpoints", type=int, help=f"points of the run, at least 3 (default: {SIZE[0]})")
    parser.add_argument(
        "--oracle-batches", type=int, help=f"small batches of each half of the oracle, at least 2 (default: {SIZE[1]})"
    )
    parser.add_argument("--groups", type=int, help=f"fresh batches at each checkpoint (default: {SIZE[2]})")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: that it runs; the figures mean nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="estimates against the oracle")


def run(args: argparse.Namespace, console: Console) -> int:
    sizes = dict(zip(("checkpoints", "oracle_batches", "groups"), SMOKE_SIZE if args.smoke else SIZE, strict=False))
    for name, least in (("checkpoints", 3), ("oracle_batches", 2), ("groups", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
        sizes[name] = sizes[name] if value is None else value
    from ..train._extras import require

    require("transformers", package="transformers", purpose="gac-kernels validate")
    if args.plot is not None:  # before the work, not after it
        if not args.plot.parent.is_dir():
            raise ValueError(f"--plot must lie in an existing directory, got {str(args.plot)!r}")
        require("matplotlib", package="matplotlib", purpose="gac-kernels validate --plot")
    from ..train.validation import conclude, measure, validation_config

    config = validation_config(args.model, args.task, args.seed, smoke=args.smoke)
    with console.progress("validate") as progress:
        points = measure(
            config,
            checkpoints=sizes["checkpoints"],
            groups=sizes["groups"],
            batches=sizes["oracle_batches"],
            parts=(SMOKE_SIZE if args.smoke else SIZE)[3],
            progress=progress,
        )
    found = conclude(points, args.seed)
    _tell(console, found, len(points.steps), points.groups)
    if "hidden" not in found["estimators"]:
        console.remark("hidden: left out, for this model's head is not understood and its loss is made from logits")
    if args.smoke:
        console.text("This was the smoke run: too small to say anything.")
    if args.plot is not None:
        _plot(args.plot, points)
        console.text(f"plot: {args.plot}")
    console.result(_plain(found))
    return 0


def _plain(found: Any) -> Any:
    """Correlations as dicts, for JSON, which knows no nan: what does not vary has no correlation, null."""
    if hasattr(found, "_asdict"):
        return {name: None if value != value else value for name, value in found._asdict().items()}
    return {name: _plain(value) for name, value in found.items()}


def _cell(found: Correlation) -> tuple[str, str]:
    return f"{found.pearson:.2f} [{found.low:.2f}, {found.high:.2f}]", f"{found.spearman:.2f}"


def _tell(console: Console, found: dict[str, Any], checkpoints: int, groups: int) -> None:
    from ..train.validation import SIGNALS

    header = ["", *(f"{name} {kind}" for name in SIGNALS for kind in ("Pearson [95 %]", "Spearman"))]

    def row(title: str, by_signal: dict[str, Correlation]) -> list[str]:
        return [title, *(cell for name in SIGNALS for cell in _cell(by_signal[name]))]

    rows = [row("oracle's halves", found["reliability"])]
    rows += [row(name, by_signal) for name, by_signal in found["estimators"].items()]
    console.table(f"Correlation with the oracle, {checkpoints} checkpoints x {groups} fresh batches", header, rows)
    rows = [
        row(f"{control}: {name}", by_signal)
        for control, estimators in found["falsified"].items()
        for name, by_signal in estimators.items()
    ]
    console.table("Falsified", header, rows)


def _plot(path: Path, points: Points) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..train.validation import SIGNALS

    ordinary = points.kinds["ordinary"]
    figure = Figure(figsize=(3.2 * len(SIGNALS), 2.8 * len(ordinary)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ordinary), len(SIGNALS), squeeze=False)
    truth, step_M = np.repeat(np.array(points.oracle), points.groups, axis=0), np.repeat(points.steps, points.groups)
    for line, (name, values) in zip(panels, ordinary.items(), strict=True):
        for i, panel in enumerate(line):
            dots = panel.scatter(truth[:, i], np.array(values)[:, i], c=step_M, s=14)
            panel.set_xlabel(f"oracle {SIGNALS[i]}")
            panel.set_ylabel(name)
    figure.colorbar(dots, ax=panels, label="optimizer step")
    figure.savefig(path, dpi=120)
