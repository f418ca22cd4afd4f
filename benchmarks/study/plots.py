"""The plots of the study, from its collected results alone: means over seeds, and intervals of the outcomes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .tables import Arms, by_arm, gain, interval, kl_area

# Okabe and Ito's colours, told apart by the colour-blind.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DPI = 80
Curve = list[tuple[float, float]]


def write_plots(results: dict[str, Any], docs: Path) -> list[Path]:
    """One PNG a question; those without results are left out."""
    updates, written = results["size"]["updates"], []
    makers: dict[str, tuple[str, Callable[[Arms], Figure]]] = {
        "controllers.png": ("controllers", _outcomes),
        "controllers-over-time.png": ("controllers", _courses),
        "gates.png": ("gates", lambda arms: _objectives(arms, "effective_update_ratio", updates, 2)),
        "dfpo.png": ("dfpo", lambda arms: _objectives(arms, "residual", updates, 1)),
        "gift.png": ("gift", _stages),
    }
    for name, (group, make) in makers.items():
        if arms := by_arm(results, group):
            figure = make(arms)
            FigureCanvasAgg(figure)
            figure.savefig(docs / name, dpi=DPI, metadata={"Software": None})
            written.append(docs / name)
    return written


def _outcomes(arms: Arms) -> Figure:
    """Gain of accuracy and KL-drift area of every arm with their intervals; the grey points are the seeds."""
    figure = Figure(figsize=(9, 0.32 * len(arms) + 1.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, value, label in (
        (left, lambda run: 100 * gain(run), "gain of accuracy over the start, points"),
        (right, kl_area, "KL-drift area, nats a token times steps"),
    ):
        for place, runs in enumerate(arms.values()):
            values = [value(run) for run in runs.values()]
            mean, half = interval(values)
            axes.plot(values, [place] * len(values), "o", color="#bbbbbb", markersize=4)
            axes.errorbar(mean, place, xerr=half, fmt="o", color=COLOURS[0], capsize=3, markersize=5)
        axes.set_xlabel(label)
        axes.grid(axis="x", color="#e6e8eb")
        axes.set_axisbelow(True)
    left.set_yticks(range(len(arms)), arms)
    left.invert_yaxis()
    return figure


def _courses(arms: Arms) -> Figure:
    """mu and the probe's KL over the steps: baselines on the left, GAC on the right."""
    ours = {name: runs for name, runs in arms.items() if name.startswith("GAC")}
    baselines = {name: runs for name, runs in arms.items() if name not in ours}
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    for column, part in enumerate((baselines, ours)):
        _lines(grid[0][column], part, lambda run: logged(run["stages"][0], "mu", 1))
        _lines(grid[1][column], part, lambda run: [(p[0], p[1]) for p in run["stages"][0]["probe"]])
        grid[0][column].legend(fontsize=8, ncols=2)
        grid[1][column].set_xlabel("optimizer step")
    grid[0][0].set_ylabel("mu, weight of the demonstrations")
    grid[1][0].set_ylabel("KL to the start, nats a token")
    return figure


def _objectives(arms: Arms, name: str, updates: int, parts: int) -> Figure:
    """A logged value, the rollouts' entropy and the accuracy over the steps, the arms in ``parts`` rows; the value of
    steps that are not the first on their rollout batch, as a mean over each batch."""
    figure = Figure(figsize=(11, 2.9 * parts), layout="constrained")
    grid = figure.subplots(parts, 3, sharex=True, sharey="col", squeeze=False)
    each = -(-len(arms) // parts)
    for row, axes in enumerate(grid):
        part = dict(list(arms.items())[row * each : (row + 1) * each])
        _lines(axes[0], part, lambda run: logged(run["stages"][0], name, updates, skip=1))
        _lines(axes[1], part, lambda run: logged(run["stages"][0], "entropy", updates))
        _lines(axes[2], part, lambda run: [(s, 100 * a) for s, a in run["stages"][0]["accuracy"]])
        axes[0].legend(fontsize=8)
    for axes, label in zip(grid[-1], (name.replace("_", " "), "entropy of rollouts, nats", "accuracy, %"), strict=True):
        axes.set_xlabel(f"optimizer step\n{label}")
    return figure


def _stages(arms: Arms) -> Figure:
    """Accuracy and entropy over both stages, one behind the other."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    _lines(left, arms, lambda run: _joined(run, "accuracy", 1, 100))
    _lines(right, arms, lambda run: _joined(run, "probe", 2, 1))
    left.legend(fontsize=8)
    for axes, label in ((left, "accuracy, %"), (right, "entropy on the probe, nats a token")):
        first = next(iter(next(iter(arms.values())).values()))["stages"][0]["probe"][-1][0]
        axes.axvline(first, color="#999999", linewidth=0.8, linestyle=":")
        axes.set_xlabel("optimizer step: supervised, then RL")
        axes.set_ylabel(label)
    return figure


def _joined(run: dict[str, Any], name: str, column: int, scale: float) -> Curve:
    curve: Curve = []
    for stage in run["stages"]:
        offset = curve[-1][0] if curve else 0
        curve += [(offset + point[0], scale * point[column]) for point in stage[name]]
    return curve


def logged(stage: dict[str, Any], name: str, block: int, skip: int = 0) -> Curve:
    """(last step, mean) of a logged value over blocks of steps, of each the first ``skip`` steps left out."""
    values: list[float] = stage["steps"][name]
    curve: Curve = []
    for start in range(0, len(values), block):
        part = values[start + skip : start + block]
        if part:
            curve.append((start + skip + len(part), sum(part) / len(part)))
    return curve


def _lines(axes: Axes, arms: Arms, curve: Callable[[dict[str, Any]], Curve]) -> None:
    """The mean over seeds of each arm's curve."""
    for number, (arm, runs) in enumerate(arms.items()):
        curves: Sequence[Curve] = [curve(run) for run in runs.values()]
        steps = [point[0] for point in curves[0]]
        means = [sum(c[place][1] for c in curves) / len(curves) for place in range(len(steps))]
        style = "-" if number < len(COLOURS) else "--"
        axes.plot(steps, means, style, color=COLOURS[number % len(COLOURS)], label=arm, linewidth=1.5)
    axes.grid(color="#e6e8eb")
    axes.set_axisbelow(True)
