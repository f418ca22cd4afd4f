"""The report: right curves, one well-formed file that loads nothing, no word of the user's taken for markup."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from gac_kernels.train import _figures, report
from gac_kernels.train._figures import COLOURS, Line, chart, running_mean
from gac_kernels.train.report import write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}
KEYS = {
    "mu": 0.5, "gac/mu": 0.5, "gac/mu_star": 0.4, "gac/prior": 0.6, "gac/alpha": 0.5, "gac/sigma_s2": 2.0,
    "gac/sigma_r2": 0.1, "gac/delta2": 0.5, "reward": 0.3, "kl": 0.01, "entropy": 0.8, "loss": 1.0, "policy_loss": 0.1,
    "supervised_loss": 2.0, "ratio_mean": 1.0, "effective_update_ratio": 0.97, "grad_norm": 0.7, "lr": 1e-3,
    "step_seconds": 0.25, "controller_seconds": 0.0005, "response_length": 12.0,
}  # fmt: skip
TITLES = (
    "Accuracy", "Reward", "Mixing weight", "Signals", "KL divergence", "Entropy", "Loss", "Policy ratio",
    "Response length", "Gradient norm", "Learning rate", "Time of a step",
)  # fmt: skip


class Page(HTMLParser):
    """Checks nesting while it collects ids, references, tags and text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.tags: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], "unclosed elements"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def make_run(directory: Path, records: list[dict[str, Any]], **files: Any) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def titles(text: str) -> list[str]:
    return re.findall("<figcaption>(.*?)</figcaption>", text)


@pytest.fixture(scope="module")
def full_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    records = [{"step": step, **{key: value * (1 + 0.01 * step) for key, value in KEYS.items()}} for step in range(70)]
    for step in (0, 30, 69):
        records[step]["eval/accuracy"] = 0.1 + step / 100
    records[5]["kl"] = None
    output = make_run(
        tmp_path_factory.mktemp("run"),
        records,
        config={"model": "tiny", "warmup_sft_steps": 10, "nested": {"depth": [1, 2]}},
        summary={"accuracy_before": 0.125, "accuracy_after": 0.75, "seconds": 12.5},
    )
    return write_report(output, title="A run", extra={"speed-up": 14.6}).read_text(encoding="utf-8")


# The page -----------------------------------------------------------------------------------------------------------


def test_every_chart_is_there(full_page: str) -> None:
    assert tuple(titles(full_page)) == TITLES
    assert "thin: each step, thick: mean of 5" in full_page
    assert full_page.count("grey: supervised warm start") == len(TITLES)


def test_it_is_one_well_formed_file_that_loads_nothing(full_page: str) -> None:
    page = Page(full_page)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert {reference for reference in page.references if not reference.startswith("#")} == set()
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert "@import" not in full_page
    assert not re.search(r"url\((?!#)", full_page)
    for svg in re.findall(r"<svg xmlns:xlink.*?</svg>", full_page, flags=re.DOTALL):
        ElementTree.fromstring(svg)


def test_key_figures_tables_and_settings(full_page: str) -> None:
    text = re.sub(r"[ \n]+", " ", " ".join(Page(full_page).text))
    assert "Accuracy, before → after 12.5\u202f% → 75.0\u202f%" in text
    assert "Steps, warm start + run 10 + 59" in text
    assert "speed-up 14.6" in text
    assert "Controller’s share of the time 0.2\u202f%" in text
    assert "kl 0.01 0.0169 0.01 0.0169" in text  # first, last, least, greatest
    assert re.search(r"kl [\d. ]+ 70 1 ", text)  # 70 points, one not finite
    assert "nested.depth [1, 2]" in text
    assert "seconds 12.5" in text


def test_the_same_run_gives_the_same_bytes_whatever_style_the_user_set(tmp_path: Path) -> None:
    import matplotlib

    run = make_run(tmp_path, [{"step": step, "reward": step / 4} for step in range(3)])
    first = write_report(run).read_bytes()
    with matplotlib.rc_context({"axes.facecolor": "black", "lines.linewidth": 9, "svg.fonttype": "path"}):
        before = dict(matplotlib.rcParams)
        assert write_report(run).read_bytes() == first
        assert dict(matplotlib.rcParams) == before
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_no_pyplot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it would fail
    write_report(make_run(tmp_path, [{"step": 1, "reward": 0.5}]))


def test_matplotlib_is_needed_only_when_a_report_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    importlib.reload(_figures)
    importlib.reload(report)
    make_run(tmp_path, [{"step": 1, "reward": 0.5}])
    with pytest.raises(ImportError, match=r"plots needs the package 'matplotlib'.*gac-kernels\[train\]"):
        report.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


HOSTILE = "</td></style><script>alert('x')</script> & \"$title\" $x^2$ ${body} _hidden"


