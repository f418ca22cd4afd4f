"""The report's charts: which metrics stand together, what they are called, in which unit."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ._figures import Array, Line, chart

__all__ = ["Metrics", "compared_charts", "run_charts"]

# key -> (steps, values), nan where a value was not finite
Metrics = Mapping[str, tuple[Array, Array]]


@dataclass(frozen=True)
class Panel:
    """One chart: which metrics (key -> legend, HTML) and how they are drawn."""

    title: str
    unit: str
    series: Mapping[str, str]
    note: str = ""
    smooth: bool = False
    log: bool = False
    percent: bool = False
    limits: tuple[float, float] | None = None


_ACCURACY = Panel(
    "Accuracy",
    "held-out problems solved",
    {"eval/accuracy": "accuracy"},
    "greedy decoding",
    percent=True,
    limits=(0, 1),
)
_REWARD = Panel("Reward", "mean reward of a rollout", {"reward": "reward"}, smooth=True)
_MU = Panel(
    "Mixing weight",
    "weight of the demonstrations",
    {
        "mu": "&mu;, as applied",
        "gac/mu_star": "&mu;*, closed form",
        "gac/prior": "prior",
        "gac/alpha": "&alpha;",
    },
    "0 is reinforcement learning alone, 1 is supervised learning alone",
    limits=(0, 1),
)
_ENTROPY = Panel("Entropy", "nats per token", {"entropy": "entropy of the policy"}, smooth=True)
_PANELS = (
    _ACCURACY,
    _REWARD,
    _MU,
    Panel(
        "Signals",
        "running average of the estimate",
        {
            "gac/sigma_s2": "&sigma;&sup2;<sub>s</sub>, noise of the demonstrations",
            "gac/sigma_r2": "&sigma;&sup2;<sub>r</sub>, noise of the rollouts",
            "gac/delta2": "&Delta;&sup2;, disagreement",
        },
        log=True,
    ),
    Panel("KL divergence", "nats per token", {"kl": "policy from the reference model"}, smooth=True),
    _ENTROPY,
    Panel(
        "Loss",
        "loss",
        {"loss": "total", "policy_loss": "policy", "supervised_loss": "supervised"},
        "each branch before its weight &mu; or 1 &minus; &mu;",
        smooth=True,
    ),
    Panel(
        "Policy ratio",
        "ratio",
        {"effective_update_ratio": "effective update ratio", "ratio_mean": "mean importance ratio"},
        "1 on the first update of a rollout batch",
        smooth=True,
        limits=(0, 1),
    ),
    Panel("Response length", "tokens", {"response_length": "mean length of a rollout"}, smooth=True),
    Panel("Gradient norm", "norm before clipping", {"grad_norm": "all parameters"}, log=True),
    Panel("Learning rate", "learning rate", {"lr": "learning rate"}),
    Panel(
        "Time of a step",
        "seconds",
        {
            "step_seconds": "whole step",
            "rollout_seconds": "rollouts",
            "controller_seconds": "controller and signals",
        },
        "logarithmic: the distance to the whole step is a part's share",
        log=True,
    ),
)
_COMPARED = (_ACCURACY, _REWARD, _MU, _ENTROPY)


def run_charts(metrics: Metrics, *, identity: str, span: tuple[int, int], warmup: int) -> str:
    """HTML of every chart of one run for which something was logged; `identity` keeps ids apart within a page."""
    drawn = []
    for number, panel in enumerate(_PANELS):
        lines = {}
        for style, (key, label) in enumerate(panel.series.items()):
            if (line := _line(metrics, key, style)) is not None:
                lines[label] = line
        if lines:
            drawn.append(_figure(panel, lines, f"{identity}-{number}", span, warmup))
    return _grid(drawn)


def compared_charts(runs: Mapping[str, Metrics], *, span: tuple[int, int], warmup: int) -> str:
    """HTML of the charts that show one metric of several runs, by name."""
    drawn = []
    for number, panel in enumerate(_COMPARED):
        key, lines = next(iter(panel.series)), {}
        for style, (name, metrics) in enumerate(runs.items()):
            if (line := _line(metrics, key, style)) is not None:
                lines[html.escape(name)] = line
        if lines:
            drawn.append(_figure(panel, lines, f"compared-{number}", span, warmup))
    return _grid(drawn)


def _line(metrics: Metrics, key: str, style: int) -> Line | None:
    if key not in metrics or not np.isfinite(metrics[key][1]).any():
        return None
    return Line(*metrics[key], style)


def _grid(drawn: list[str]) -> str:
    return f'<div class="charts">{"".join(drawn)}</div>' if drawn else "<p>Nothing to draw was logged.</p>"


def _figure(panel: Panel, lines: Mapping[str, Line], identity: str, span: tuple[int, int], warmup: int) -> str:
    if panel.log:  # what is 0 throughout (the controller of a run without one) has no place on the axis
        lines = {label: line for label, line in lines.items() if (line.values > 0).any()} or lines
    svg, reading = chart(
        list(lines.values()),
        unit=panel.unit,
        identity=identity,
        smooth=panel.smooth,
        log=panel.log,
        percent=panel.percent,
        limits=panel.limits,
        span=span,
        shade_until=warmup,
    )
    legend = "".join(f"<li>{_swatch(line)}<span>{label}</span></li>" for label, line in lines.items())
    notes = "; ".join(filter(None, (panel.note, reading, "grey: supervised warm start" if warmup else "")))
    note = f'<p class="note">{notes}</p>' if notes else ""
    return (
        f'<figure role="img" aria-label="{panel.title}"><figcaption>{panel.title}</figcaption>'
        f'<ul class="legend">{legend}</ul>{svg}{note}</figure>'
    )


def _swatch(line: Line) -> str:
    dashes = f' stroke-dasharray="{" ".join(f"{dash * 1.6:g}" for dash in line.dashes)}"' if line.dashes else ""
    return (
        '<svg class="swatch" viewBox="0 0 26 4" aria-hidden="true">'
        f'<path d="M0 2H26" stroke="{line.colour}" stroke-width="2.6"{dashes}/></svg>'
    )
