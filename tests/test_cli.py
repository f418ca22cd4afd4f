"""The command line from outside: exit status, last line, error line. What measures or trains runs as a process."""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gac_kernels import library
from gac_kernels.bench import measure
from gac_kernels.bench.measure import Timing
from gac_kernels.cli import main
from gac_kernels.commands import overhead
from gac_kernels.commands.console import Console
from gac_kernels.commands.workloads import DEMO_SHAPE, DEMO_UPDATE_EVERY, ControllerTime

ROOT = Path(__file__).parents[1]
RECORD = ["kernel", "provider", "mode", "metric", "x", "p20", "p50", "p80", "device", "version", "bytes", "floor_ratio"]
SMALL_STEP = ["--rollouts", "2", "--demonstrations", "1", "--prompt", "2", "--response", "4", "--seconds", "0"]


def cli(*args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m gac_kernels`, on one thread."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | environment
    command = [sys.executable, "-m", "gac_kernels", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def last_object(run: subprocess.CompletedProcess[str]) -> dict:
    assert run.stdout.strip(), run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def error_line(capsys, *args: object) -> str:
    """The one line of a command that is refused with status 2."""
    try:
        status = main([str(arg) for arg in args])
    except SystemExit as stop:  # argparse leaves by itself
        status = stop.code
    captured = capsys.readouterr()
    assert status == 2 and captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("gac-kernels: error: ")
    return line.removeprefix("gac-kernels: error: ")


@pytest.fixture
def untouched_heap(monkeypatch):
    """For commands that measure in this process, which goes on after them."""
    monkeypatch.setattr(measure, "keep_heap_warm", lambda: "heap untouched")


# doctor -----------------------------------------------------------------------------------------------------------
def test_doctor_json(capsys):
    assert main(["doctor", "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert list(found) == ["versions", "devices", "backends", "integrations", "ok"]
    assert set(found["versions"]) == {"python", "gac_kernels", "torch", "triton", "numpy", "transformers"}
    assert set(found["integrations"]) == {"trl", "verl", "trinity-rft", "liger-kernel", "transformers"}
    for host in found["integrations"].values():
        assert set(host) == {"status", "why", "version"}
        assert host["status"] == "ok" or host["version"] is None or host["why"]
    assert list(found["backends"]) == list(library.backends())
    tests = {test["backend"]: test for of in found["backends"].values() for test in of["self_test"].values()}
    assert set(tests) == set(library.BACKENDS)
    assert tests["reference"]["status"] == "passed" and tests["reference"]["cases"] == "24 of 24"
    if not torch.cuda.is_available():
        assert tests["cuda"]["status"] == "not tested" and tests["cuda"]["why"] == "no CUDA device is visible"
    for test in tests.values():
        assert test["why"] or test["status"] == "passed"
    assert found["ok"] is True


def test_doctor_table(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for part in ("versions", "devices", "which backend serves which op", "token_loss", "self-test", "not tested"):
        assert part in out
    assert out.endswith("\nok\n")


PLANTED = {
    "slope": lambda outputs: (*outputs[:4], outputs[4] * 1.001, outputs[5]),
    "signals": lambda outputs: (*outputs[:2], outputs[2].roll(1, 0), *outputs[3:]),
    "loss": lambda outputs: (outputs[0] + 1e-4, *outputs[1:]),
}


def planted(what, operator, outputs):
    return PLANTED[what](outputs) if operator == "token_loss" else outputs


@pytest.mark.parametrize("what", PLANTED)
def test_doctor_finds_a_planted_error(what, monkeypatch, capsys):
    right = library.call
    monkeypatch.setattr(library, "call", lambda name, *args: planted(what, name, right(name, *args)))
    assert main(["doctor", "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert "self-test of backend 'reference' on cpu FAILED: SAPO" in captured.err


def test_doctor_reports_a_backend_that_raises(monkeypatch, capsys):
    def broken(*args):
        raise IndexError("planted")

    monkeypatch.setattr(library, "call", broken)
    assert main(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "raised IndexError: planted" in captured.err and captured.out.endswith("NOT ok\n")


# bench ------------------------------------------------------------------------------------------------------------
def test_bench_json_csv_and_plot(tmp_path):
    table, chart = tmp_path / "out.csv", tmp_path / "out.png"
    args = [
        "--kernel",
        "token",
        "--shape",
        "8x64",
        "4x32",
        "--providers",
        "eager,eager-loss,gac-reference",
        "--seconds",
        "0",
    ]
    run = cli("bench", *args, "--json", "--csv", table, "--plot", chart)
    assert run.returncode == 0, run.stderr
    found = last_object(run)
    assert list(found) == ["records"]
    assert all(list(record) == RECORD for record in found["records"])
    assert {record["x"] for record in found["records"]} == {"8x64", "4x32"}
    with table.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == RECORD[:10]
    assert len(rows) == len(found["records"])
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_bench_names_a_missing_compiler(tmp_path):
    run = cli(
        "bench", "--kernel", "token", "--shape", "4x8", "--providers", "eager,compile", "--modes", "forward",
        "--seconds", "0",
        CXX="/nowhere/g++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path), TORCHINDUCTOR_FORCE_DISABLE_CACHES="1",
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "absent: compile: torch.compile failed: " in run.stderr
    title = next(line for line in run.stdout.splitlines() if line.startswith("token_loss 4x8"))
    assert "floor" in title and "GB/s" in title
    assert "OMP_WAIT_POLICY passive" in run.stdout.splitlines()[0]


def test_bench_fails_on_a_wrong_result(monkeypatch, capsys, untouched_heap):
    right = library.call
    monkeypatch.setattr(library, "call", lambda name, *args: planted("slope", name, right(name, *args)))
    args = [
        "bench",
        "--kernel",
        "token",
        "--shape",
        "4x8",
        "--providers",
        "eager,gac-reference",
        "--seconds",
        "0",
        "--json",
    ]
    assert main(args) == 1
    captured = capsys.readouterr()
    assert {record["provider"] for record in json.loads(captured.out)["records"]} == {"eager", "copy"}
    assert "WRONG and not timed, 4x8: gac-reference: gradient is" in captured.err


# overhead ---------------------------------------------------------------------------------------------------------
def test_overhead_verdicts(capsys, untouched_heap):
    good = cli("overhead", *SMALL_STEP, "--bound", "1000", "--json")
    assert good.returncode == 0, good.stderr
    found = last_object(good)
    assert list(found)[:4] == ["controller_share", "step_seconds", "bound", "ok"]
    assert found["ok"] is True and found["bound"] == 1000
    parts = 0.5 * (found["plain_seconds"] + found["refresh_seconds"]) + found["signals_seconds"]
    assert found["controller_share"] == pytest.approx(parts / found["step_seconds"])
    assert found["paired_low"] <= found["paired_share"] <= found["paired_high"]

    assert main(["overhead", *SMALL_STEP, "--bound", "0", "--update-every", "10"]) == 1
    out = capsys.readouterr().out
    assert "refresh (1 in 10)" in out
    assert out.splitlines()[-1].endswith("bound 0.00%: NOT ok")


def test_overhead_weighs_kinds_of_steps_by_how_often_they_occur():
    times = [ControllerTime(0.0, refresh) for refresh in (True, False, True, False, False)]
    values = [10.0, 1.0, 12.0, 2.0, 3.0]
    assert overhead._weighted(values, times, 0.1) == pytest.approx(0.9 * 2.0 + 0.1 * 11.0)
    at_least, low, high = overhead._bootstrap(values, times, 0.1, seed=0)
    assert at_least <= low < 2.9 < high
    assert overhead._weighted([4.0], [ControllerTime(0.0, True)], 0.1) == 4.0


def test_overhead_of_a_slow_controller_fails_by_the_pairs_alone():
    """What the stopwatch inside misses, a step that is slower with the controller, still fails the verdict."""
    times = [ControllerTime(1e-6, bool(i % 2)) for i in range(20)]
    jitter = [0.001 * (i % 5) for i in range(20)]
    for slower, ok in ((0.05, False), (0.0, True)):
        timings = {
            "without": Timing(tuple(1.0 + j for j in jitter)),
            "with": Timing(tuple(1.0 + slower + j for j in reversed(jitter))),
            "signals": Timing((1e-6,)),
        }
        found = overhead._conclude(argparse.Namespace(bound=0.01, seed=0, model="tiny"), 10, times, timings, "here")
        assert found.controller_share < 0.01
        assert found.ok is ok


def test_overhead_runs_the_demos_step(tmp_path):
    from gac_kernels.train.demo import arm_configs, warm_config

    (tmp_path / "warm-start" / "model").mkdir(parents=True)
    gac = arm_configs(warm_config(tmp_path, seed=0))["gac"]
    assert DEMO_SHAPE.rollouts == gac.prompts_per_step * gac.group_size
    assert DEMO_SHAPE.demonstrations == gac.demonstrations_per_step
    assert (DEMO_SHAPE.prompt, DEMO_SHAPE.response) == (len("12+34="), gac.max_new_tokens)
    assert gac.resolved_controller().update_every == DEMO_UPDATE_EVERY


# train ------------------------------------------------------------------------------------------------------------
def test_train_and_resume(tmp_path, capsys):
    args = [
        "train", "--output", tmp_path / "run", "--prompts-per-step", 1, "--group-size", 2,
        "--demonstrations-per-step", 1, "--eval-size", 4, "--digits", 2, "--max-new-tokens", 24,
        "--tiny-hidden", 8, "--tiny-layers", 1, "--warmup-sft-steps", 1, "--steps", 2, "--json",
        "--estimator", "hidden",
    ]  # fmt: skip
    assert main([str(arg) for arg in (*args, "--resume")]) == 0
    output = capsys.readouterr()
    assert f"nothing to resume in {tmp_path / 'run'}: a new run begins" in output.err
    found = json.loads(output.out.splitlines()[-1])
    assert list(found) == ["accuracy_before", "accuracy_after", "mu", "steps", "seconds", "output", "notices"]
    assert found["steps"] == 2 and found["output"] == str(tmp_path / "run")
    assert (tmp_path / "run" / "report.html").is_file()
    assert "already" in error_line(capsys, *args)
    assert main([str(arg) for arg in (*args, "--resume")]) == 0  # nothing is left to do
    output = capsys.readouterr()
    assert json.loads(output.out.splitlines()[-1]) == found | {"seconds": pytest.approx(found["seconds"])}
    assert "was finished before" in output.err
    used = json.loads((tmp_path / "run" / "config.json").read_text())["controller_in_force"]
    assert "estimator='hidden'" in used and "update_every=1," in used
    newest = max((tmp_path / "run" / "checkpoints").glob("step-*")) / "manifest.json"
    newest.write_text(newest.read_text().replace('"format_version": 1', '"format_version": 2'))
    assert "written by a newer gac_kernels" in error_line(capsys, *args, "--resume")


@pytest.mark.parametrize(
    ("name", "policy", "aggregation"),
    [
        ("sapo", "SAPO", "seq-mean-token-mean"),
        ("dapo", "GRPO", "token-mean"),
        ("dr-grpo", "GRPO", "seq-mean-token-sum-norm"),
        ("dfpo", "DFPO", "seq-mean-token-mean"),
    ],
)
def test_train_objectives(name, policy, aggregation):
    from gac_kernels.cli import build_parser
    from gac_kernels.commands.train import objective

    made = objective(build_parser().parse_args(["train", "--objective", name, "--kl-coef", "0.1"]))
    assert (type(made.policy).__name__, made.aggregation, made.kl_coef) == (policy, aggregation, 0.1)
    assert (made.norm_length is not None) == (name == "dr-grpo")


def test_settings_of_train_are_those_of_the_loop(tmp_path):
    from dataclasses import fields

    from gac_kernels.commands import train
    from gac_kernels.train.config import CONTROLLERS, TrainConfig

    defaults = {field.name: field.default for field in fields(TrainConfig)}
    assert {name for name, *_ in train.SETTINGS} <= defaults.keys()
    for name, kind, said, _ in train.SETTINGS:
        assert defaults[name] is None or kind(said) == defaults[name], name
    given = {"tiny": TrainConfig("o"), "another": TrainConfig("o", model=str(tmp_path))}
    assert [(c.warmup_sft_steps, c.learning_rate) for c in given.values()] == [(300, 5e-4), (0, 1e-6)]
    assert train.CONTROLLERS == CONTROLLERS


# what users get wrong ---------------------------------------------------------------------------------------------
def test_error_lines(tmp_path, capsys):
    broken = tmp_path / "task.jsonl"
    broken.write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "1+2="}\n', encoding="utf-8")
    out = tmp_path / "out"
    line = error_line(capsys, "train", "--task", broken, "--output", out)
    assert line == f"{broken}, line 2: field 'answer' is missing"
    assert "no file" in error_line(capsys, "train", "--task", tmp_path / "none.jsonl", "--output", out)
    assert "model" in error_line(capsys, "train", "--model", tmp_path / "none", "--output", out)
    assert "--device nothing" in error_line(capsys, "train", "--device", "nothing", "--output", out)
    assert "--mu is a setting of --controller fixed" in error_line(capsys, "train", "--mu", 0.4, "--output", out)
    line = error_line(capsys, "train", "--controller", "linear", "--estimator", "logit", "--output", out)
    assert "--estimator is a setting of --controller gac, got --controller linear" in line
    assert "--group-size must be >= 1" in error_line(capsys, "train", "--group-size", 0, "--output", out)
    assert "--steps must be >= 0" in error_line(capsys, "train", "--steps", -1, "--output", out)
    assert "none.csv" in error_line(capsys, "bench", "--csv", tmp_path / "no" / "none.csv")
    assert "64x2048" in error_line(capsys, "bench", "--kernel", "token", "--shape", "64")
    assert "S >= 4" in error_line(capsys, "bench", "--kernel", "token", "--shape", "2x8", "--providers", "eager")
    assert "multiple of 4" in error_line(capsys, "bench", "--kernel", "logits", "--shape", "6x8")
    assert "give one --kernel" in error_line(capsys, "bench", "--shape", "64x2048")
    assert "--ragged" in error_line(capsys, "bench", "--kernel", "token", "--ragged")
    assert "'fast' is none of" in error_line(capsys, "bench", "--providers", "fast")
    assert "'sideways' is none of" in error_line(capsys, "bench", "--modes", "sideways")
    assert "do not take tensors on cpu" in error_line(capsys, "bench", "--device", "cpu", "--backend", "cuda")
    assert "'fast'" in error_line(capsys, "bench", "--backend", "fast")
    assert "local model directory" in error_line(capsys, "overhead", "--model", tmp_path / "none")
    assert "--update-every" in error_line(capsys, "overhead", "--update-every", "0")
    assert "invalid choice: 'fly'" in error_line(capsys, "fly")
    assert "doctor, bench, overhead, train, validate" in error_line(capsys)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="none of"):
        main(["bench", "--providers", "fast", "--debug"])


def test_missing_packages_are_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in ("overhead", "train", "validate"):
        line = error_line(capsys, command)
        assert "transformers" in line and "pip install 'gac-kernels[train]'" in line
    assert "matplotlib" in error_line(capsys, "bench", "--plot", tmp_path / "out.png")


# the house --------------------------------------------------------------------------------------------------------
def test_help_imports_nothing_heavy():
    code = "import sys; from gac_kernels.cli import build_parser; build_parser().format_help(); print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "gac_kernels" in loaded
    assert not loaded & {"transformers", "matplotlib", "rich", "tensorboard", "liger_kernel"}


def test_console_table_without_a_terminal(capsys):
    Console().table("title", ("name", "ms"), [("a", "1.0"), ("longer", "10.25")])
    assert capsys.readouterr().out == "\ntitle\nname       ms\n------  -----\na         1.0\nlonger  10.25\n"


def test_console_json_is_json(capsys):
    console = Console(json=True)
    console.table("title", ("a",), [("b",)])
    console.text("for people")
    console.result({"a": float("nan"), "b": [float("inf"), 1.5], "c": {"d": None}})
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "c": {"d": None}}
