"""One run an output directory, continued with what it began with: locks, fingerprints, a mended log, leftovers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from small_runs import small

from gac_kernels.train import train
from gac_kernels.train._fingerprints import fingerprints
from gac_kernels.train._lock import OutputLock
from gac_kernels.train.checkpoint import load_checkpoint, save_checkpoint
from gac_kernels.train.metrics import read_metrics
from gac_kernels.train.output import Found, write_json
from gac_kernels.train.ranks import Ranks

# The lock -------------------------------------------------------------------------------------------------------------

HOLDER = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
fcntl.flock(descriptor, fcntl.LOCK_EX)
os.write(descriptor, b"process 77 on elsewhere\\n")
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of `tmp_path / "run"` until it is killed."""
    (tmp_path / "run").mkdir()
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.mark.parametrize("resume", [False, True])
def test_a_second_run_is_refused_and_told_who_holds_the_directory(tmp_path, holder, resume):
    with pytest.raises(ValueError, match=r"run is in use by another run \(process 77 on elsewhere\); wait for it"):
        train(small(tmp_path / "run"), resume=resume, progress=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "run")  # another name of the same directory
    with pytest.raises(ValueError, match="in use by another run"):
        train(small(link), resume=resume, progress=False)


def test_a_lock_dies_with_its_process(tmp_path, holder):
    with OutputLock(tmp_path / "run") as lock, pytest.raises(ValueError, match="in use"):
        lock.check()
    holder.kill()
    holder.wait()
    with OutputLock(tmp_path / "run") as lock:
        lock.check()
        text = (tmp_path / "run" / ".lock").read_text()
        assert text.startswith(f"process {os.getpid()} on ") and "elsewhere" not in text
        with OutputLock(tmp_path / "run") as second, pytest.raises(ValueError, match=f"process {os.getpid()} on"):
            second.check()  # the refused one leaves the lock as it was
        with OutputLock(tmp_path / "run") as second, pytest.raises(ValueError, match="in use"):
            second.check()
        with OutputLock(tmp_path / "run", wanted=False) as rank_1:
            rank_1.check()  # ranks of one run share it
    assert list((tmp_path / "run").iterdir()) == []


def test_a_lock_leaves_no_directory_that_only_it_made(tmp_path):
    with OutputLock(tmp_path / "a" / "run") as lock:
        lock.check()
    assert not (tmp_path / "a" / "run").exists()
    with OutputLock(tmp_path / "b"):
        (tmp_path / "b" / "metrics.jsonl").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["metrics.jsonl"]


