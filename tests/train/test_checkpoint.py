"""Checkpoints: exact round trips, what is refused, and which ones stay. Damage and kills: test_checkpoint_faults.py."""

from __future__ import annotations

import warnings
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_checkpoints import names, save
from torch import Tensor

from gac_kernels.train.checkpoint import load_checkpoint, save_checkpoint

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
