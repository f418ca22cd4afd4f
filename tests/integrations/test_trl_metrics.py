"""What stock TRL logs of its loss, logged with the hybrid loss too: every name, and with mu = 0 the same numbers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from trl_support import LETTERS, exact_logs, trainer  # noqa: F401

import gac_kernels as gk
from gac_kernels.integrations.trl import attach

TIMES = ("runtime", "_per_second", "step_time", "profiling/")
# Two updates a generation with a large rate, so that ratios leave their tight bounds. By SGD: Adam enlarges roundings.
MOVING = {
    "num_iterations": 2,
    "optim": "sgd",
    "learning_rate": 0.2,
    "max_steps": 4,
    "epsilon": 0.01,
    "epsilon_high": 0.01,
}


def rows_of(made):
    """Logged numbers of each step, without what the clock says."""
    made.train()
    rows = [row for row in made.state.log_history if "grad_norm" in row]
    return [{k: v for k, v in row.items() if not any(part in k for part in TIMES)} for row in rows]


def assert_logs_are_stocks(ours, stock, seen=()):
    assert len(ours) == len(stock) > 1
    for mine, theirs in zip(ours, stock, strict=True):
        assert set(theirs) <= set(mine), sorted(set(theirs) - set(mine))
        extra = {key for key in mine if not key.startswith("gac/")} - set(theirs)
        assert not extra
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value, rel=1e-6, abs=1e-6), key
    for key in seen:
        assert any(row[key] for row in stock), f"{key} is 0 throughout and shows nothing"


CASES = {
    "sapo": {},
    "grpo": {},
    "bnpo": {"mask_truncated_completions": True},
    "dapo": {"beta": 0.1, "entropy_coef": 0.05},
    "dr_grpo": {"delta": 1.02, "entropy_coef": 0.05},
    "cispo": {"epsilon_high": 1.001, "entropy_coef": 0.05, "beta": 0.1},
    "luspo": {"importance_sampling_level": "sequence", "entropy_coef": 0.05},
    "grpo ": {"importance_sampling_level": "sequence", "beta": 0.1, "use_bias_correction_kl": False},
    "sapo ": {"beta": 0.1, "use_bias_correction_kl": True, "entropy_coef": 0.05, "top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("kind", CASES)
def test_every_metric_of_stock_trl(tmp_path, kind):
    settings = {**MOVING, "loss_type": kind.strip(), **CASES[kind]}
    stock = rows_of(trainer(tmp_path / "stock", **settings))
    made = trainer(tmp_path / "ours", **settings)
    attach(made, mu=0.0, demonstrations="demonstration")
    seen = {"sapo": (), "cispo": ("cispo_clip_ratio",)}.get(kind.strip(), ("clip_ratio/region_mean",))
    assert_logs_are_stocks(rows_of(made), stock, seen)


def with_sampler(made, level):
    """As if an engine had sampled: the correction that TRL makes of its log-probs, in every batch."""
    generate, loss = made._generate_and_score_completions, made._compute_loss
    generator = torch.Generator().manual_seed(5)

    def generated(inputs):
        batch = generate(inputs)
        shape = batch["completion_ids"].shape if level == "token" else (len(batch["completion_ids"]), 1)
        batch["importance_sampling_ratio"] = 0.5 + torch.rand(shape, generator=generator)
        return batch

    def computed(model, inputs):
        made.use_vllm = True
        try:
            return loss(model, inputs)
        finally:
            made.use_vllm = False

    made._generate_and_score_completions, made._compute_loss = generated, computed
    return made


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind", ["sapo", "dapo"])
def test_the_samplers_correction_is_stock_trls(tmp_path, kind, level):
    """One weight a token and one a sequence, ``(B, 1)``; demonstrations get none."""
    settings = {**MOVING, "loss_type": kind, "beta": 0.1}
    plain = rows_of(trainer(tmp_path / "plain", **settings))
    stock = rows_of(with_sampler(trainer(tmp_path / "stock", **settings), level))
    assert abs(stock[0]["loss"] - plain[0]["loss"]) > 1e-3
    made = with_sampler(trainer(tmp_path / "ours", **settings), level)
    attach(made, mu=0.0, demonstrations="demonstration")
    assert_logs_are_stocks(rows_of(made), stock)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_the_samplers_correction_is_not_the_demonstrations(tmp_path, level):
    """No sampler wrote them: their weight is one."""
    settings = {"loss_type": "dapo", "learning_rate": 0.0, "max_steps": 2}
    losses = []
    for name, wrap in (("plain", lambda made: made), ("corrected", lambda made: with_sampler(made, level))):
        made = wrap(trainer(tmp_path / name, **settings))
        attach(made, mu=0.5, demonstrations="demonstration")
        losses.append([row["gac/supervised_loss"] for row in rows_of(made)])
    assert losses[0] == losses[1] and min(losses[0]) > 0


def experts(vocabulary, tokenizer):
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=vocabulary, hidden_size=16, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    )  # fmt: skip


@pytest.mark.parametrize("coefficient", [None, 0.3])
@pytest.mark.parametrize("kind", ["dapo", "sapo"])
def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tmp_path, monkeypatch, kind, coefficient):
    import trl_support

    monkeypatch.setattr(trl_support, "tiny_model", lambda tokenizer: experts(len(LETTERS) + 8, tokenizer))
    settings = {"loss_type": kind, "router_aux_loss_coef": coefficient, "max_steps": 3}
    stock = rows_of(trainer(tmp_path / "stock", **settings))
    made = trainer(tmp_path / "ours", **settings)
    attach(made, mu=0.0)
    assert_logs_are_stocks(rows_of(made), stock, ("aux_loss",))


def test_mu_does_not_scale_the_auxiliary_loss(tmp_path, monkeypatch):
    import trl_support

    monkeypatch.setattr(trl_support, "tiny_model", lambda tokenizer: experts(len(LETTERS) + 8, tokenizer))
    made = trainer(tmp_path, max_steps=2, router_aux_loss_coef=0.3, learning_rate=0.0)
    attach(made, mu=0.25, demonstrations="demonstration")
    for row in rows_of(made):
        hybrid = 0.75 * row["gac/policy_loss"] + 0.25 * row["gac/supervised_loss"]
        assert row["loss"] == pytest.approx(hybrid + 0.3 * row["aux_loss"], rel=1e-5)


def test_unscored_tokens_are_counted_over_the_step(tmp_path):
    made = trainer(tmp_path, **MOVING)
    attach(made, mu=0.0)
    rows = rows_of(made)
    assert [row["gac/rollout_unscored"] for row in rows] == [0.0] * len(rows)


def test_clip_ratios_are_those_of_the_objective_in_force(tmp_path):
    """Not of the trainer's loss type, which it takes the place of."""
    made = trainer(tmp_path, **{**MOVING, "loss_type": "sapo"})
    attach(made, mu=0.0, objective=gk.HybridObjective(gk.GRPO(0.01, 0.01)))
    rows = rows_of(made)
    assert any(row["clip_ratio/region_mean"] for row in rows)
    for row in rows:
        assert row["clip_ratio/region_mean"] == pytest.approx(row["gac/clip_fraction"], abs=0.05)


