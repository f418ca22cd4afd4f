"""Checkpoints under damage, failing writes and SIGKILL: none of them costs more than the newest checkpoint."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from small_checkpoints import FILES, names, save

from gac_kernels.train import _manifest as manifests
from gac_kernels.train import checkpoint as module
from gac_kernels.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]


# Damage -------------------------------------------------------------------------------------------------------------


def flip_bit(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def expect_previous(directory: Path, *reasons: str) -> None:
    with pytest.warns(RuntimeWarning) as record:
        found = load_checkpoint(directory)
    assert found is not None
    assert found.step == 1
    assert torch.equal(found.tensors["w"], torch.arange(6.0) + 1)
    assert len(record) == 1
    assert all(reason in str(record[0].message) for reason in reasons), record[0].message


@pytest.mark.parametrize("file", FILES)
def test_a_missing_file_means_the_previous_checkpoint(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    (path / file).unlink()
    expect_previous(tmp_path, str(path / file), "No such file")


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("left", [0.0, 0.5, 0.99])
def test_a_truncated_file_means_the_previous_checkpoint(tmp_path: Path, file: str, left: float) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    os.truncate(path / file, int(left * (path / file).stat().st_size))
    expect_previous(tmp_path, str(path / file), "not a manifest" if file == "manifest.json" else "bytes, the manifest")


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
def test_one_flipped_bit_means_the_previous_checkpoint(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    total = 8 * path.stat().st_size
    for bit in {0, total - 1, *range(5, total, max(1, total // 60))}:
        flip_bit(path, bit)
        expect_previous(tmp_path, str(path), "sha256")
        flip_bit(path, bit)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2


def test_no_flipped_bit_of_the_manifest_changes_what_is_loaded(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    detected = 0
    total = 8 * path.stat().st_size
    bits_tried = range(0, total, 15)  # each of the eight bits of a byte in turn
    for bit in bits_tried:
        flip_bit(path, bit)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            found = load_checkpoint(tmp_path)
        assert found is not None
        assert found.step == (1 if record else 2)
        assert torch.equal(found.tensors["w"], torch.arange(6.0) + found.step)
        detected += bool(record)
        flip_bit(path, bit)
    assert detected > 0.8 * len(bits_tried)


def test_a_manifest_of_another_format_or_step_is_not_believed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["format_version"] == 1
    assert manifest["step"] == 2
    assert set(manifest["files"]) == set(FILES[:2])
    for change, reason in (({"format_version": 0}, "format version 0"), ({"step": 3}, "says step 3")):
        path.write_text(json.dumps(manifest | change))
        expect_previous(tmp_path, str(path), reason)


@pytest.mark.parametrize("version", [2, 3, 12])  # 3 is one flipped bit away from 1
@pytest.mark.parametrize("kind", ["its own", "its own, sealed", "as ours, sealed"])
def test_a_checkpoint_of_a_newer_version_is_neither_passed_over_nor_removed(
    tmp_path: Path, version: int, kind: str
) -> None:
    """Whatever it holds, also what this version's holds: then its sha256 tells that the number was written."""
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    content: dict[str, Any] = {"contents": "as that version likes"}
    if kind.startswith("as ours"):
        content = json.loads(path.read_text())
        del content["sha256"]
    content["format_version"] = version
    path.write_text(json.dumps(manifests.sealed(content) if kind.endswith("sealed") else content))
    refusal = f"format version {version}, written by a newer gac_kernels; this one reads 1"
    for use in (lambda: load_checkpoint(tmp_path), lambda: save(tmp_path, 1), lambda: save(tmp_path, 2)):
        with pytest.raises(CheckpointError, match=refusal):
            use()
    assert path.exists() and (tmp_path / "step-00000001").exists()


@pytest.mark.parametrize("sealed", [True, False], ids=["as written", "without its sha256"])
@pytest.mark.parametrize("digit", "0359")  # what one flipped bit makes of a 1
def test_a_damaged_version_digit_costs_that_checkpoint_only(tmp_path: Path, digit: str, sealed: bool) -> None:
    for step in (1, 2):
        path = save(tmp_path, step) / "manifest.json"
        if not sealed:
            content = json.loads(path.read_text())
            del content["sha256"]
            path.write_text(json.dumps(content))
    path.write_text(path.read_text().replace('"format_version": 1', f'"format_version": {digit}'))
    expect_previous(tmp_path, str(path), f"format version {digit}")
    assert save(tmp_path, 2).is_dir()
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2