def test_what_the_user_wrote_is_text(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(
            tmp_path / name,
            [{"step": 1, "reward": 0.5, HOSTILE: 1.0}],
            config={HOSTILE: HOSTILE, "nested": {HOSTILE: [HOSTILE]}},
            summary={HOSTILE: HOSTILE, "accuracy_before": HOSTILE},
        )
    runs = {HOSTILE: tmp_path / "a", HOSTILE + "2": tmp_path / "b"}
    text = write_report(tmp_path, title=HOSTILE, extra={HOSTILE: HOSTILE}, runs=runs).read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags
    assert page.tags.count("style") == 1 + text.count("<svg xmlns:xlink")  # each chart brings its own
    shown = [part for part in page.text if HOSTILE in part]
    assert len(shown) >= 15


# What is not there --------------------------------------------------------------------------------------------------


def test_a_chart_without_data_is_left_out(tmp_path: Path) -> None:
    records = [{"step": 1, "reward": 0.5, "kl": None}, {"step": 2, "kl": None, "gac/delta2": 0.5}]
    text = write_report(make_run(tmp_path, records)).read_text()
    assert titles(text) == ["Reward", "Signals"]
    assert "disagreement" in text
    assert "noise of the rollouts" not in text


def test_a_run_of_one_step(tmp_path: Path) -> None:
    record = {"step": 1, **KEYS, "eval/accuracy": 0.5}
    text = write_report(make_run(tmp_path, [record])).read_text()
    assert tuple(titles(text)) == TITLES
    assert "Accuracy</dt><dd>50.0" in text
    Page(text)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-300, 1e300])
def test_values_that_are_hard_to_put_on_an_axis(tmp_path: Path, value: float) -> None:
    records = [
        {"step": step, "gac/delta2": value, "reward": value, "grad_norm": 0.0 if step else 1.0} for step in (0, 1)
    ]
    text = write_report(make_run(tmp_path, records)).read_text()
    assert titles(text) == ["Reward", "Signals", "Gradient norm"]
    assert "nan" not in text


def test_a_run_without_records(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path, [])).read_text()
    assert titles(text) == []
    assert "Nothing to draw was logged." in text


def test_the_warm_start_does_not_dilute_the_controllers_share(tmp_path: Path) -> None:
    records = [{"step": s, "step_seconds": 1.0, "controller_seconds": 0.25 if s > 8 else 0.0} for s in range(1, 11)]
    text = write_report(make_run(tmp_path, records, config={"warmup_sft_steps": 8})).read_text()
    assert "share of the time</dt><dd>25.0&#8239;%" in text


def test_two_records_of_one_step_are_one_point(tmp_path: Path) -> None:
    records = [{"step": 1, "reward": 0.25}, {"step": 1, "reward": 0.75, "eval/accuracy": 0.5}]
    run = report._Run("", make_run(tmp_path, records))
    assert run.metrics["reward"][1].tolist() == [0.75]
    assert run.metrics["eval/accuracy"][0].tolist() == [1.0]


def test_files_that_are_missing_or_malformed_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    make_run(tmp_path, [{"step": 1, "reward": 1.0}], config=[1])
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: "):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="runs must hold at least one run"):
        write_report(tmp_path, runs={})
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.json", "summary.json"])
@pytest.mark.parametrize("kind", ["brackets", "deep", "nan", "twice", "large", "fifo", "directory", "dangling"])
def test_a_file_that_is_no_json_object_is_named(tmp_path: Path, file: str, kind: str) -> None:
    contents = {
        "brackets": "[" * 100_000,
        "deep": '{"a":' * 100 + "1" + "}" * 100,
        "nan": '{"step": 1, "a": NaN}',
        "twice": '{"step": 1, "step": 2}',
        "large": '{"step": 1, "a": 1e999}',
    }
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    path = tmp_path / file
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_text(contents[kind] + "\n")
    with pytest.raises((ValueError, OSError), match=re.escape(str(path))):
        write_report(tmp_path)


# Several runs -------------------------------------------------------------------------------------------------------


def test_runs_are_compared_then_shown_one_by_one(tmp_path: Path) -> None:
    gac = make_run(
        tmp_path / "gac",
        [{"step": s, "reward": s / 4, "mu": 0.5, "eval/accuracy": 0.25 * s} for s in range(4)],
        config={"warmup_sft_steps": 1},
    )
    sft = make_run(tmp_path / "sft", [{"step": s, "mu": 1.0, "eval/accuracy": 0.125 * s} for s in range(3)])
    text = write_report(tmp_path / "both", runs={"GAC": gac, "SFT only": sft}).read_text()
    assert (tmp_path / "both" / "report.html").exists()
    assert re.findall("<h2>(.*?)</h2>", text) == ["Comparison", "GAC", "SFT only"]
    one_run = ["Accuracy", "Reward", "Mixing weight"]
    assert titles(text) == [*one_run, *one_run, "Accuracy", "Mixing weight"]
    accuracy, reward, *_ = re.findall("<figure.*?</figure>", text, flags=re.DOTALL)
    assert all(f"<span>{name}</span>" in accuracy for name in ("GAC", "SFT only"))
    assert "<span>SFT only</span>" not in reward
    assert "warm start" not in accuracy  # it is not the same in both
    table = text[text.index("<h2>Comparison") : text.index("<figure")]
    assert "0.0&#8239;% &rarr; 75.0&#8239;%" in table
    assert "0.0&#8239;% &rarr; 25.0&#8239;%" in table
    Page(text)


