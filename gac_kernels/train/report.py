"""report.html: one page, in one file, of what a run did, or of several runs side by side."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterator, Mapping
from numbers import Real
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._page import PAGE
from ._panels import Metrics, compared_charts, run_charts
from ._reading import read_json_object
from .metrics import METRICS_FILE, read_metrics

__all__ = ["write_report"]

REPORT_FILE = "report.html"

Values = NDArray[np.float64]


class _Run:
    """What one run's directory holds: its metrics by key, its settings and its result."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.config = _read_object(directory / "config.json")
        self.summary = _read_object(directory / "summary.json")
        by_step: dict[int, dict[str, Any]] = {}
        for record in read_metrics(directory / METRICS_FILE):
            by_step.setdefault(record["step"], {}).update(record)
        self.span = (min(by_step, default=0), max(by_step, default=0))
        points: dict[str, list[tuple[float, float]]] = {}
        for step, record in sorted(by_step.items()):
            for key, value in record.items():
                if key != "step" and isinstance(value, (int, float, type(None))):
                    points.setdefault(key, []).append((step, np.nan if value is None else value))
        columns = {key: np.asarray(pairs, dtype=np.float64).T for key, pairs in points.items()}
        self.metrics: Metrics = {key: (steps, values) for key, (steps, values) in columns.items()}

    @property
    def warmup(self) -> int:
        steps = self.config.get("warmup_sft_steps", 0)
        return min(steps, self.span[1]) if isinstance(steps, int) else 0

    def values(self, key: str, after: int = -1) -> Values:
        """The finite values of a metric at the steps after `after`; empty if it was not logged."""
        steps, values = self.metrics.get(key, (np.empty(0), np.empty(0)))
        return values[np.isfinite(values) & (steps > after)]


def write_report(
    output: Path,
    *,
    title: str = "Training report",
    extra: Mapping[str, object] | None = None,
    runs: Mapping[str, Path] | None = None,
) -> Path:
    """Write `output/report.html`: charts, key figures and settings, with nothing to load from elsewhere.

    Args:
        output: where the report goes; also the run, unless `runs` is given. A run is a directory with metrics.jsonl
            and, where there are, config.json and summary.json.
        title: heading of the page.
        extra: further key figures, name -> value, shown at the top.
        runs: name -> run. They are compared in shared charts (accuracy, reward, mu, entropy), then shown one by one.

    Returns:
        The path of the report. It replaces an earlier one in one step.

    Raises:
        FileNotFoundError: a run has no metrics.jsonl.
        ValueError: a file of a run is malformed (names it), or `runs` is empty.
        ImportError: matplotlib is missing; names the extra that brings it.
    """
    if runs is not None and not runs:
        raise ValueError("runs must hold at least one run, or be None for the run in output")
    output = Path(output)
    loaded = [_Run(name, Path(path)) for name, path in (runs or {"": output}).items()]
    parts = [_key_figures(loaded[0] if len(loaded) == 1 else None, extra or {}), *map(_notices, loaded)]
    if len(loaded) > 1:
        parts += ["<h2>Comparison</h2>", _comparison_table(loaded), _comparison_charts(loaded)]
    for index, run in enumerate(loaded):
        if run.name:
            parts.append(f"<h2>{html.escape(run.name)}</h2>")
        charts = run_charts(run.metrics, identity=f"run{index}", span=run.span, warmup=run.warmup)
        parts += [charts, _summary_table(run), _settings(run)]
    page = Template(PAGE).substitute(title=html.escape(title), body="\n".join(filter(None, parts)))
    path = output / REPORT_FILE
    output.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, path)
    return path


def _read_object(path: Path) -> dict[str, Any]:
    return read_json_object(path) if os.path.lexists(path) else {}


# Key figures --------------------------------------------------------------------------------------------------------


