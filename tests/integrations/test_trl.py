"""TRL's GRPOTrainer with our head and the hybrid loss, against stock TRL."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

import datasets
import pyarrow as pa
import trl
from trl_support import assert_same_curves, curve, dataset, exact_logs, trainer  # noqa: F401

import gac_kernels as gk
from gac_kernels.integrations.trl import STATE_FILE, attach

LOSSES = ("sapo", "grpo", "dapo", "dr_grpo", "cispo")


@pytest.fixture
def stock(tmp_path):
    def run(**settings):
        made = trainer(tmp_path / "stock", **settings)
        made.train()
        return curve(made)

    return run


@pytest.mark.parametrize(
    "options",
    [{}, {"mu": 0.0}, {"mu": 0.0, "demonstrations": "demonstration"}],
    ids=["head", "hybrid", "unheeded demonstrations"],
)
@pytest.mark.parametrize("kind", LOSSES)
def test_mu_zero_is_stock_trl(tmp_path, stock, kind, options):
    settings = {"loss_type": kind, "epsilon_high": 5.0 if kind == "cispo" else 0.28}
    made = trainer(tmp_path / "ours", **settings)
    attach(made, **options)
    made.train()
    assert_same_curves(curve(made), stock(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"gradient_checkpointing": True, "loss_type": "sapo"},
        {"peft": True, "loss_type": "sapo"},
        {"peft": True, "loss_type": "dapo", "beta": 0.1},
        {"peft": True, "gradient_checkpointing": True, "loss_type": "cispo", "epsilon_high": 5.0},
        {"num_iterations": 2, "loss_type": "grpo"},
        {"beta": 0.1, "loss_type": "dapo", "temperature": 0.7},
        {"steps_per_generation": 4, "loss_type": "dapo"},
        {"loss_type": "bnpo", "delta": 2.0, "mask_truncated_completions": True},
    ],
    ids=["checkpointing", "peft", "peft-kl", "peft-checkpointing", "iterations", "kl", "misaligned", "two-sided"],
)
def test_other_settings_are_stock_trl_too(tmp_path, stock, settings):
    made = trainer(tmp_path / "ours", **settings)
    attach(made, mu=0.0)
    made.train()
    assert_same_curves(curve(made), stock(**settings))


@pytest.mark.parametrize(
    ("option", "settings"),
    [
        ({"importance_sampling_level": "sequence"}, {"loss_type": "grpo", "num_iterations": 2}),
        (
            {"importance_sampling_level": "sequence"},
            {"loss_type": "dapo", "num_iterations": 2, "beta": 0.1, "use_bias_correction_kl": False},
        ),
        ({"importance_sampling_level": "sequence"}, {"loss_type": "luspo", "num_iterations": 2}),
        ({"loss_type": "luspo"}, {"num_iterations": 2}),
        ({"entropy_coef": 0.05}, {"loss_type": "dapo"}),
        ({"entropy_coef": 0.05}, {"loss_type": "sapo", "beta": 0.1}),
        ({"top_entropy_quantile": 0.4}, {"loss_type": "grpo", "beta": 0.1}),
        ({"top_entropy_quantile": 0.4}, {"loss_type": "sapo", "entropy_coef": 0.05}),
        ({"off_policy_mask_threshold": 0.0}, {"loss_type": "dapo", "num_iterations": 2}),
    ],
    ids=lambda value: "-".join(str(part) for pair in value.items() for part in pair),
)
def test_options_of_the_policy_loss_are_stock_trl_too(tmp_path, stock, option, settings):
    """Each changes stock TRL's curve here, and ours with it; demonstrations are there, and have no weight."""
    settings = {"epsilon": 0.002, "epsilon_high": 0.002, "temperature": 1.3, "learning_rate": 1e-2} | settings
    expected = stock(**settings, **option)
    made = trainer(tmp_path / "ours", **settings, **option)
    attach(made, mu=0.0, demonstrations="demonstration")
    made.train()
    assert_same_curves(curve(made), expected)
    without = torch.tensor(stock(**settings))
    assert float((without - torch.tensor(expected)).abs().max()) > 1e-4
    if made.entropy_coef:
        assert [row["entropy_coef"] for row in made.state.log_history if "gac/mu" in row] == [0.05] * 5