# The curves ---------------------------------------------------------------------------------------------------------


def drawn(svg: str, colour: str) -> list[list[tuple[float, float]]]:
    """The polylines of one colour, in the SVG's coordinates; a gap starts a new one."""
    paths = re.findall(rf'<path d="([^"]*)"[^>]*style="fill: none;[^"]*stroke: {colour}', svg)
    return [
        [tuple(map(float, point.split())) for point in piece.replace("L", " ").strip().split("\n")]  # type: ignore[misc]
        for path in paths
        for piece in path.split("M")[1:]
    ]


def line(values: list[float], style: int = 0, first: int = 0) -> Line:
    return Line(np.arange(first, first + len(values), dtype=np.float64), np.asarray(values), style)


@pytest.mark.parametrize("log", [False, True])
def test_a_line_runs_through_its_values(log: bool) -> None:
    values = [[4.0, 1.0, 2.0, 8.0, 8.0], [1.0, 16.0]]
    svg, note = chart([line(values[0]), line(values[1], 1, 2)], unit="u", identity="i", log=log, span=(0, 4))
    points = {style: drawn(svg, COLOURS[style]) for style in (0, 1)}
    assert note == ""
    assert [len(points[0]), len(points[1])] == [1, 1]
    heights = np.log(np.concatenate(values)) if log else np.concatenate(values)
    steps = np.array([0, 1, 2, 3, 4, 2, 3])
    x, y = np.asarray(points[0][0] + points[1][0]).T
    for data, place, up in ((steps, x, 1), (heights, y, -1)):  # SVG counts downwards
        slope, offset = np.polyfit(data, place, 1)
        assert slope * up > 0
        np.testing.assert_allclose(slope * data + offset, place, atol=1e-3)


def test_a_missing_value_is_a_gap(tmp_path: Path) -> None:
    svg, _ = chart([line([1.0, 2.0, math.nan, 3.0, 1.0])], unit="u", identity="i", span=(0, 4))
    assert [len(piece) for piece in drawn(svg, COLOURS[0])] == [2, 2]


def test_no_mean_runs_across_the_end_of_the_warm_start() -> None:
    values = [0.0] * 40 + [1.0] * 60
    svg, note = chart([line(values, first=1)], unit="u", identity="i", smooth=True, span=(1, 100), shade_until=40)
    assert note == "thin: each step, thick: mean of 5"
    pieces = drawn(svg, COLOURS[0])
    assert len(pieces) == 4  # thin and thick, before and after
    assert all(len({height for _, height in piece}) == 1 for piece in pieces)


def test_what_is_not_positive_is_left_off_a_logarithmic_axis() -> None:
    svg, _ = chart([line([1.0, 2.0, 0.0, 3.0, 1.0])], unit="u", identity="i", log=True, span=(0, 4))
    assert [len(piece) for piece in drawn(svg, COLOURS[0])] == [2, 2]


def test_running_mean_against_its_definition() -> None:
    values = np.random.default_rng(0).normal(size=23)
    values[[3, 4, 5, 20]] = np.nan
    for window in (1, 3, 7):
        half = window // 2
        for place, mean in enumerate(running_mean(values, window)):
            near = values[max(0, place - half) : place + half + 1]
            expected = np.nanmean(near) if np.isfinite(near).any() else np.nan
            np.testing.assert_allclose(mean, expected, rtol=1e-12)


def test_a_long_line_becomes_a_band_and_its_mean() -> None:
    class Axes:
        def fill_between(self, *arguments: Any, **_: Any) -> None:
            self.band = arguments

        def plot(self, *arguments: Any, **_: Any) -> None:
            self.mean = arguments

    values = np.random.default_rng(0).normal(size=1501)
    values[:9] = np.nan
    values[700] = np.nan
    axes = Axes()
    draw, note = _figures._way_to_draw(len(values), smooth=False)
    draw(axes, line(list(values), first=1), 1.0)
    assert note == "band: least to greatest of 6 points, line: their mean"
    middle, low, high = axes.band
    assert len(middle) == 251
    assert np.isnan([low[0], high[0], axes.mean[1][0]]).all()
    for bucket in range(1, 251):
        part = values[6 * bucket : 6 * bucket + 6]
        assert (low[bucket], high[bucket]) == (np.nanmin(part), np.nanmax(part))
        np.testing.assert_allclose(axes.mean[1][bucket], np.nanmean(part))
    np.testing.assert_allclose(middle[[0, 1, 250]], [3.5, 9.5, 1501])


def test_a_long_run_stays_a_small_file(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    run = make_run(tmp_path, [{"step": step, "reward": rng.random(), "mu": 0.5} for step in range(5000)])
    assert write_report(run).stat().st_size < 100_000