def test_a_disk_without_locks_is_said(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.warns(RuntimeWarning, match="no locks.*no second run"), OutputLock(tmp_path) as lock:
        lock.check()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_stands_in_the_locks_place_is_no_traceback_and_left_alone(tmp_path, kind):
    path, outside = tmp_path / "run" / ".lock", tmp_path / "outside"
    path.parent.mkdir()
    outside.write_text("mine")
    {"link": lambda: path.symlink_to(outside), "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    with OutputLock(tmp_path / "run") as lock:
        if kind != "fifo":  # which can be locked as well as a file
            with pytest.raises(OSError, match=r"\.lock"):
                lock.check()
    assert outside.read_text() == "mine"


# What a resumed run finds ---------------------------------------------------------------------------------------------


def problems(path: Path, count: int = 24) -> str:
    lines = [{"prompt": f"{i}+1=", "answer": str(i + 1), "demonstration": str(i + 1)} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


SETTINGS = {"steps": 2, "demonstration_pool": None, "checkpoint_every": 1, "checkpoint_keep": 9, "eval_size": 3}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run on a file, from a local model: its directory holds `problems.jsonl`, `start` and `run`."""
    directory = tmp_path_factory.mktemp("finished")
    task = problems(directory / "problems.jsonl")
    train(small(directory / "first", task=task, **SETTINGS | {"steps": 1}), progress=False)
    shutil.move(directory / "first" / "model", directory / "start")
    config = small(directory / "run", task=task, model=str(directory / "start"), **SETTINGS)
    train(config, progress=False)
    return config


@pytest.fixture
def stopped(finished, tmp_path):
    """That run as a kill after its first step leaves it; the log's second line was written."""
    shutil.copytree(finished.output, tmp_path / "run")
    config = replace(finished, output=tmp_path / "run")
    shutil.rmtree(config.output / "checkpoints" / "step-00000002")
    for name in ("summary.json", "report.html"):
        (config.output / name).unlink()
    return config


CHANGES = {
    "a line more": ("task", lambda d: problems(d / "problems.jsonl", 25), "the task file"),
    "another line": ("task", lambda d: (d / "problems.jsonl").write_text(
        (d / "problems.jsonl").read_text().replace("7+1=", "8+1=")), "the task file"),
    "another token": ("model", lambda d: (d / "start" / "tokenizer.json").write_text(
        (d / "start" / "tokenizer.json").read_text().replace('"7"', '"x"')), "the tokenizer in"),
    "a chat template": ("model", lambda d: (d / "start" / "chat_template.jinja").write_text("{{ messages }}"),
                        "the tokenizer"),
    "generation": ("model", lambda d: (d / "start" / "generation_config.json").write_text('{"eos_token_id": 3}'),
                   "config.json or generation_config"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_does_not_go_on_with_another_task_file_or_tokenizer(stopped, tmp_path, name):
    setting, change, says = CHANGES[name]
    source = Path(stopped.task).parent
    saved = {path: path.read_bytes() for path in source.rglob("*") if path.is_file() and "run" not in path.parts[-4:]}
    before = {path: path.read_bytes() for path in stopped.output.rglob("*") if path.is_file()}
    try:
        change(source)
        with pytest.raises(
            ValueError, match=f"changed since: {says}.*Put it back as it was, or begin a new run"
        ) as error:
            train(stopped, resume=True, progress=False)
        assert getattr(stopped, setting) in str(error.value)
    finally:
        (source / "start" / "chat_template.jinja").unlink(missing_ok=True)
        for path, content in saved.items():
            path.write_bytes(content)
    assert {path: path.read_bytes() for path in stopped.output.rglob("*") if path.is_file()} == before
    assert train(stopped, resume=True, progress=False).steps == 2


def test_notes_beside_a_model_and_its_weights_are_not_fingerprinted(stopped, tmp_path):
    shutil.copytree(stopped.model, tmp_path / "start")
    config = replace(stopped, model=str(tmp_path / "start"))
    before = fingerprints(config)
    assert before.keys() == {"task", "tokenizer", "model"} == fingerprints(stopped).keys()
    assert before == fingerprints(stopped)  # the same files in another place
    (tmp_path / "start" / "README.md").write_text("notes")
    (tmp_path / "start" / "model.safetensors").write_bytes(b"")
    assert fingerprints(config) == before
    assert fingerprints(small()) == {}


def test_a_checkpoint_of_an_earlier_version_has_no_fingerprints_nor_log_and_goes_on(stopped):
    found = load_checkpoint(stopped.output / "checkpoints")
    for name in ("fingerprints", "log", "watch", "reward"):
        del found.state["run"][name]
    save_checkpoint(stopped.output / "checkpoints", 1, tensors=found.tensors, state=found.state)
    log = (stopped.output / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped.output / "metrics.jsonl").write_text("".join([*log, *log]))
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl: 2 lines of earlier steps came again"):
        train(stopped, resume=True, progress=False)
    assert [record["step"] for record in read_metrics(stopped.output / "metrics.jsonl")] == [0, 1, 2]


DAMAGE = {
    "bit": lambda raw: raw.replace(b'"loss":', b'"lots":', 1), "deleted": None, "emptied": lambda raw: b"",
    "cut at a line": lambda raw: raw.splitlines(keepends=True)[0], "cut in a line": lambda raw: raw[: len(raw) // 3],
    "doubled": lambda raw: raw + raw, "deep": lambda raw: b"[" * 100_000 + b"\n" + raw,
    "zeros": lambda raw: bytes(len(raw)),
    "other numbers": lambda raw: raw.replace(b'"step": 1,', b'"step": 1, "more": 2,'),
}  # fmt: skip


@pytest.mark.parametrize("name", [*DAMAGE, "fifo", "dangling"])
def test_a_damaged_log_is_mended_from_the_checkpoint_and_that_is_said(stopped, finished, name):
    path = stopped.output / "metrics.jsonl"
    raw = path.read_bytes()
    path.unlink()
    if name == "fifo":
        os.mkfifo(path)
    elif name == "dangling":
        path.symlink_to(stopped.output / "nowhere")
    elif damage := DAMAGE[name]:
        path.write_bytes(damage(raw))
    with pytest.warns(RuntimeWarning, match=r"metrics\.jsonl.*lines up to step 1 were restored from the checkpoint"):
        train(stopped, resume=True, progress=False)
    mended = path.read_bytes().splitlines()
    assert mended[:2] == raw.splitlines()[:2]  # to the byte
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
    timed = ("step_seconds", "rollout_seconds", "controller_seconds")
    ends = [{k: v for k, v in json.loads(line).items() if k not in timed} for line in (mended[2], raw.splitlines()[2])]
    assert ends[0] == ends[1]
    assert load_checkpoint(stopped.output / "checkpoints").step == 2


def test_an_intact_log_is_left_as_it_is_without_a_word(stopped, recwarn):
    raw = (stopped.output / "metrics.jsonl").read_bytes()
    with open(stopped.output / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')  # as a kill leaves it
    train(stopped, resume=True, progress=False)
    assert not [str(warning.message) for warning in recwarn if "metrics.jsonl" in str(warning.message)]
    assert (stopped.output / "metrics.jsonl").read_bytes().splitlines()[:2] == raw.splitlines()[:2]


def test_the_next_sitting_sweeps_what_a_killed_one_left(stopped, tmp_path):
    config = replace(stopped, checkpoint_keep=1)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("mine")
    (config.output / "model" / ".tmpa1B2c3").write_bytes(b"half a model")
    (config.output / "model" / ".tmplink").symlink_to(outside / "kept")
    (config.output / "checkpoints" / ".tmp-step-00000002-1-ab").mkdir()
    (config.output / "checkpoints" / ".tmp-link").symlink_to(outside)
    shutil.copytree(config.output / "checkpoints" / "step-00000001", config.output / "checkpoints" / "step-00000000")
    train(replace(config, checkpoint_every=0), resume=True, progress=False)
    assert [path.name for path in (config.output / "checkpoints").iterdir()] == ["step-00000002"]
    assert [path.name for path in config.output.rglob(".*")] == []
    assert (outside / "kept").read_text() == "mine"


def test_a_run_in_a_linked_directory_goes_on(stopped, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(stopped.output)
    assert train(replace(stopped, output=link), resume=True, progress=False).steps == 2
    assert link.is_symlink() and (stopped.output / "report.html").is_file()


def test_a_json_file_is_replaced_in_one_step(tmp_path, monkeypatch):
    write_json(tmp_path / "a.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"a": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


# Ranks ----------------------------------------------------------------------------------------------------------------


class OtherRanks(Ranks):
    """This process as the first of two; the second answers as `change` makes of our own."""

    def __init__(self, change):
        super().__init__(0, 2)
        self.change = change

    def gather(self, value):
        return [value, self.change(*value)]


RANKS = {
    "same": (lambda found, settings, files: (found, settings, files), None),
    "nothing": (lambda found, settings, files: ((None, None), settings, files),
                r"different checkpoints: rank 0: step-00000001 \(\w{8}\); rank 1: none\. Is output"),
    "older": (lambda found, settings, files: (("step-00000000 (12345678)", "12345678"), settings, files),
              r"rank 0: step-00000001 \(\w{8}\); rank 1: step-00000000 \(12345678\)"),
    "other bytes": (lambda found, settings, files: ((found[0], "1" * 64), settings, files), "different checkpoints"),
    "settings": (lambda found, settings, files: (found, settings | {"seed": 5}, files), "settings: seed: 0, 5"),
    "task file": (lambda found, settings, files: (found, settings, files | {"task": "1"}), "different files: task"),
    "tokenizer": (lambda found, settings, files: (found, settings, files | {"tokenizer": "1"}), "files: tokenizer"),
}  # fmt: skip


@pytest.mark.parametrize("name", RANKS)
def test_ranks_that_found_different_things_are_told_before_anything_is_loaded(stopped, name):
    change, says = RANKS[name]
    found = Found.look(stopped, resume=True)
    if says is None:
        found.agree(OtherRanks(change), stopped)
        return
    with pytest.raises(ValueError, match=says):
        found.agree(OtherRanks(change), stopped)