def _number(value: object) -> str:
    """A value for people, escaped."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return html.escape(value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False))
    if isinstance(value, int) or (abs(value) < 1e15 and value == round(value)):
        return f"{int(value):,}"
    return f"{value:.4g}"


def _percent(share: Any) -> str:
    digits = ".1f" if abs(share) >= 0.01 or share == 0 else ".2g"
    return f"{100 * share:{digits}}&#8239;%"  # a narrow space that does not break


def _last_tenth(values: Values) -> float:
    return float(values[-max(1, len(values) // 10) :].mean())


def _figures(run: _Run) -> Iterator[tuple[str, str]]:
    """(name, value as HTML) of what a reader asks first."""
    accuracy = run.values("eval/accuracy")
    before = run.summary.get("accuracy_before", accuracy[0] if len(accuracy) > 1 else None)
    after = run.summary.get("accuracy_after", accuracy[-1] if len(accuracy) else None)
    if isinstance(before, Real) and isinstance(after, Real):
        yield "Accuracy, before &rarr; after", f"{_percent(before)} &rarr; {_percent(after)}"
    elif isinstance(after, Real):
        yield "Accuracy", _percent(after)
    if (reward := run.values("reward")).size:
        yield "Reward, last tenth of the run", f"{_last_tenth(reward):.3f}"
    if (mu := run.values("mu")).size:
        yield "&mu; of the last step", f"{mu[-1]:.3f}"
    if run.warmup:
        yield "Steps, warm start + run", f"{run.warmup:,} + {run.span[1] - run.warmup:,}"
    else:
        yield "Steps", f"{run.span[1]:,}"
    if (whole := run.values("step_seconds", after=run.warmup)).size:
        yield "Seconds a step, median", f"{np.median(whole):.3g}"
        if (controller := run.values("controller_seconds", after=run.warmup)).size:
            yield "Controller&rsquo;s share of the time", _percent(controller.sum() / whole.sum())


def _key_figures(run: _Run | None, extra: Mapping[str, object]) -> str:
    figures = list(_figures(run)) if run is not None else []
    figures += [(html.escape(str(name)), _number(value)) for name, value in extra.items()]
    cards = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures)
    return f'<dl class="figures">{cards}</dl>' if cards else ""


def _notices(run: _Run) -> str:
    """What the run had to say, where it is seen first."""
    told = run.summary.get("notices")
    texts = [text for text in told if isinstance(text, str)] if isinstance(told, list) else []
    name = f"<b>{html.escape(run.name)}</b>: " if run.name else ""
    return "".join(f'<p class="notice">{name}{html.escape(text)}</p>' for text in texts)


def _comparison_table(runs: list[_Run]) -> str:
    by_run = [dict(_figures(run)) for run in runs]
    names = list(dict.fromkeys(name for figures in by_run for name in figures))
    head = "<th>Run</th>" + "".join(f"<th>{name}</th>" for name in names)
    rows = [
        [html.escape(run.name), *(figures.get(name, "&ndash;") for name in names)]
        for run, figures in zip(runs, by_run, strict=True)
    ]
    return _table(head, rows)


def _comparison_charts(runs: list[_Run]) -> str:
    warmups = {run.warmup for run in runs}
    return compared_charts(
        {run.name: run.metrics for run in runs},
        span=(min(run.span[0] for run in runs), max(run.span[1] for run in runs)),
        warmup=warmups.pop() if len(warmups) == 1 else 0,
    )


# Tables -------------------------------------------------------------------------------------------------------------


def _table(head: str, rows: list[list[str]], kind: str = "") -> str:
    body = "".join(f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in rows)
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _summary_table(run: _Run) -> str:
    rows = []
    for key, (_, logged) in run.metrics.items():
        values = run.values(key)
        numbers = [values[0], values[-1], values.min(), values.max(), _last_tenth(values)] if values.size else []
        cells = [_number(float(number)) for number in numbers] or ["&ndash;"] * 5
        rows.append([f"<code>{html.escape(key)}</code>", *cells, str(len(logged)), str(len(logged) - len(values))])
    columns = ("Metric", "First", "Last", "Least", "Greatest", "Mean of last tenth", "Points", "Not finite")
    head = "".join(f"<th>{column}</th>" for column in columns)
    return f"<h3>All metrics</h3>{_table(head, rows)}" if rows else ""


def _settings(run: _Run) -> str:
    tables = []
    result = {key: value for key, value in run.summary.items() if key != "notices"}  # above
    for heading, content in (("Result", result), ("Settings", run.config)):
        rows = [[f"<code>{html.escape(key)}</code>", _number(value)] for key, value in _flatten(content)]
        if rows:
            tables.append(f"<h3>{heading}</h3>{_table('<th>Name</th><th>Value</th>', rows, 'settings')}")
    return "".join(tables)


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in content.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
