"""The loop: that it computes what it says, that its state is complete, and that a run leaves what it promises."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import small
from transformers import AutoModelForCausalLM

import gac_kernels as gk
from gac_kernels.train import train
from gac_kernels.train.checkpoint import load_checkpoint
from gac_kernels.train.collect import Collector
from gac_kernels.train.config import CONTROLLERS
from gac_kernels.train.loop import Trainer
from gac_kernels.train.metrics import read_metrics
from gac_kernels.train.ranks import Ranks

CLOCK = ("step_seconds", "rollout_seconds", "controller_seconds")


def measured(metrics):
    return {name: value for name, value in metrics.items() if name not in CLOCK}


def steps(trainer, count):
    return [measured(trainer.step()) for _ in range(count)]


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# exact resume --------------------------------------------------------------------------------------------------------

VARIANTS = {
    "gac": {},
    "warm start": {"warmup_sft_steps": 3},
    "several updates a batch": {"updates_per_rollout": 3, "controller": "linear"},
    "reference and KL": {
        "reference": True,
        "controller": "kl",
        "objective": gk.HybridObjective(kl_coef=0.1),
        "warmup_sft_steps": 1,
    },
    "micro-batches": {"micro_batches": 2, "updates_per_rollout": 2, "temperature": 1.3},
    "hpt": {"controller": "hpt", "hpt_gamma": 0.2},
    "bfloat16": {"dtype": "bfloat16", "reference": True, "updates_per_rollout": 2, "warmup_sft_steps": 1},
    "demonstrations alone": {"prompts_per_step": 0, "controller": "fixed", "mu": 1.0},
    "gift": {"reference": True, "objective": gk.HybridObjective(supervised=gk.GIFT(2.0)), "warmup_sft_steps": 1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_resumed_trainer_takes_the_same_steps_bit_for_bit(name):
    config = small(steps=6, **VARIANTS[name])
    whole = Trainer(config)
    expected = steps(whole, config.total_steps)
    for cut in (2, 4):  # with three updates a batch, both stand inside one
        first = Trainer(config)
        steps(first, cut)
        saved = copy.deepcopy(first.state_dict())
        steps(first, 1)  # what happens after the snapshot must not matter
        second = Trainer(config)
        torch.rand(17)  # nor what the process draws elsewhere
        second.load_state_dict(saved)
        assert steps(second, config.total_steps - cut) == expected[cut:]
        assert same(weights(second), weights(whole))


def test_a_run_leaves_the_random_state_of_the_process_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer = Trainer(small())
    trainer.step()
    trainer.evaluate()
    assert torch.equal(torch.rand(3), expected)


def test_a_checkpoint_of_other_settings_is_refused_by_name():
    saved = Trainer(small()).state_dict()
    with pytest.raises(ValueError, match=r"seed: 0 -> 1"):
        Trainer(small(seed=1)).load_state_dict(saved)


# what a step computes -----------------------------------------------------------------------------------------------


def test_micro_batches_add_up_to_one_batch():
    objective = gk.HybridObjective(gk.DFPO(), aggregation="token-mean", entropy_coef=0.01)
    settings = {"dtype": "float64", "prompts_per_step": 4, "demonstrations_per_step": 6, "objective": objective}
    one, two = (Trainer(small(micro_batches=m, **settings)) for m in (1, 2))
    for _ in range(3):
        a, b = one.step(), two.step()
        for name in ("loss", "policy_loss", "supervised_loss", "entropy", "grad_norm", "reward", "ratio_mean", "mu"):
            assert a[name] == pytest.approx(b[name], rel=1e-9, abs=1e-12), name
    for name, tensor in weights(one).items():
        torch.testing.assert_close(weights(two)[name], tensor, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("controller", ["fixed", "srft"])
def test_the_step_follows_the_gradient_of_the_weighted_branches(controller):
    """Against autograd on plain log_softmax, for a batch with rewards put in by hand."""
    trainer = Trainer(small(dtype="float64", controller=controller, mu=0.3, clip_norm=1e9))
    rewards = iter([1.0, 0.0, 0.0, 0.0, 1.0, 1.0])
    trainer.collector.task.reward = lambda example, completion: next(rewards)
    model = copy.deepcopy(trainer.model)
    logged = trainer.step()
    batch = trainer._batch
    width = batch.prompt_mask.shape[1]
    assert batch.prompt_mask.all()
    logits = model(batch.input_ids).logits[:, width - 1 : -1]
    logps = logits.log_softmax(-1).gather(-1, batch.targets[..., None])[..., 0]
    mask, expert = batch.response_mask, batch.is_expert
    advantages = gk.group_advantages(torch.tensor([1.0, 0, 0, 0, 1, 1]), 3).double()
    ratio = (logps - logps.detach()).exp()
    gate = torch.where(advantages > 0, 1.0, 1.05 + 0.0 * advantages)[:, None]
    terms = -advantages[:, None] * (4 / gate) * torch.sigmoid(gate * (ratio[~expert] - 1))
    lengths = mask.sum(1)
    policy = ((terms * mask[~expert]).sum(1) / lengths[~expert]).mean()
    p = logps.exp()
    supervised = (-(p * (1 - p)).detach() * logps * mask)[expert].sum() / mask[expert].sum()
    w_r, w_s = (0.7, 0.3) if controller == "fixed" else (1.0, 0.5)
    loss = w_r * policy + w_s * supervised
    norm = torch.stack([g.norm() for g in torch.autograd.grad(loss, list(model.parameters()))]).norm()
    assert logged["policy_loss"] == pytest.approx(policy.item(), rel=1e-9)
    assert logged["supervised_loss"] == pytest.approx(supervised.item(), rel=1e-9)
    assert logged["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)  # mu is a float32 number
    assert logged["reward"] == pytest.approx(0.5)


@pytest.mark.parametrize("head", ["auto", "logits"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gift_compares_with_the_model_that_the_run_started_from(head, scale, monkeypatch):
    """Against q ~ p0 e^(beta 1[k=y]) in plain softmax, once the policy has left its start; also where the base's logits
    are scaled, which its hidden states do not tell."""
    objective = gk.HybridObjective(supervised=gk.GIFT(2.0))
    settings = {"dtype": "float64", "controller": "fixed", "mu": 1.0, "prompts_per_step": 0, "learning_rate": 0.1}
    trainer = Trainer(small(objective=objective, reference=True, head=head, **settings))
    start = copy.deepcopy(trainer.model)
    steps(trainer, 3)
    if scale != 1.0:
        base, plain = trainer.reference, trainer.reference.model.forward
        monkeypatch.setattr(base, "head", base.head and replace(base.head, scale=scale))

        def scaled(*args, **kwargs):
            output = plain(*args, **kwargs)
            output.logits = scale * output.logits
            return output

        monkeypatch.setattr(base.model, "forward", scaled)
    model = copy.deepcopy(trainer.model)
    logged = trainer.step()
    batch = trainer._batch
    width = batch.prompt_mask.shape[1]
    assert batch.prompt_mask.all()
    logits, base_logits = (m(batch.input_ids).logits[:, width - 1 : -1] for m in (model, start))
    target = torch.nn.functional.one_hot(batch.targets, logits.shape[-1]).double()
    q = (scale * base_logits + 2.0 * target).softmax(-1)
    losses = -(q * logits.log_softmax(-1)).sum(-1)
    assert logged["supervised_loss"] == pytest.approx(losses[batch.response_mask].mean().item(), rel=1e-9)
    plain_loss = -(target * logits.log_softmax(-1)).sum(-1)[batch.response_mask].mean().item()
    assert abs(logged["supervised_loss"] - plain_loss) > 1e-3  # else the test would not see a missing base


def test_the_ratio_is_exactly_one_on_the_first_update_of_a_batch_and_moves_on_the_next():
    trainer = Trainer(
        small(updates_per_rollout=3, learning_rate=3e-2, warmup_sft_steps=1, temperature=1.4, micro_batches=2)
    )
    ratios = [(m.get("ratio_mean"), m.get("ratio_max")) for m in steps(trainer, 5)][1:]
    assert ratios[0] == ratios[3] == (1.0, 1.0)
    assert ratios[1] != (1.0, 1.0) and ratios[2] != (1.0, 1.0)


def test_the_reference_is_the_model_after_the_warm_start():
    trainer = Trainer(small(reference=True, warmup_sft_steps=2, updates_per_rollout=2, learning_rate=1e-2))
    warm, logged = steps(trainer, 2), []
    after = weights(trainer)
    logged = steps(trainer, 2)
    assert same(trainer.reference.model.state_dict(), after)
    assert all(m["mu"] == 1.0 and m["policy_loss"] == 0.0 for m in warm)
    assert "kl" not in warm[0]  # there is nothing yet that it could be measured to
    assert logged[0]["kl"] == 0.0 < logged[1]["kl"]


def test_hpt_trains_each_prompt_on_one_branch_only():
    trainer = Trainer(
        small(controller="hpt", hpt_gamma=0.5, prompts_per_step=3, group_size=2, demonstrations_per_step=5)
    )
    rewards = iter([1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
    trainer.collector.task.reward = lambda example, completion: next(rewards)
    logged = trainer.step()
    batch = trainer._batch
    assert batch.is_expert.tolist() == [False, False, True, True] and batch.groups.tolist() == [0, 0, -1, -1]
    assert logged["mu"] == pytest.approx(2 / 3) and logged["reward"] == 0.5
    assert trainer.collector.positions == {"prompt": 3, "demonstration": 2}


@pytest.mark.parametrize("controller", CONTROLLERS)
@pytest.mark.parametrize("policy", ["sapo", "gspo"])
def test_every_rule_runs(controller, policy):
    from gac_kernels.train.config import POLICIES

    reference = {"reference": True} if controller == "kl" else {}
    trainer = Trainer(
        small(steps=2, controller=controller, objective=gk.HybridObjective(POLICIES[policy]), **reference)
    )
    before = weights(trainer)
    for metrics in (trainer.step(), trainer.step()):
        assert all(isinstance(value, float) and value == value for value in metrics.values())
        assert 0 <= metrics["controller_seconds"] < metrics["step_seconds"]
    assert not same(before, weights(trainer))


def test_ranks_take_disjoint_positions_of_the_same_streams():
    config = small(prompts_per_step=4, demonstrations_per_step=2)
    one = Trainer(config).collector
    three = [Collector(config, one.task, one.codec, Ranks(r, 3)) for r in range(3)]
    for _ in range(3):
        for stream, count in (("prompt", 4), ("demonstration", 2)):
            assert one._take(stream, count) == [p for c in three for p in c._take(stream, count)]
    assert one.positions == three[0].positions == three[1].positions == three[2].positions


def test_a_demonstration_that_no_completion_could_reach_is_refused():
    with pytest.raises(ValueError, match=r"max_new_tokens must hold every demonstration: .* got max_new_tokens=10"):
        Trainer(small(max_new_tokens=10))


# whole runs ---------------------------------------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises_and_its_model_starts_another(tmp_path):
    config = small(tmp_path / "a", warmup_sft_steps=2, steps=3, eval_every=2, checkpoint_every=2)
    result = train(config, progress=False)
    assert (result.steps, result.output) == (config.steps, config.output) and 0.05 <= result.mu <= 0.9
    log = read_metrics(config.output / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    evaluated = {line["step"]: line["eval/accuracy"] for line in log if "eval/accuracy" in line}
    assert evaluated.keys() == {2, 4, 5}
    assert (evaluated[2], evaluated[5]) == (result.accuracy_before, result.accuracy_after)
    assert json.loads((config.output / "summary.json").read_text()) == result.to_dict()
    settings = json.loads((config.output / "config.json").read_text())
    assert settings.pop("controller_in_force") == str(config.resolved_controller())
    assert settings == config.to_dict()
    assert (config.output / "report.html").stat().st_size > 10_000
    assert list((config.output / "tensorboard").iterdir())

    model = AutoModelForCausalLM.from_pretrained(config.output / "model", local_files_only=True)
    saved = load_checkpoint(config.output / "checkpoints")
    assert same(model.state_dict(), {k.removeprefix("policy."): v for k, v in saved.tensors.items()})
    demonstration = Trainer(config).collector.task.demonstration(0).demonstration
    own, loaded = (
        Trainer(c).tokenizer(demonstration)["input_ids"] for c in (config, small(model=str(config.output / "model")))
    )
    assert own == loaded and len(own) == len(demonstration)

    again = train(small(tmp_path / "b", model=str(config.output / "model"), steps=1), progress=False)
    assert again.accuracy_before == result.accuracy_after
    with pytest.raises(ValueError, match="holds a run already"):
        train(config, progress=False)


def test_a_users_file_runs_and_a_finished_run_resumes_to_its_result(tmp_path):
    path = tmp_path / "user.jsonl"
    lines = [{"prompt": f"what is {i}? ", "answer": str(i), "demonstration": f"it is {i}"} for i in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = small(tmp_path / "run", task=str(path), demonstration_pool=None, steps=2)
    result = train(config, progress=False)
    assert train(config, resume=True, progress=False) == result


def test_a_killed_run_resumes_to_the_same_weights_and_log(tmp_path):
    """SIGKILL right after some step, without a word to the process; the second sitting must leave no trace of it."""
    settings = {
        "steps": 7,
        "updates_per_rollout": 2,
        "warmup_sft_steps": 2,
        "checkpoint_every": 3,
        "eval_every": 2,
        "reference": True,
    }
    whole = small(tmp_path / "whole", **settings)
    train(whole, progress=False)
    cut = replace(whole, output=tmp_path / "cut")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [sys.executable, str(Path(__file__).with_name("killed_run.py")), str(cut.output), json.dumps(settings)]
    killed = subprocess.run([*arguments, "5"], env=environment, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert load_checkpoint(cut.output / "checkpoints").step == 3
    assert len(read_metrics(cut.output / "metrics.jsonl")) == 5
    train(cut, resume=True, progress=False)
    ends = [load_checkpoint(c.output / "checkpoints") for c in (whole, cut)]
    assert same(ends[0].tensors, ends[1].tensors)
    logs = [[measured(line) for line in read_metrics(c.output / "metrics.jsonl")] for c in (whole, cut)]
    assert logs[0] == logs[1]
    with pytest.raises(ValueError, match="learning_rate"):
        train(replace(cut, learning_rate=0.5), resume=True, progress=False)
