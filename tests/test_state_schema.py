"""The formats of saved state, held by files that were written once: tests/data, see write_state.py there.

Whoever renames, adds, drops or retypes an entry of a state sees these tests fail. The way out is a new version number,
files of that version beside the old ones, and code that reads both.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import gac_kernels as gk
from gac_kernels.controller import STATE, STATE_VERSION

pytest.importorskip("safetensors")
from gac_kernels.train.checkpoint import FORMAT_VERSION, CheckpointError, load_checkpoint, save_checkpoint

DATA = Path(__file__).parent / "data"
CONFIG = gk.ControllerConfig(alpha=gk.KLTarget(), update_every=2, disagreement_cap=4.0)
# What the file of version 1 holds, to the bit.
NUMBERS = {
    "mu": ["0x1.b851eb851eb84p-2"],
    "mu_star": ["0x1.a58a180a9b9d3p-1"],
    "estimate": ["0x1.9cddcc55b33f5p-1"],
    "alpha": ["0x1.1aec7b35a00d4p-1"],
    "signals": ["0x1.f5f165c757e0ep-8", "0x1.9591d5993b055p-1", "0x1.f97faf3f95575p-2"],
    "skipped": ["0x1.8000000000000p+1"],
}


ADDED = {1: set(), 2: {"prior"}}  # what each version has that the one before had not


def controller_state(version: int = STATE_VERSION) -> dict:
    return torch.load(DATA / f"controller_state_v{version}.pt", weights_only=True)


def loaded_controller(version: int = STATE_VERSION) -> gk.GuidedAdaptiveController:
    controller = gk.GuidedAdaptiveController(CONFIG)
    controller.load_state_dict(controller_state(version))
    return controller


def bits(tensor: torch.Tensor) -> tuple:
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


def test_every_version_there_was_has_its_files():
    """A raised version number needs new files, and the old ones stay."""
    assert [path.name for path in sorted(DATA.glob("controller_state_v*.pt"))] == [
        f"controller_state_v{version}.pt" for version in range(1, STATE_VERSION + 1)
    ]
    assert [path.name for path in sorted(DATA.glob("checkpoints_v*"))] == [
        f"checkpoints_v{version}" for version in range(1, FORMAT_VERSION + 1)
    ]


@pytest.mark.parametrize("version", ADDED)
def test_a_controller_of_every_version_is_restored_to_the_bit(version):
    """Both files are of the same 7 steps: what version 1 lacks, the prior of the last, is computed."""
    state = loaded_controller(version).state_dict()
    assert state["version"] == STATE_VERSION
    assert state["step"] == 7
    assert state["measured"].tolist() == [True, True, True]
    assert {k: [float(x).hex() for x in state[k].flatten()] for k in NUMBERS} == NUMBERS
    saved = controller_state(version)
    added = set().union(*(names for number, names in ADDED.items() if number > version))
    assert state.keys() == saved.keys() | added
    for name in STATE.keys() - added:
        assert bits(state[name]) == bits(saved[name]), name
    assert float(state["prior"]) == pytest.approx(0.85 * 6 / 200, rel=1e-15)
    assert state["config"] == saved["config"] == CONFIG.as_dict()


@pytest.mark.parametrize("version", ADDED)
def test_a_controller_of_every_version_goes_on_as_it_would_have(version):
    """The entries mean what they meant: the next two steps by the rule, from the file's numbers, in plain Python."""
    number = {name: [float.fromhex(x) for x in values] for name, values in NUMBERS.items()}
    alpha, estimate, mu = number["alpha"][0], number["estimate"][0], number["mu"][0]
    sigma_s2, sigma_r2, delta2 = number["signals"]
    delta2 = min(delta2, 4.0 * (sigma_s2 + sigma_r2))
    controller = loaded_controller(version)
    for step in (7, 8):
        alpha *= 2.718281828459045 ** (0.1 * (0.03 / 0.02 - 1.0))
        mu_star = (alpha * delta2 + sigma_r2) / (delta2 + sigma_s2 + sigma_r2)
        estimate = 0.99 * estimate + 0.01 * mu_star
        target = 0.5 * (0.85 * step / 200) + 0.5 * estimate
        mu = min(max(mu + min(max(target - mu, -0.01), 0.01), 0.05), 0.9)
        assert float(controller.step(kl=0.03)) == pytest.approx(mu, rel=1e-7)  # mu is float32
        assert float(controller.state_dict()["estimate"]) == pytest.approx(estimate, rel=1e-12)
    assert controller.steps == 9