def test_options_of_the_policy_loss_leave_demonstrations_alone(tmp_path):
    curves = []
    for name, options in (("with", {"entropy_coef": 0.1, "top_entropy_quantile": 0.4}), ("without", {})):
        made = trainer(tmp_path / name, **options)
        attach(made, mu=1.0, demonstrations="demonstration")
        made.train()
        curves.append(curve(made))
    assert_same_curves(*curves)


def test_the_head_is_ours_only_inside_a_forward(tmp_path, monkeypatch):
    from trl.trainer import utils

    from gac_kernels.integrations import _trl_head

    theirs, calls = utils._ChunkedLogProbFunction, []
    original = _trl_head.Head.apply
    monkeypatch.setattr(_trl_head.Head, "apply", staticmethod(lambda *a: calls.append(1) or original(*a)))
    made = trainer(tmp_path, max_steps=1)
    attach(made)
    made.train()
    assert len(calls) == 2  # micro-batches
    assert utils._ChunkedLogProbFunction is theirs


def test_demonstrations_train_the_model_and_mu_moves(tmp_path):
    config = gk.ControllerConfig(update_every=1)
    made = trainer(tmp_path, max_steps=6)
    attached = attach(made, demonstrations="demonstration", controller=gk.GuidedAdaptiveController(config))
    made.train()
    rows = [row for row in made.state.log_history if "gac/mu" in row]
    assert len(rows) == 6 and attached.controller.steps == 6
    assert rows[-1]["gac/mu"] == pytest.approx(float(attached.mu)) != pytest.approx(0.5)
    assert all(row["gac/supervised_loss"] > 0 for row in rows) and rows[-1]["gac/sigma_s2"] > 0
    assert {"gac/ratio_mean", "gac/delta2", "gac/policy_loss", "entropy", "reward"} <= set(rows[0])


def test_all_supervision_learns_the_demonstrations(tmp_path):
    data = dataset().to_dict() | {"demonstration": ["abc"] * 16}
    data = datasets.Dataset(pa.table(data), fingerprint="constant")
    made = trainer(tmp_path, max_steps=50, learning_rate=1e-2, data=data)
    attach(made, demonstrations="demonstration", mu=1.0, objective=gk.HybridObjective(gk.GRPO(), gk.NLL("none")))
    made.train()
    losses = [row["gac/supervised_loss"] for row in made.state.log_history if "gac/mu" in row]
    assert losses[-1] < 0.1 * losses[0]


def test_supervised_loss_is_the_mean_over_the_steps_demonstrations(tmp_path):
    """Against log-probs of the plain model, one demonstration at a time."""
    made = trainer(tmp_path, max_steps=1, learning_rate=0.0)
    attach(made, demonstrations="demonstration", mu=1.0, objective=gk.HybridObjective(gk.GRPO(), gk.NLL("none")))
    seen = []
    original = made._generate_and_score_completions
    made._generate_and_score_completions = lambda inputs: seen.extend(inputs) or original(inputs)
    made.train()
    total, count = 0.0, 0
    for example in seen[:: made.num_generations]:
        if example["demonstration"] is None:
            continue
        tokenizer = made.processing_class
        prompt = tokenizer(example["prompt"])["input_ids"]
        response = [*tokenizer(example["demonstration"])["input_ids"], tokenizer.eos_token_id]
        logits = made.model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float(logits.gather(1, torch.tensor(response)[:, None]).sum())
        count += len(response)
    assert count > 0
    (row,) = [row for row in made.state.log_history if "gac/mu" in row]
    assert row["gac/supervised_loss"] == pytest.approx(total / count, rel=1e-5)
    assert row["loss"] == pytest.approx(total / count, rel=1e-5)


