"""A config that cannot run says so at once, by the name of the setting."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

import gac_kernels as gk
from gac_kernels.train.config import TrainConfig


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"steps": -1}, ValueError, "steps must be >= 0"),
        ({"steps": 2.0}, TypeError, "steps must be an int"),
        ({"steps": True}, TypeError, "steps must be an int"),
        ({"steps": 0, "warmup_sft_steps": 0}, ValueError, "steps and warmup_sft_steps"),
        ({"group_size": 0}, ValueError, "group_size must be >= 1"),
        ({"temperature": 0.0}, ValueError, "temperature must be finite and in"),
        ({"learning_rate": float("nan")}, ValueError, "learning_rate must be finite"),
        ({"mu": "0.5"}, TypeError, "mu must be a number"),
        ({"mu": 1.5}, ValueError, "mu must be finite and in"),
        ({"mixing_horizon": 0}, ValueError, "mixing_horizon"),
        ({"eval_size": 0}, ValueError, "eval_size must be None or an int >= 1, got 0"),
        ({"controller": "magic"}, ValueError, "controller must be one of gac, fixed"),
        ({"dtype": "int8"}, ValueError, "dtype must be one of"),
        ({"dtype": "float16"}, ValueError, "float16', which needs a loss scale, .*take 'bfloat16'"),
        ({"objective": "sapo"}, TypeError, "objective must be a HybridObjective"),
        ({"objective": gk.HybridObjective(supervised=gk.GIFT())}, ValueError, "reference must be True for GIFT"),
        ({"objective": gk.HybridObjective(kl_coef=0.1)}, ValueError, "reference must be True"),
        ({"controller": "kl"}, ValueError, "reference must be True"),
        ({"controller_config": gk.ControllerConfig(alpha=gk.KLTarget())}, ValueError, "reference must be True"),
        ({"controller_config": {"blend": 1.0}}, TypeError, "controller_config must be a ControllerConfig"),
        ({"model": "no/such/directory"}, ValueError, "model must be 'tiny' or a local model directory"),
        ({"task": "subtraction"}, ValueError, "task must be 'arithmetic' or a path"),
        ({"task": "nowhere.jsonl"}, ValueError, "there is no file"),
        ({"prompts_per_step": 9, "micro_batches": 2}, ValueError, "micro_batches must divide prompts_per_step = 9"),
        ({"demonstrations_per_step": 1, "micro_batches": 2}, ValueError, "demonstrations_per_step must be 0 or >="),
        ({"prompts_per_step": 0}, ValueError, "prompts_per_step=0 needs controller='fixed' and mu=1.0"),
        ({"demonstrations_per_step": 0}, ValueError, "demonstrations_per_step=0 needs controller='fixed' and mu=0.0"),
        ({"tiny_hidden": 20}, ValueError, "tiny_hidden must be a multiple of 8"),
        ({"device": "abacus"}, RuntimeError, "abacus"),
    ],
)
def test_what_cannot_run_is_named(settings, error, says):
    with pytest.raises(error, match=says):
        TrainConfig("unused", **settings)


def test_a_config_is_frozen_and_can_be_varied():
    config = TrainConfig("unused", warmup_sft_steps=0)
    with pytest.raises(FrozenInstanceError):
        config.steps = 3
    assert replace(config, steps=3).total_steps == 3


def test_what_is_left_open_depends_on_the_model(tmp_path):
    tiny, local = TrainConfig("unused"), TrainConfig("unused", model=str(tmp_path))
    assert (tiny.warmup_sft_steps, tiny.warmup_sft_lr, tiny.learning_rate) == (300, 2e-3, 5e-4)
    assert (local.warmup_sft_steps, local.warmup_sft_lr, local.learning_rate) == (0, 1e-5, 1e-6)
    own = TrainConfig("unused", model=str(tmp_path), warmup_sft_steps=7, learning_rate=0.0)
    assert (own.warmup_sft_steps, own.learning_rate) == (7, 0.0)


def test_resume_accepts_what_touches_no_weight_and_names_what_does():
    config = TrainConfig("a", steps=10, learning_rate=0.001)
    saved = config.to_dict()
    replace(config, output="b", eval_every=3, checkpoint_every=7, checkpoint_keep=5).check_resumable(saved)
    with pytest.raises(ValueError, match=r"learning_rate: 0.001 -> 0.1; temperature: 1.0 -> 2.0"):
        replace(config, learning_rate=0.1, temperature=2.0).check_resumable(saved)
    with pytest.raises(ValueError, match="objective"):
        replace(config, objective=gk.HybridObjective(gk.GRPO())).check_resumable(saved)


def test_a_custom_gate_does_not_stand_in_the_way_of_resuming():
    """Its functions print with their address; a second sitting builds them anew."""

    def config():
        gate = gk.Gate("mine", lambda u, tau: 1 + torch.atan(tau * u) / tau, lambda u, tau: 1 / (1 + (tau * u) ** 2))
        return TrainConfig("a", objective=gk.HybridObjective(gk.SAPO(gate)))

    config().check_resumable(config().to_dict())