def in_place(kind: str, path: Path, outside: Path) -> None:
    """Put something else where a file or a checkpoint was."""
    outside.mkdir()
    path.rename(outside / "was")
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as made:
            before = Path.cwd()
            os.chdir(path.parent)  # the name of a socket may have 100 characters
            try:
                made.bind(path.name)
            finally:
                os.chdir(before)
    elif kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(b"")
    else:
        path.symlink_to(
            {"dangling": outside / "nothing", "loop": path, "device": Path("/dev/zero")}.get(kind, outside / "was")
        )


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("kind", ["fifo", "socket", "directory", "dangling", "loop", "device", "link"])
def test_what_stands_in_a_files_place_costs_that_checkpoint_only(tmp_path: Path, kind: str, file: str) -> None:
    """Nothing blocks, nothing is read without end, and what a link points to is left alone."""
    outside, run = tmp_path / "outside", tmp_path / "run"
    for step in (1, 2):
        path = save(run, step)
    in_place(kind, path / file, outside)
    expect_previous(run, str(path / file))
    save(run, 2)
    found = load_checkpoint(run)
    assert found is not None and found.step == 2
    assert [p.name for p in outside.iterdir()] == ["was"] and (outside / "was").stat().st_size


@pytest.mark.parametrize("kind", ["fifo", "file", "dangling", "loop", "directory"])
def test_what_stands_in_a_checkpoints_place_costs_that_one_only(tmp_path: Path, kind: str) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    for step in (1, 2):
        path = save(run, step)
    in_place(kind, path, outside)
    expect_previous(run, str(path))
    save(run, 2)
    found = load_checkpoint(run)
    assert found is not None and found.step == 2 and names(run) == ["step-00000001", "step-00000002"]
    assert sorted(p.name for p in (outside / "was").iterdir()) == sorted(FILES)


def test_a_checkpoint_that_was_moved_and_linked_is_read_and_only_its_link_removed(tmp_path: Path) -> None:
    outside, run = tmp_path / "outside", tmp_path / "run"
    path = save(run, 1)
    in_place("link", path, outside)
    found = load_checkpoint(run)
    assert found is not None and found.step == 1
    for step in (1, 2, 3):
        save(run, step, keep=1)
        assert names(run) == [f"step-0000000{step}"]
    assert sorted(p.name for p in (outside / "was").iterdir()) == sorted(FILES)


MANIFESTS = {
    "brackets": "[" * 100_000,
    "deep": '{"a":' * 500 + "1" + "}" * 500,
    "nan": '{"format_version": 1, "step": NaN, "files": {}}',
    "twice": '{"format_version": 1, "format_version": 9, "step": 2, "files": {}}',
    "digits": '{"format_version": ' + "9" * 5000 + "}",
    "large": '{"format_version": ' + "9" * 400 + "}",
    "true": '{"format_version": true, "step": 2, "files": {}}',
    "list": "[1]", "null": "null", "empty": "", "zeros": "\0" * 99,
    "files": '{"format_version": 1, "step": 2, "files": 3}',
    "sizes": '{"format_version": 1, "step": 2, "files": {"weights.safetensors": [1], "state.pt": {"bytes": "x"}}}',
    "space": " " * (1 << 25),
}  # fmt: skip


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_of_any_content_costs_that_checkpoint_only(tmp_path: Path, name: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / "manifest.json"
    path.write_text(MANIFESTS[name])
    expect_previous(tmp_path, str(path))
    save(tmp_path, 2)
    found = load_checkpoint(tmp_path)
    assert found is not None and found.step == 2


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("file", FILES)
def test_a_file_that_may_not_be_read_costs_that_checkpoint_only(tmp_path: Path, file: str) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / file
    path.chmod(0)
    expect_previous(tmp_path, str(path), "Permission denied")


def test_the_next_sitting_sweeps_what_a_killed_save_left(tmp_path: Path) -> None:
    """Killed between a rename and what follows it: more than `keep` checkpoints, and a temporary one."""
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step, keep=9)
    (tmp_path / ".tmp-step-00000006-1-a").mkdir()
    (tmp_path / ".tmp-step-00000006-1-a" / "state.pt").write_bytes(b"half")
    (tmp_path / ".tmp-file").write_bytes(b"")
    (tmp_path / "step-00000005" / "state.pt").unlink()  # the run goes on from 4; the next save judges of 5
    module.sweep_checkpoints(tmp_path, 4, keep=2)
    assert names(tmp_path) == ["step-00000003", "step-00000004", "step-00000005"]
    module.sweep_checkpoints(tmp_path / "nowhere", 4, keep=2)