def test_a_resumed_run_continues_exactly(tmp_path):
    def made(**settings):
        config = gk.ControllerConfig(update_every=1)
        run = trainer(tmp_path, max_steps=6, save_strategy="steps", save_steps=3, **settings)
        return run, attach(run, demonstrations="demonstration", controller=gk.GuidedAdaptiveController(config))

    whole, at_end = made()
    whole.train()
    file = tmp_path / "checkpoint-3" / STATE_FILE
    assert torch.load(file, weights_only=True)["step"] == 3
    assert not list(tmp_path.glob(f"checkpoint-*/.{STATE_FILE}*"))
    again, resumed = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert torch.equal(at_end.mu, resumed.mu)
    assert curve(again) == curve(whole)
    for (name, ours), theirs in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name

    file.unlink()
    broken, _ = made()
    with pytest.raises(FileNotFoundError, match=STATE_FILE):
        broken.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_subclass_takes_the_same_arguments(tmp_path):
    from gac_kernels.integrations.trl import GACGRPOTrainer

    made = trainer(tmp_path, kind=GACGRPOTrainer, attachment={"demonstrations": "demonstration"}, max_steps=1)
    assert isinstance(made, trl.GRPOTrainer)
    made.train()
    assert made.gac.controller.steps == 1
    with pytest.raises(ValueError, match="attached already"):
        attach(made)


@pytest.mark.parametrize("version", ["1.14.2", "2.0.0", "0.24.0"])
def test_other_versions_are_refused(tmp_path, monkeypatch, version):
    made = trainer(tmp_path)
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"expects trl >= 1.15, < 2; found {version}"):
        attach(made)


def test_a_hook_that_moved_is_named(tmp_path, monkeypatch):
    made = trainer(tmp_path)
    monkeypatch.delattr("trl.trainer.utils._ChunkedLogProbFunction")
    with pytest.raises(ImportError, match=r"expected trl\.trainer\.utils\._ChunkedLogProbFunction"):
        attach(made)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"loss_type": "vespo"}, {"mu": 0.0}, "loss_type must be one of .*got 'vespo'"),
        (
            {"importance_sampling_level": "sequence", "loss_type": "sapo"},
            {"mu": 0.0},
            "importance_sampling_level.*expected 'token', got 'sequence'",
        ),
        (
            {"importance_sampling_level": "sequence", "delta": 2.0, "loss_type": "grpo"},
            {"mu": 0.0},
            "delta must be None with importance_sampling_level='sequence', got 2",
        ),
        (
            {"importance_sampling_level": "sequence", "use_bias_correction_kl": True, "loss_type": "grpo", "beta": 0.1},
            {"mu": 0.0},
            "use_bias_correction_kl.*expected False, got True",
        ),
        ({"use_adaptive_entropy": True}, {"mu": 0.0}, "use_adaptive_entropy.*expected False, got True"),
        (
            {"entropy_coef": 0.1},
            {"mu": 0.0, "objective": gk.HybridObjective(entropy_coef=0.2)},
            "objective.entropy_coef = 0.2 and the trainer's entropy_coef = 0.1 exclude each other",
        ),
        ({"beta": 0.1}, {"mu": 0.0, "objective": gk.HybridObjective()}, "kl_coef must be the trainer's beta = 0.1"),
        ({"remove_unused_columns": True}, {"demonstrations": "demonstration"}, "remove_unused_columns"),
        ({}, {"demonstrations": "solution"}, r"demonstrations must be a column.*'solution'"),
        ({}, {"mu": 0.5}, "demonstrations must name a column"),
        ({}, {"mu": 1.5}, r"mu must be a number in \[0, 1\], got 1.5"),
        ({}, {"mu": 0.5, "controller": gk.GuidedAdaptiveController()}, "exclude each other"),
        ({}, {"mu": 0.0, "objective": gk.HybridObjective(gk.DFPO())}, "DFPO"),
        ({}, {"mu": 0.0, "objective": gk.HybridObjective(supervised=gk.GIFT())}, "GIFT"),
        (
            {},
            {
                "demonstrations": "demonstration",
                "controller": gk.GuidedAdaptiveController(gk.ControllerConfig(estimator="logit")),
            },
            "estimator must be 'coefficient'",
        ),
    ],
)
def test_what_is_not_supported_raises(tmp_path, settings, options, message):
    made = trainer(tmp_path, **settings)
    with pytest.raises(ValueError, match=message):
        attach(made, **options)


def test_only_a_grpo_trainer():
    with pytest.raises(TypeError, match=r"trainer must be a trl.GRPOTrainer .*, got object"):
        attach(object())


def test_the_head_refuses_what_it_does_not_compute():
    from gac_kernels.integrations._trl_head import Head

    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"outputs.*got mean_logits"):
        Head.apply(hidden, weight, None, torch.tensor([0, 1, 2]), 1.0, 8, outputs=("log_probs", "mean_logits"))
