"""The record of a run: what is written, what survives a kill, and what a resumed run leaves of it."""

from __future__ import annotations

import io
import json
import math
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gac_kernels.train import _display as display
from gac_kernels.train import metrics as module
from gac_kernels.train.metrics import MetricsWriter, read_metrics


def lines(output: Path) -> list[str]:
    return (output / "metrics.jsonl").read_text().splitlines()


def write(output: Path, steps: range, value: float = 0.0, **options: Any) -> None:
    with MetricsWriter(output, show=False, **options) as writer:
        for step in steps:
            writer.log(step, {"reward": value + step})


def test_one_json_object_a_line_with_step_first(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "new" / "run", show=False) as writer:
        writer.log(0, {"eval/accuracy": 0.25})
        writer.log(1, {"reward": 1.5, "gac/mu": torch.tensor(0.1), "count": 3})
    first, second = lines(tmp_path / "new" / "run")
    assert first == '{"step": 0, "eval/accuracy": 0.25}'
    assert list(json.loads(second)) == ["step", "reward", "gac/mu", "count"]
    assert read_metrics(tmp_path / "new" / "run" / "metrics.jsonl") == [
        {"step": 0, "eval/accuracy": 0.25},
        {"step": 1, "reward": 1.5, "gac/mu": torch.tensor(0.1).item(), "count": 3},
    ]


def test_every_kind_of_number_is_written_exactly(tmp_path: Path) -> None:
    values = {
        "f32": torch.tensor(0.1),
        "f64": torch.tensor([0.1], dtype=torch.float64),
        "bf16": torch.tensor([[0.1]], dtype=torch.bfloat16, requires_grad=True),
        "i64": torch.tensor(2**60 + 1),
        "f32_too": torch.tensor(-2.5),
        "flag": torch.tensor(True),
        "numpy": np.float32(0.1),
        "fraction": Fraction(1, 4),
        "int": 2**60 + 1,
    }
    with MetricsWriter(tmp_path, show=False) as writer:
        writer.log(3, values)
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert list(record) == ["step", *values]
    for name in ("f32", "f64", "bf16", "i64", "f32_too", "flag"):
        assert record[name] == values[name].item(), name  # type: ignore[union-attr]
    assert (record["numpy"], record["fraction"], record["int"]) == (float(np.float32(0.1)), 0.25, 2**60 + 1)


def test_values_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, show=False) as writer:
        writer.log(1, {"a": math.nan, "b": torch.tensor(math.inf), "c": -math.inf, "d": 1.0})
    assert lines(tmp_path) == ['{"step": 1, "a": null, "b": null, "c": null, "d": 1.0}']


def test_tensors_of_one_kind_are_read_by_one_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    tolist = torch.Tensor.tolist

    def counting(self: torch.Tensor) -> Any:
        reads.append(self.numel())
        return tolist(self)

    def forbidden(self: torch.Tensor) -> Any:
        raise AssertionError("a tensor was read by itself")

    with MetricsWriter(tmp_path, show=False) as writer:
        monkeypatch.setattr(torch.Tensor, "tolist", counting)
        for name in ("item", "__float__", "__bool__"):
            monkeypatch.setattr(torch.Tensor, name, forbidden)
        writer.log(1, {f"gac/{i}": torch.tensor(float(i)) for i in range(8)} | {"count": torch.tensor(1)})
    assert sorted(reads) == [1, 8]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"text": "high"}, TypeError, r"values\['text'\] must be a number or a tensor, got str"),
        ({"none": None}, TypeError, r"values\['none'\].*NoneType"),
        ({"vector": torch.zeros(2)}, ValueError, r"values\['vector'\] must have one element, got shape \(2,\)"),
        ({"step": 1}, ValueError, '"step"'),
    ],
)
def test_what_is_no_number_is_refused_by_name(
    tmp_path: Path, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with MetricsWriter(tmp_path, show=False) as writer, pytest.raises(error, match=message):
        writer.log(1, values)
    assert lines(tmp_path) == []


def test_steps_do_not_go_back(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, show=False) as writer:
        writer.log(5, {"a": 1.0})
        writer.log(5, {"b": 1.0})
        with pytest.raises(ValueError, match="step must not go back: 4 after 5"):
            writer.log(4, {"a": 1.0})


def test_a_line_is_there_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, show=False) as writer:
        writer.log(1, {"a": 1.0})
        assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": 1.0}]


