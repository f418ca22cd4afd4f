"""`dtype="bfloat16"`: products in bfloat16, everything that adds up in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file
from small_runs import small

import gac_kernels as gk
from gac_kernels.train import train
from gac_kernels.train.loop import Trainer


def change(dtype, steps=8, **settings):
    """How far the default rate of a local model moves the weights, and how many of them, in double precision."""
    trainer = Trainer(small(dtype=dtype, learning_rate=1e-6, controller="fixed", **settings))
    before = copy.deepcopy(trainer.model.state_dict())
    for _ in range(steps):
        trainer.step()
    moves = [(value.double() - before[name].double()).flatten() for name, value in trainer.model.state_dict().items()]
    return torch.cat(moves).norm().item(), (torch.cat(moves) != 0).double().mean().item()


@pytest.mark.parametrize("head", ["auto", "logits"])
def test_small_updates_are_not_lost_in_bfloat16(head):
    """On bfloat16 weights near 0.02 the spacing is 1e-4, and an update of 1e-6 rounds to none: 0.3 % of them moved."""
    far, share = change("float32", head=head)
    found, found_share = change("bfloat16", head=head)
    assert found == pytest.approx(far, rel=0.2) and found_share > 0.9 * share > 0.5


def test_what_is_computed_in_bfloat16_and_what_is_kept_in_float32():
    trainer = Trainer(small(dtype="bfloat16", reference=True, updates_per_rollout=2))
    seen = []
    layer = trainer.model.get_submodule("model.layers.0.mlp.up_proj")
    layer.register_forward_hook(lambda module, inputs, output: seen.append((output.dtype, torch.is_grad_enabled())))
    first, second = trainer.step(), trainer.step()
    assert {dtype for dtype, _ in seen} == {torch.bfloat16} and {grad for _, grad in seen} == {False, True}
    assert first["ratio_mean"] == first["ratio_max"] == 1.0  # rollouts, old log-probs and loss round alike
    assert first["kl"] == 0.0 < second["kl"]
    kept = [p.dtype for p in trainer.model.parameters()] + [p.grad.dtype for p in trainer.model.parameters()]
    kept += [v.dtype for state in trainer.optimizer.state.values() for v in state.values()]
    kept += [p.dtype for p in trainer.reference.model.parameters()]
    assert set(kept) == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("gift", [False, True])
def test_the_loss_is_that_of_float32_within_the_roundings_of_bfloat16(gift):
    objective = gk.HybridObjective(supervised=gk.GIFT(2.0)) if gift else gk.HybridObjective()
    settings = {"prompts_per_step": 0, "controller": "fixed", "mu": 1.0, "reference": gift, "objective": objective}
    exact, mixed = (Trainer(small(dtype=dtype, **settings)).step() for dtype in ("float64", "bfloat16"))
    assert mixed["supervised_loss"] == pytest.approx(exact["supervised_loss"], rel=2**-8)
    assert mixed["supervised_loss"] != Trainer(small(dtype="float32", **settings)).step()["supervised_loss"]
    assert mixed["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)


def test_what_is_saved_is_float32(tmp_path):
    config = small(tmp_path / "run", dtype="bfloat16", steps=1)
    train(config, progress=False)
    exported = load_file(config.output / "model" / "model.safetensors")
    saved = load_file(max((config.output / "checkpoints").iterdir()) / "weights.safetensors")
    assert {tensor.dtype for tensor in (*exported.values(), *saved.values())} == {torch.float32}


def test_weights_of_another_dtype_are_not_continued_from():
    trainer = Trainer(small(dtype="bfloat16"))
    state = trainer.state_dict()
    state["tensors"] = {name: tensor.bfloat16() for name, tensor in state["tensors"].items()}
    with pytest.raises(ValueError, match=r"resume needs weights in torch\.float32, .* in torch\.bfloat16: begin a new"):
        Trainer(small(dtype="bfloat16")).load_state_dict(state)