def test_all_damaged_is_an_error_that_lists_them(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    (first / "manifest.json").unlink()
    os.truncate(second / "state.pt", 3)
    with pytest.warns(RuntimeWarning), pytest.raises(CheckpointError) as error:
        load_checkpoint(tmp_path)
    assert str(first / "manifest.json") in str(error.value)
    assert str(second / "state.pt") in str(error.value)


def test_an_intact_file_that_cannot_be_read_is_not_called_damage(tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2)
    torch.save({"module": Path("x")}, path / "state.pt")  # as a foreign writer might
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.pt"] = module._seal(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"[Ww]eights"):
        load_checkpoint(tmp_path)


# Failing writes and kills -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("failing", ["_write_weights", "_write_state", "_seal", "_flush", "_publish"])
def test_a_failing_write_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, failing, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 2


@pytest.mark.parametrize("file", ["weights.safetensors", "state.pt"])
def test_a_real_failing_write_is_an_oserror_that_names_the_file(tmp_path: Path, file: str) -> None:
    """The kernel refuses to let a file grow: both writers (Rust, C++) must turn that into an OSError."""
    resource = pytest.importorskip("resource")
    save(tmp_path, 1)
    sizes = {name: 100_000 if name == file else 1 for name in FILES[:2]}
    tensors, state = ({"w": torch.zeros(sizes[name])} for name in FILES[:2])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"{file}.*File too large"):
            save_checkpoint(tmp_path, 2, tensors=tensors, state=state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["step-00000001"]
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 1


def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL cannot show a missing fsync (the page cache survives it), so the order of the calls is checked."""
    save(tmp_path, 1, keep=1)
    events: list[tuple[str, str]] = []
    fsync, replace, rmtree = os.fsync, os.replace, module.shutil.rmtree

    def record_fsync(descriptor: int) -> None:
        events.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        events.append(("name", Path(target).name))
        replace(source, target)

    def record_rmtree(path: Path, **options: Any) -> None:
        events.append(("remove", path.name))
        rmtree(path, **options)

    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to tell which file a descriptor is")
    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    monkeypatch.setattr(module.shutil, "rmtree", record_rmtree)
    save(tmp_path, 2, keep=1)
    kinds = [kind for kind, _ in events]
    files = [name for kind, name in events[:4]]
    assert files[:3] == ["weights.safetensors", "state.pt", "manifest.json"]
    assert files[3].startswith(".tmp-")
    assert kinds == ["fsync"] * 4 + ["name", "fsync", "name", "remove"]
    assert events[4] == ("name", "step-00000002")
    assert events[5] == ("fsync", tmp_path.name)
    assert all(name.startswith(".tmp-step-00000001") for _, name in events[6:])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the program forks")
def test_a_kill_at_any_moment_costs_nothing_that_was_saved(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([*filter(None, sys.path), str(ROOT)])}
    program = [sys.executable, str(Path(__file__).with_name("killed_writer.py")), str(tmp_path), "1.5"]
    result = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    lines, moments = (json.loads(result.stdout.splitlines()[-1])[mode] for mode in ("lines", "random"))
    assert min(lines["kills"] - 40, lines["old"], lines["new"]) >= 10, lines
    assert min(moments["kills"], 5 * moments["steps"]) >= 5, moments
    assert min(lines["leftovers"], 10 * moments["leftovers"]) >= 10, (lines, moments)  # it did hit the middle of saves
