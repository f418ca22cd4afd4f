"""Line charts as SVG text for the report: matplotlib's object interface, no pyplot and no state left behind.

The SVG holds axes and lines only. Titles and legends are HTML beside it, so that they are set in the page's own type
and escaped with everything else.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ._extras import require

Array = NDArray[np.float64]

# Okabe and Ito's colours, told apart by the colour-blind; the dashes do it on a black and white print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#c98f00", "#56b4e9")
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (6, 2, 1.5, 2), (8, 2), (3, 3))

_INK, _GRID, _SHADE = "#444a52", "#e6e8eb", "#f1f3f5"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "gac_kernels",  # the same numbers give the same file
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#b6bcc4",
    "axes.labelcolor": _INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": _GRID,
    "grid.linewidth": 0.8,
    "xtick.color": "#b6bcc4",
    "ytick.color": "#b6bcc4",
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.minor.visible": False,
}
_INCHES = (5.4, 2.5)
# The same in every chart, so that those of a page line up; room for labels such as 0.00005.
_FRAME, _UNIT_AT = (0.13, 0.165, 0.855, 0.73), (-0.152, 1.04)
_MARKERS_UP_TO = 40  # points; a lone one is invisible without its marker
_SMOOTH_FROM, _BAND_FROM = 60, 600  # points
_BUCKETS = 300


@dataclass(frozen=True)
class Line:
    """One series: `steps` rising, `values` with nan where there is none; `style` picks colour and dashes."""

    steps: Array
    values: Array
    style: int = 0

    @property
    def colour(self) -> str:
        return COLOURS[self.style % len(COLOURS)]

    @property
    def dashes(self) -> tuple[float, ...]:
        return DASHES[self.style % len(DASHES)]

    @property
    def look(self) -> dict[str, Any]:
        return {"color": self.colour, "linestyle": (0, self.dashes) if self.dashes else "solid", "linewidth": 1.6}


def chart(
    lines: Sequence[Line],
    *,
    unit: str,
    identity: str,
    smooth: bool = False,
    log: bool = False,
    percent: bool = False,
    limits: tuple[float, float] | None = None,
    span: tuple[int, int],
    shade_until: int = 0,
) -> tuple[str, str]:
    """Draw `lines` over the step: as they are, with a running mean, or, if long, as a band and its mean.

    Args:
        lines: at least one; the first is drawn on top.
        unit: label of the vertical axis: quantity and unit.
        identity: prefix of every id in the SVG, so that several can stand in one page.
        smooth: the values scatter, so a running mean is drawn over them.
        log: logarithmic vertical axis, if any value is positive; what is not positive is left out then.
        percent: label the vertical axis in per cent of 1.
        limits: least range of the vertical axis; data beyond it widens it.
        span: first and last step of the run, the same in all its charts.
        shade_until: last step of the warm start, shown as a band; 0 for none.

    Returns:
        An `<svg>` element that scales to the width of its parent, and a note on how to read the lines ("" if plain).
    """
    need = {"package": "matplotlib", "purpose": "the report's plots"}
    figure_type = require("matplotlib.figure", **need).Figure
    canvas_type = require("matplotlib.backends.backend_svg", **need).FigureCanvasSVG
    ticker, style = require("matplotlib.ticker", **need), require("matplotlib.style", **need)
    log = log and any((line.values > 0).any() for line in lines)
    if log:
        lines = [replace(line, values=np.where(line.values > 0, line.values, np.nan)) for line in lines]
    draw, note = _way_to_draw(max(len(line.values) for line in lines), smooth)
    # "default" first: what the user set for their own plots does not show here. All is as it was afterwards.
    with style.context(["default", _STYLE]):
        figure = figure_type(figsize=_INCHES)
        canvas = canvas_type(figure)
        axes = figure.add_axes(_FRAME)
        if log:
            axes.set_yscale("log")
        for place, line in enumerate(lines):
            # No mean over both sides of the warm start's end: what is measured changes there.
            for part in _split(line, shade_until) if note and shade_until else [line]:
                draw(axes, part, 3 - 0.1 * place)
        if shade_until:
            axes.axvspan(span[0], shade_until, color=_SHADE, zorder=0, linewidth=0)
        axes.set_xlabel("step")
        axes.set_ylabel(unit, rotation=0, horizontalalignment="left", verticalalignment="bottom")
        axes.yaxis.set_label_coords(*_UNIT_AT)  # above the numbers, where none is too long for it
        axes.yaxis.set_offset_position("right")
        axes.set_xlim(*_wider(float(span[0]), float(span[1])))
        axes.xaxis.set_major_locator(ticker.MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        if log:
            _label_decades(axes, ticker)
        if limits is not None:
            low, high = _wider(*limits)
            axes.set_ylim(min(low, axes.get_ylim()[0]), max(high, axes.get_ylim()[1]))
        if percent:
            axes.yaxis.set_major_formatter(ticker.PercentFormatter(xmax=1.0))
        buffer = io.StringIO()
        canvas.print_svg(buffer, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), identity), note


def running_mean(values: Array, window: int) -> Array:
    """Centred mean over `window` (odd) places, fewer at the ends; places without a value do not count."""
    finite = np.isfinite(values)
    ones = np.ones(window)
    total = np.convolve(np.where(finite, values, 0.0), ones)[window // 2 :][: len(values)]
    count = np.convolve(finite.astype(np.float64), ones)[window // 2 :][: len(values)]
    return np.where(count > 0.5, total / np.maximum(count, 1.0), np.nan)


def _split(line: Line, at: int) -> list[Line]:
    parts = [
        replace(line, steps=line.steps[side], values=line.values[side]) for side in (line.steps <= at, line.steps > at)
    ]
    return [part for part in parts if len(part.values)]


def _way_to_draw(points: int, smooth: bool) -> tuple[Callable[[Any, Line, float], None], str]:
    if points > _BAND_FROM:
        bucket = -(-points // _BUCKETS)
        return partial(_draw_band, bucket=bucket), f"band: least to greatest of {bucket} points, line: their mean"
    if smooth and points >= _SMOOTH_FROM:
        window = max(5, points // 30) | 1
        return partial(_draw_smoothed, window=window), f"thin: each step, thick: mean of {window}"
    return _draw_plain, ""


def _draw_plain(axes: Any, line: Line, zorder: float) -> None:
    marker = {"marker": "o", "markersize": 3.5} if len(line.values) <= _MARKERS_UP_TO else {}
    axes.plot(line.steps, line.values, zorder=zorder, **line.look, **marker)


def _draw_smoothed(axes: Any, line: Line, zorder: float, *, window: int) -> None:
    axes.plot(line.steps, line.values, color=line.colour, linewidth=0.7, alpha=0.3, zorder=zorder - 1)
    axes.plot(line.steps, running_mean(line.values, window), zorder=zorder, **line.look)


def _draw_band(axes: Any, line: Line, zorder: float, *, bucket: int) -> None:
    if len(line.values) <= bucket:
        return _draw_plain(axes, line, zorder)
    starts = np.arange(0, len(line.values), bucket)
    finite = np.isfinite(line.values)
    count = np.add.reduceat(finite.astype(np.float64), starts)
    low = np.where(count > 0, np.minimum.reduceat(np.where(finite, line.values, np.inf), starts), np.nan)
    high = np.where(count > 0, np.maximum.reduceat(np.where(finite, line.values, -np.inf), starts), np.nan)
    total = np.add.reduceat(np.where(finite, line.values, 0.0), starts)
    mean = np.where(count > 0, total / np.maximum(count, 1.0), np.nan)
    middle = np.add.reduceat(line.steps, starts) / np.add.reduceat(np.ones_like(line.steps), starts)
    axes.fill_between(middle, low, high, color=line.colour, alpha=0.2, linewidth=0, zorder=zorder - 1)
    axes.plot(middle, mean, zorder=zorder, **line.look)


def _wider(low: float, high: float) -> tuple[float, float]:
    margin = 0.03 * (high - low) or 0.5
    return low - margin, high + margin


def _label_decades(axes: Any, ticker: Any) -> None:
    """Plain numbers; between the powers of ten only where there are hardly any of those."""
    low, high = axes.get_ylim()
    plain = ticker.FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    axes.yaxis.set_minor_locator(ticker.LogLocator(subs=(2.0, 5.0)))
    axes.yaxis.set_minor_formatter(plain if np.log10(high / low) < 2 else ticker.NullFormatter())


def _inline(document: str, identity: str) -> str:
    """The bare `<svg>` element of an SVG file, its ids made unique, its fixed size dropped."""
    svg = document[document.index("<svg") :]
    svg = re.sub(r'(\bid="|url\(#|xlink:href="#)', rf"\g<1>{identity}-", svg)
    head, rest = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return f'{head} aria-hidden="true">{rest.strip()}'
