"""Hold the controller's estimators against the gradients of all parameters, along short runs of the training loop.

At checkpoints of each run an oracle measures, by separate backwards of the two branches over many small batches: the
variance of each branch's gradient (sigma_s2, sigma_r2, for a batch of a step's size) and the squared distance of their
means (delta2, less what sampling adds to it), and from them mu_star at alpha = 0.5. So that the truth varies with more
than training time, it is measured in several conditions at the same weights: none, half and all of the demonstrations
exchanged among problems, and none, half and all of the verdicts turned over; every pair of conditions is a point. Each
estimator sees fresh sequences, of problems that the oracle does not draw: its signals are means over several steps, as
the controller's averages are, and its mu_star comes from these.

Three views of the points: "all"; "within", each value less its checkpoint's mean, where no trend along a run can help;
and "run", the data as they are, the trend included. Intervals (95 %, of Pearson's) resample checkpoints.
"reliability" is that of the oracle: the correlation r of two halves of disjoint problems, stepped up to the whole by
2 r / (1 + r). A perfect estimator of the truth would correlate with the oracle at its square root.

Falsified are the estimates with: advantages dealt out anew among the rollouts at the checkpoint; phi and log-probs
among the demonstrations' tokens; both; constant coefficients (advantage, phi and NLL 1). An estimator whose correlation
survives a control does not owe it to what the control destroys: "logit" and "hidden" know more than coefficients.
"points" are ordinary estimates dealt out to points at random; its interval is what chance can reach.
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
# Nothing is fetched, whatever a model directory or transformers would ask a hub for.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}
SIZE = {"runs": 2, "checkpoints": 8, "oracle_batches": 32, "groups": 6, "conditions": 3}
SMOKE_SIZE = {"runs": 1, "checkpoints": 3, "oracle_batches": 3, "groups": 2, "conditions": 2}
LEAST = {"runs": 1, "checkpoints": 2, "oracle_batches": 2, "groups": 1, "conditions": 1}
MOST = {"conditions": 3}
MEANING = {
    "runs": "runs, with seeds and mixtures of their own",
    "checkpoints": "checkpoints of each run",
    "oracle_batches": "small batches, a quarter of a step each, of each half of the oracle, a condition and branch",
    "groups": "steps of fresh sequences that the estimators average over",
    "conditions": "conditions of each branch, 1 (the data as they are) to 3; each takes the memory of 6 gradients",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="DIR|tiny", help="default: tiny")
    parser.add_argument("--task", default="arithmetic", metavar="arithmetic|FILE.jsonl", help="default: arithmetic")
    for name, meaning in MEANING.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, metavar="N", help=f"{meaning} (default: {SIZE[name]})")
    parser.add_argument("--smoke", action="store_true", help="smallest sizes: that it runs; the figures mean nothing")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="estimates against the oracle")


def run(args: argparse.Namespace, console: Console) -> int:
    sizes = _sizes(args)
    from ..train._extras import require

    require("transformers", package="transformers", purpose="gac-kernels validate")
    if args.plot is not None:  # before the work, not after it
        if not args.plot.parent.is_dir():
            raise ValueError(f"--plot must lie in an existing directory, got {str(args.plot)!r}")
        require("matplotlib", package="matplotlib", purpose="gac-kernels validate --plot")
    from ..train.validation import Sizes, conclude, measure, validation_config

    configs = [
        validation_config(args.model, args.task, args.seed, run=number, smoke=args.smoke)
        for number in range(sizes.pop("runs"))
    ]
    with console.progress("validate") as progress:
        points = measure(configs, Sizes(**sizes, parts=4), progress)
    found = conclude(points, args.seed)
    _tell(console, found)
    if "hidden" not in found["estimators"]:
        console.remark("hidden: left out, for this model's head is not understood and its loss is made from logits")
    if args.smoke:
        console.text("This was the smoke run: too small to say anything.")
    if args.plot is not None:
        _plot(args.plot, points)
        console.text(f"plot: {args.plot}")
    console.result(_plain(found))
    return 0


def _sizes(args: argparse.Namespace) -> dict[str, int]:
    sizes = dict(SMOKE_SIZE if args.smoke else SIZE)
    for name in sizes:
        value = getattr(args, name)
        if value is None:
            continue
        flag, most = f"--{name.replace('_', '-')}", MOST.get(name, value)
        if value < LEAST[name]:
            raise ValueError(f"{flag} must be at least {LEAST[name]}, got {value}")
        if value > most:
            raise ValueError(f"{flag} must be at most {most}, got {value}")
        sizes[name] = value
    if sizes["runs"] * sizes["checkpoints"] < 3:
        raise ValueError(f"--runs and --checkpoints must make at least 3 checkpoints, got {sizes['checkpoints']}")
    return sizes


def _plain(found: Any) -> Any:
    """Correlations and intervals as dicts, for JSON."""
    if hasattr(found, "_asdict"):
        return found._asdict()
    return {name: _plain(value) for name, value in found.items()} if isinstance(found, dict) else found


def _tell(console: Console, found: dict[str, Any]) -> None:
    from ..train.validation import SIGNALS, VIEWS

    header = ["", *(f"{name} {kind}" for name in SIGNALS for kind in ("Pearson [95 %]", "Spearman"))]

    def row(title: str, by_signal: dict[str, Correlation]) -> list[str]:
        return [title, *(cell for name in SIGNALS for cell in _cell(by_signal[name]))]

    for name, meaning in VIEWS.items():
        view = found if name == "all" else found[name]
        rows = [row("reliability", view["reliability"])]
        rows += [row(estimator, by_signal) for estimator, by_signal in view["estimators"].items()]
        console.table(f"Correlation with the oracle, {meaning}", header, rows)
    rows = [
        row(f"{control}: {name}", by_signal)
        for control, estimators in found["within"]["falsified"].items()
        for name, by_signal in estimators.items()
    ]
    console.table(f"Falsified, {VIEWS['within']}", header, rows)
    rows = [[name, f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]"] for name, e in found["mu_error"].items()]
    console.table("Mean distance of mu_star from the oracle's, all points", ["", "[95 %]"], rows)


def _cell(found: Correlation) -> tuple[str, str]:
    return f"{found.pearson:.2f} [{found.low:.2f}, {found.high:.2f}]", f"{found.spearman:.2f}"


def _plot(path: Path, points: Points) -> None:
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from ..train.validation import SIGNALS

    ordinary = points.kinds["ordinary"]
    figure = Figure(figsize=(3.2 * len(SIGNALS), 2.8 * len(ordinary)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(ordinary), len(SIGNALS), squeeze=False)
    truth, (run_M, step_M) = np.array(points.oracle), np.array(points.place).T
    for line, (name, values) in zip(panels, ordinary.items(), strict=True):
        for i, panel in enumerate(line):
            for run in np.unique(run_M):
                kept = run_M == run
                dots = panel.scatter(
                    truth[kept, i], np.array(values)[kept, i], c=step_M[kept], s=14, marker="osD^v"[run % 5],
                    vmin=step_M.min(), vmax=step_M.max(),
                )  # fmt: skip
            panel.set_xlabel(f"oracle {SIGNALS[i]}")
            panel.set_ylabel(name)
    figure.colorbar(dots, ax=panels, label="optimizer step (marker: run)")
    figure.savefig(path, dpi=120)