# Resuming -----------------------------------------------------------------------------------------------------------


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    before = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 8, "rew')
    write(tmp_path, range(6, 9), value=100.0, resume_step=5)
    assert lines(tmp_path)[:5] == before[:5]  # byte for byte
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [record["reward"] for record in records[5:]] == [106.0, 107.0, 108.0]
    assert [path.name for path in tmp_path.glob("*.tmp")] == []


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1}\n{"step": 2, "a": 2}')
    write(tmp_path, range(3, 4), resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_resuming_before_the_first_checkpoint_keeps_only_step_0(tmp_path: Path) -> None:
    write(tmp_path, range(3))
    write(tmp_path, range(1, 2), value=50.0, resume_step=0)
    assert [record["reward"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0.0, 51.0]


def test_resuming_where_nothing_was_logged(tmp_path: Path) -> None:
    write(tmp_path, range(6, 7), resume_step=5)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [6]


def test_a_resumed_run_does_not_log_below_its_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, show=False, resume_step=5) as writer, pytest.raises(ValueError, match="4 after 5"):
        writer.log(4, {"a": 1.0})


def test_starting_anew_replaces_the_file(tmp_path: Path) -> None:
    write(tmp_path, range(5))
    write(tmp_path, range(1))
    assert len(lines(tmp_path)) == 1


def test_a_failing_rewrite_leaves_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(5))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        MetricsWriter(tmp_path, show=False, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_tensorboard_holds_each_step_once_after_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 10), value=100.0, resume_step=5)
    accumulator = EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    scalars = accumulator.Scalars("reward")
    assert [(event.step, event.value) for event in scalars] == [
        (step, float(step if step < 6 else 100 + step)) for step in range(1, 10)
    ]


# Reading ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("torn", ['{"step": 3', "", "{", "\0\0\0", '{"step": 3, "a": 1.', "\udcff"])
def test_only_a_torn_last_line_is_forgiven(tmp_path: Path, torn: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n' + torn.encode(errors="surrogateescape"))
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize(
    "malformed",
    ['{"step": 2', "", "[2]", '{"reward": 1}', '{"step": "2"}', '{"step": 2.0}', '{"step": 2, "a": NaN}', "null"],
)
@pytest.mark.parametrize("tail", ['\n{"step": 3}\n', "\n"], ids=["in the middle", "last but whole"])
def test_any_other_malformed_line_is_named(tmp_path: Path, malformed: str, tail: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + malformed + tail)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: "):
        read_metrics(path)


def test_reading_nothing(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "missing.jsonl")


# The terminal -------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_plain_line_now_and_then(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(display.time, "monotonic", lambda: clock[0])
    with MetricsWriter(tmp_path, total_steps=9) as writer:
        for step in range(1, 10):
            clock[0] += 4.0
            values = {"mu": 0.5, "reward": step / 8, "secret": 1.0}
            writer.log(step, values | ({"eval/accuracy": 0.75} if step == 5 else {}))
    out, err = capsys.readouterr()
    assert out == ""  # left to results
    assert err.splitlines() == [
        "step 1/9  mu 0.500  reward 0.125",
        "step 4/9  mu 0.500  reward 0.500",  # more than 10 s later
        "step 5/9  mu 0.500  reward 0.625  accuracy 0.750",
        "step 8/9  mu 0.500  reward 1.000",
        "step 9/9  mu 0.500  reward 1.125",
    ]


@pytest.mark.parametrize("total", [4, None])
def test_on_a_terminal_a_bar_with_the_latest_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int | None
) -> None:
    pytest.importorskip("rich")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "120")
    with MetricsWriter(tmp_path, total_steps=total) as writer:
        writer.log(1, {"mu": 0.125, "eval/accuracy": 0.75})
        writer.log(4, {"mu": torch.tensor(0.25), "reward": 0.5})
    last = terminal.getvalue().split("step")[-1]
    assert f"4/{total or '?'}" in last
    for shown in ("0.250", "0.500", "0.750"):  # accuracy stays until the next evaluation
        assert shown in last


def test_silence_when_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, range(3), total_steps=3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("missing", "terminal"), [("tensorboard", False), ("rich", True)])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str, terminal: bool
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == missing or "tensorboard" in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)  # what import finds for a package that is not there
    if terminal:
        monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(ImportError, match=rf"'{missing}'.*gac-kernels\[train\]"):
        MetricsWriter(tmp_path / "run")
    assert not (tmp_path / "run").exists()