@pytest.mark.parametrize("version", [0, 3, "1", None, True])
def test_a_controller_of_another_version_is_refused(version):
    with pytest.raises(
        ValueError, match=rf"state_dict\['version'\] must be in \[1, {STATE_VERSION}\], got {version!r}"
    ):
        gk.GuidedAdaptiveController(CONFIG).load_state_dict(controller_state() | {"version": version})


@pytest.mark.parametrize("name", ["version", "config", "step", *STATE])
def test_a_controller_state_without_a_key_is_refused_by_name(name):
    state = controller_state()
    del state[name]
    with pytest.raises(ValueError, match=rf"state_dict lacks \['{name}'\]"):
        gk.GuidedAdaptiveController(CONFIG).load_state_dict(state)


def test_a_controller_state_with_a_key_too_many_is_refused_by_name():
    with pytest.raises(ValueError, match=r"state_dict has unknown keys \['momentum'\]"):
        gk.GuidedAdaptiveController(CONFIG).load_state_dict(controller_state() | {"momentum": torch.zeros(())})


def test_a_checkpoint_of_version_1_is_read_to_the_bit():
    found = load_checkpoint(DATA / "checkpoints_v1")
    assert found is not None
    assert found.step == 7
    assert {name: bits(tensor) for name, tensor in found.tensors.items()} == {
        "embed.weight": bits(torch.arange(6.0).reshape(2, 3) / 7),
        "lm_head.weight": bits(torch.arange(6.0).reshape(2, 3) / 7),
        "norm.weight": bits(torch.ones(3, dtype=torch.bfloat16) / 3),
        "empty": bits(torch.zeros(0, 4)),
    }
    assert found.tensors["embed.weight"] is found.tensors["lm_head.weight"]
    assert sorted(found.state) == ["mixing", "rng", "run", "step"]
    assert bits(found.state["rng"]) == bits(torch.arange(16, dtype=torch.uint8))
    assert repr(found.state["run"]) == repr({"before": 0.25, "after": None, "losses": [1.5, -0.0], "names": ("a", "b")})
    saved = controller_state(1)
    assert all(bits(found.state["mixing"][name]) == bits(saved[name]) for name in STATE.keys() - ADDED[2])


@pytest.fixture
def manifest(tmp_path):
    """A copy of the checkpoint of version 1: read its manifest, write another."""
    shutil.copytree(DATA / "checkpoints_v1", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints" / "step-00000007" / "manifest.json"
    return path, json.loads(path.read_text())


def refusal(path: Path, manifest: dict) -> str:
    path.write_text(json.dumps(manifest))
    with pytest.warns(RuntimeWarning, match="damaged"), pytest.raises(CheckpointError) as error:
        load_checkpoint(path.parents[1])
    assert str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("version", [0, -1, "1", "2"])
def test_a_checkpoint_of_another_version_is_refused(manifest, version):
    path, content = manifest
    text = refusal(path, content | {"format_version": version})
    assert f"format version {version!r}, this code reads {FORMAT_VERSION}" in text


@pytest.mark.parametrize("name", ["format_version", "step", "files"])
def test_a_manifest_without_a_key_is_refused_by_name(manifest, name):
    path, content = manifest
    del content[name]
    assert f"KeyError: '{name}'" in refusal(path, content)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
def test_a_manifest_that_lacks_a_file_is_refused_by_name(manifest, name):
    path, content = manifest
    del content["files"][name]
    assert f"KeyError: '{name}'" in refusal(path, content)


def test_what_is_written_now_has_the_layout_of_the_newest_files(tmp_path):
    """A new entry in the manifest or another file in the directory is another format, and needs another number. But for
    the manifest's own sha256: readers of the first files of version 1 pass over it, and nothing that is loaded differs.
    """
    path = save_checkpoint(tmp_path, 3, tensors={"w": torch.ones(2)}, state={"step": 3})
    newest = DATA / f"checkpoints_v{FORMAT_VERSION}" / "step-00000007"
    assert sorted(p.name for p in path.iterdir()) == sorted(p.name for p in newest.iterdir())
    old, new = (json.loads((directory / "manifest.json").read_text()) for directory in (newest, path))
    assert new.keys() == old.keys() | {"sha256"}
    assert {k: sorted(v) for k, v in old["files"].items()} == {k: sorted(v) for k, v in new["files"].items()}