def test_a_weight_that_is_not_finite_is_named(tmp_path):
    made = with_sampler(trainer(tmp_path, **MOVING), "sequence")
    generate = made._generate_and_score_completions

    def broken(inputs):
        batch = generate(inputs)
        batch["importance_sampling_ratio"][:] = float("nan")
        return batch

    made._generate_and_score_completions = broken
    attach(made, mu=0.0)
    with pytest.raises(ValueError, match="rollout_weights"):
        made.train()


def test_in_bfloat16_log_probs_are_no_farther_from_float32_than_stocks(tmp_path):
    """The same tokens through the same weights; the two round in other places, and "within 1e-6" is float32's."""

    def built(name, ours, **settings):
        made = trainer(tmp_path / name, per_device_train_batch_size=16, max_completion_length=32, **settings)
        if ours:
            attach(made, mu=0.0)
        return made

    exact = built("exact", False)
    exact.model.train()
    batch = exact._generate_and_score_completions([exact.train_dataset[i // 4] for i in range(16)])
    ids, mask = (torch.cat([batch[f"prompt_{part}"], batch[f"completion_{part}"]], dim=1) for part in ("ids", "mask"))
    live = batch["completion_mask"].bool()

    @torch.no_grad()
    def logprobs(made):
        return made._get_per_token_logps_and_entropies(made.model, ids, mask, live.shape[1])[0].float()[live]

    wanted = logprobs(exact)
    for name, settings in (("weights", {"dtype": torch.bfloat16}), ("autocast", {"bf16": True})):
        off = [float((logprobs(built(f"{name}{ours}", ours, **settings)) - wanted).abs().mean()) for ours in (0, 1)]
        assert 1e-5 < off[1] <= 1.05 * off[0] < 1e-2, (name, off)
