"""Checkpoints: exact round trips, and no moment or damage that costs more than the newest one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gac_kernels.train import checkpoint as module
from gac_kernels.train.checkpoint import CheckpointError, load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]
FILES = ("weights.safetensors", "state.pt", "manifest.json")


def save(directory: Path, step: int, **options: Any) -> Path:
    weight = torch.arange(6.0) + step
    return save_checkpoint(directory, step, tensors={"w": weight}, state={"step": step, "half": weight / 2}, **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# Round trips --------------------------------------------------------------------------------------------------------


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path / "missing") is None
    assert load_checkpoint(tmp_path) is None


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())


def test_tensors_come_back_bit_for_bit(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    odd_nan = torch.tensor([0x7FC12345, -1], dtype=torch.int32).view(torch.float32)
    tensors = {
        "transposed": base.t(),
        "column": base[:, 1],
        "first_rows": base[:2],  # both overlap `base`, and one another
        "last_rows": base[1:],
        "whole": base,
        "expanded": torch.ones(1, 3).expand(5, 3),
        "scalar": torch.tensor(1.5, dtype=torch.float64),
        "empty": torch.empty(0, 7, dtype=torch.float16),
        "bf16": torch.randn(5).bfloat16(),
        "ints": torch.tensor([-(2**62), 3]),
        "bool": torch.tensor([True, False]),
        "special": torch.cat([odd_nan, torch.tensor([-0.0, float("inf"), 1e-45])]),
        "conjugate": torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }
    save_checkpoint(tmp_path, 7, tensors=tensors, state={})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 7
    assert found.path == tmp_path / "step-00000007"
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        loaded = found.tensors[name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded) == bits(tensor.detach().resolve_conj()), name


def test_tied_weights_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(50, 8), "head": torch.nn.Linear(8, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    path = save_checkpoint(tmp_path, 1, tensors=model.state_dict(), state={})
    assert (path / "weights.safetensors").stat().st_size < 1.5 * 50 * 8 * 4
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.tensors["embed.weight"] is found.tensors["head.weight"]
    assert torch.equal(found.tensors["head.weight"], model["embed"].weight)
    model.load_state_dict(found.tensors, strict=True)


def test_equal_but_separate_tensors_stay_separate(tmp_path: Path) -> None:
    weight = torch.randn(3)
    save_checkpoint(tmp_path, 1, tensors={"a": weight, "b": weight.clone(), "c": weight.view(torch.int32)}, state={})
    found = load_checkpoint(tmp_path)
    assert found is not None
    found.tensors["a"].zero_()
    assert torch.equal(found.tensors["b"], weight)
    assert torch.equal(found.tensors["c"], weight.view(torch.int32))


def test_loaded_tensors_outlive_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    found = load_checkpoint(tmp_path)
    assert found is not None
    with open(path / "weights.safetensors", "r+b") as file:  # same inode: a mapping of the file would change
        file.write(b"\xff" * (path / "weights.safetensors").stat().st_size)
    assert torch.equal(found.tensors["w"], torch.arange(6.0) + 1)


def test_optimizer_and_random_state_continue_exactly(tmp_path: Path) -> None:
    def make() -> tuple[torch.nn.Linear, torch.optim.AdamW, Any]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
        return layer, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def train(layer: torch.nn.Linear, optimizer: torch.optim.AdamW, schedule: Any) -> None:
        optimizer.zero_grad()
        layer(torch.randn(3, 4)).square().mean().backward()
        optimizer.step()
        schedule.step()

    parts = make()
    for _ in range(3):
        train(*parts)
    state = {"optimizer": parts[1].state_dict(), "schedule": parts[2].state_dict(), "rng": torch.get_rng_state()}
    save_checkpoint(tmp_path, 3, tensors=parts[0].state_dict(), state=state)
    for _ in range(3):
        train(*parts)

    again, found = make(), load_checkpoint(tmp_path)
    assert found is not None
    again[0].load_state_dict(found.tensors)
    again[1].load_state_dict(found.state["optimizer"])
    again[2].load_state_dict(found.state["schedule"])
    torch.set_rng_state(found.state["rng"])
    for _ in range(3):
        train(*again)
    assert torch.equal(parts[0].weight, again[0].weight)
    assert torch.equal(parts[0].bias, again[0].bias)


ALLOWED = {
    "none": None,
    "numbers": [True, -3, 1 << 2038, -(1 << 2038), 1.5, float("inf"), 2 - 1j],
    "text": ["", "\u00e4\u20ac", b"\x00\xff", bytearray()],
    "nested": OrderedDict(a=({1, 2}, set(), (), [[]])),
    7: {(1, "b"): torch.Size([2])},
    "torch": [torch.float32, torch.device("cpu"), torch.strided],
}


def test_every_allowed_type_can_be_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, tensors={}, state=ALLOWED)
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.state == ALLOWED
    assert found.tensors == {}


def tensor_with_attribute() -> Tensor:
    tensor = torch.zeros(1)
    tensor.note = np.float32(1)  # type: ignore[attr-defined]
    return tensor


@pytest.mark.parametrize(
    ("value", "where"),
    [
        (np.float64(1.0), "state['a']['b'][1] is a numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (defaultdict(list), "collections.defaultdict"),
        (frozenset({1}), "builtins.frozenset"),
        (b"", "empty bytes"),
        (1 << 2039, "int of 2040 bits"),
        (Path("x"), "Path"),
        (print, "builtin_function_or_method"),
        ({"c": {np.int64(3): 1}}, "the key np.int64(3) of state['a']['b'][1]['c'] is a numpy.int64"),
        (tensor_with_attribute(), "state['a']['b'][1].note is a numpy.float32"),
    ],
    ids=repr,
)
def test_a_state_that_could_not_be_read_is_refused_by_key(tmp_path: Path, value: object, where: str) -> None:
    with pytest.raises(TypeError) as error:
        save_checkpoint(tmp_path / "run", 1, tensors={}, state={"a": {"b": (0, value)}})
    assert where in str(error.value)
    assert "state['a']['b'][1]" in str(error.value)
    assert not (tmp_path / "run").exists()
    if value is not print:  # the refusal is not wider than torch's own
        torch.save(value, tmp_path / "file")
        with pytest.raises(Exception, match=r"[Ww]eights"):
            torch.load(tmp_path / "file", weights_only=True)


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        ({"w": [1.0]}, TypeError, r"tensors\['w'\] must be a plain tensor.*list"),
        ({"w": torch.eye(2).to_sparse()}, TypeError, r"tensors\['w'\] must be a dense tensor"),
        ({"w": torch.empty(2, device="meta")}, TypeError, r"tensors\['w'\].*meta"),
        ({3: torch.ones(1)}, TypeError, "names must be str, got int"),
        ({"ok": torch.ones(1), "w": torch.ones(1, dtype=torch.complex128)}, TypeError, r"\['w'\].*complex128"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, Tensor], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        save_checkpoint(tmp_path, 1, tensors=tensors, state={})
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("step", "keep", "error", "message"),
    [
        (-1, 2, ValueError, "step must be >= 0, got -1"),
        (1.0, 2, TypeError, "step must be an int, got float"),
        (True, 2, TypeError, "step must be an int, got bool"),
        (1, 0, ValueError, "keep must be >= 1, got 0"),
    ],
)
def test_arguments_out_of_range(tmp_path: Path, step: Any, keep: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        save(tmp_path, step, keep=keep)
    with pytest.raises(TypeError, match="state must be a dict, got list"):
        save_checkpoint(tmp_path, 1, tensors={}, state=[])  # type: ignore[arg-type]


# Which ones stay ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_stay(tmp_path: Path, keep: int) -> None:
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    for step in (5, 10, 99_999_999, 100_000_000):  # the last has one digit more
        save(tmp_path, step, keep=keep)
    expected = ["step-00000005", "step-00000010", "step-99999999", "step-100000000"][-keep:]
    assert sorted(names(tmp_path)) == sorted([*expected, "notes.txt"])
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.step == 100_000_000


def test_leftovers_of_a_killed_run_are_ignored_then_removed(tmp_path: Path) -> None:
    save(tmp_path, 1)
    leftover = tmp_path / ".tmp-step-00000002-123-abc"
    leftover.mkdir()
    (leftover / "weights.safetensors").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = load_checkpoint(tmp_path)
        assert found is not None
        assert found.step == 1
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_only_leftovers_is_none(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step-00000002-123-abc").mkdir()
    assert load_checkpoint(tmp_path) is None


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save_checkpoint(tmp_path, 1, tensors={"w": torch.zeros(1)}, state={"second": True})
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert found.state == {"second": True}
    assert names(tmp_path) == ["step-00000001"]


def test_an_intact_later_step_is_not_left_behind_in_silence(tmp_path: Path) -> None:
    save(tmp_path, 9)
    with pytest.raises(ValueError, match=r"step is 3, but .*step-00000009 holds an intact checkpoint of a later step"):
        save(tmp_path, 3)
    assert names(tmp_path) == ["step-00000009"]


def test_a_damaged_later_step_goes_once_the_run_has_moved_on(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep=3)
    (tmp_path / "step-00000003" / "state.pt").unlink()
    save(tmp_path, 2, keep=3)
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


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
    for change, reason in (({"format_version": 2}, "format version 2"), ({"step": 3}, "says step 3")):
        path.write_text(json.dumps(manifest | change))
        expect_previous(tmp_path, str(path), reason)


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
