"""Our policy loss in Trinity-RFT, against Trinity's own where both compute the same."""

from __future__ import annotations

import math
import pickle
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trinity", reason="Trinity-RFT is not installed (extra [trinity])")
pytest.importorskip("ray", reason="Trinity-RFT needs ray")

from trinity.algorithm.policy_loss_fn import POLICY_LOSS_FN

import gac_kernels as gk
from gac_kernels.integrations import trinity as integration

PATH = "gac_kernels.integrations.trinity.GACPolicyLossFn"
ROWS, LENGTH = 6, 9
MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
SIZES = {
    "ppo_mini_batch_size": 24, "ppo_micro_batch_size_per_gpu": ROWS, "ngpus_trainer": 2, "train_batch_size_usual": 16,
    "train_batch_size_expert": 8,
}  # fmt: skip
GRPO = {"objective": "grpo", "objective_args": {"clip_low": 0.2, "clip_high": 0.2, "delta": 3.0}}
EXACT = {"rtol": 1e-7, "atol": 1e-12}  # Trinity adds 1e-8 to its counts


def loss_fn(name=PATH, **arguments):
    return POLICY_LOSS_FN.get(name)(backend="verl", **{**SIZES, **arguments})


def micro_batch(seed=0, expert=(1, 4), step=7, spread=0.5):
    """Under Trinity's names for verl's backend; one response that no token of counts is left out."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64)

    mask = torch.arange(LENGTH) < torch.randint(2, LENGTH + 1, (ROWS, 1), generator=g)
    mask[0, 1] = False
    logprob = -normal(ROWS, LENGTH).abs()
    return {
        "logprob": logprob.requires_grad_(),
        "old_log_probs": logprob.detach() + spread * normal(ROWS, LENGTH),
        "response_mask": mask,
        "advantages": normal(ROWS, 1).expand(ROWS, LENGTH).clone(),
        "expert_mask": torch.tensor([row in expert for row in range(ROWS)]),
        "step": torch.full((ROWS,), step, dtype=torch.int32),
    }


def tokens_of(batch):
    """The same as the package's own functions take it."""
    return gk.TokenBatch.from_padded(
        batch["response_mask"].long(), batch["response_mask"], is_expert_S=batch["expert_mask"],
        advantages=batch["advantages"], old_logprobs=batch["old_log_probs"],
    )  # fmt: skip


def run(loss, **batch):
    inputs = micro_batch(**batch)
    value, metrics = loss(**inputs)
    value.backward()
    return value.detach(), inputs["logprob"].grad, metrics


@pytest.mark.parametrize("dynamic", [False, True], ids=["", "dynamic"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mix", "mix_chord"])
def test_grpo_with_a_fixed_mu_is_trinitys(kind, mode, dynamic):
    common = {"loss_agg_mode": mode, "use_dynamic_bsz": dynamic}
    ours = loss_fn(**GRPO, **common, mu=0.3, supervised="none" if kind == "mix" else "phi")
    mu = {"mu": 0.3} if kind == "mix" else {"mu_peak": 0.3, "mu_valley": 0.3}
    theirs = loss_fn(kind, **common, **mu, clip_range=0.2)
    for seed in range(3):
        (loss, gradient, metrics), (their_loss, their_gradient, their_metrics) = (
            run(one, seed=seed, spread=1.5) for one in (ours, theirs)
        )
        assert bool(their_gradient.abs().max() > 1e-4)
        torch.testing.assert_close(loss, their_loss, **EXACT)
        torch.testing.assert_close(gradient, their_gradient, **EXACT)
        assert metrics["loss"] == pytest.approx(their_metrics["loss"]) and metrics["mu"] == 0.3
        assert set(their_metrics) <= set(metrics)
        for name, value in their_metrics.items():
            assert metrics[name] == pytest.approx(value, rel=1e-6), name
        assert metrics["usual/pg_clipfrac"] and metrics["usual/pg_clipfrac_lower"] and metrics["usual/ppo_kl"]


@pytest.mark.parametrize("expert", [(), tuple(range(ROWS))], ids=["rollouts", "demonstrations"])
def test_one_branch_alone(expert):
    """MIX has these cases; CHORD's means over no token are left out of this."""
    ours, theirs = loss_fn(**GRPO, mu=0.3, supervised="none"), loss_fn("mix", mu=0.3, clip_range=0.2)
    (loss, gradient, _), (their_loss, their_gradient, _) = (run(one, expert=expert) for one in (ours, theirs))
    torch.testing.assert_close(loss, their_loss, **EXACT)
    torch.testing.assert_close(gradient, their_gradient, **EXACT)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("objective", "arguments", "name", "theirs"),
    [
        ("cispo", {"clip_high": 1.28}, "cispo", {"clip_range_low": 1.0, "clip_range_high": 0.28}),
        ("gspo", {"clip_low": 0.1, "clip_high": 0.2}, "gspo", {"clip_range_low": 0.1, "clip_range_high": 0.2}),
    ],
)
def test_the_other_objectives_are_trinitys(objective, arguments, name, theirs, mode):
    """With mu 0 and rollouts only: a step's one micro-batch, where both weigh alike."""
    whole = {"ppo_mini_batch_size": ROWS, "ngpus_trainer": 1, "train_batch_size_usual": ROWS}
    ours = loss_fn(objective=objective, objective_args=arguments, mu=0.0, loss_agg_mode=mode, **whole)
    stock = POLICY_LOSS_FN.get(name)(backend="verl", loss_agg_mode=mode, **theirs)
    (loss, gradient, _), (their_loss, their_gradient, _) = (run(one, expert=()) for one in (ours, stock))
    assert bool(their_gradient.abs().max() > 1e-4)
    torch.testing.assert_close(loss, their_loss, **EXACT)
    torch.testing.assert_close(gradient, their_gradient, **EXACT)


@pytest.mark.parametrize("objective", ["sapo", "grpo", "cispo", "gspo"])
def test_every_objective_tells_trinitys_metrics(objective):
    """GSPO's and CISPO's clip fractions are by their own ratios; SAPO clips nothing."""
    _, _, metrics = run(loss_fn(objective=objective, mu=0.3), spread=1.5)
    batch = micro_batch(spread=1.5)
    rows, clipped, kl, count = [], 0.0, 0.0, 0
    for row in range(ROWS):
        live = batch["response_mask"][row]
        if row in (1, 4):
            continue
        log_ratio = (batch["logprob"] - batch["old_log_probs"])[row][live].tolist()
        advantage = float(batch["advantages"][row, 0])
        shared = math.exp(sum(log_ratio) / len(log_ratio))
        for one in log_ratio:
            ratio = shared if objective == "gspo" else math.exp(one)
            high = {"cispo": gk.CISPO().clip_high, "sapo": math.inf}.get(objective, 1.2)
            low = {"cispo": 0.0, "sapo": 0.0}.get(objective, 0.8)
            clipped += ratio > high if advantage > 0 else ratio < low
            kl -= one
        count += len(log_ratio)
        rows.append(row)
    share = len(rows) * 4 / 8  # four micro-batches, eight rollouts a GPU
    assert metrics["usual/pg_clipfrac"] == pytest.approx(share * clipped / count)
    assert metrics["usual/ppo_kl"] == pytest.approx(share * kl / count)
    assert metrics["usual/pg_clipfrac_lower"] == 0.0


@pytest.mark.parametrize("gate", ["sigmoid", "erf", "arctan", "softsign"])
def test_sapo_is_the_packages(gate):
    """Trinity's own sapo multiplies the gate's value, without gradient, by the log-prob: another objective."""
    made = loss_fn(objective_args={"gate": gate, "tau_pos": 10.0, "tau_neg": 12.0}, mu=0.3)
    loss, gradient, metrics = run(made)
    batch = micro_batch()
    objective = gk.HybridObjective(gk.SAPO(gate, 10.0, 12.0), aggregation="token-mean")
    own = gk.hybrid_loss(batch["logprob"], tokens_of(batch), objective, 0.3)
    own.loss.backward()
    # 4 of 8 rollouts and 2 of 4 demonstrations a GPU, in the first of 24 / 6 micro-batches: both weigh 2
    torch.testing.assert_close(loss, 2 * own.loss.detach())
    torch.testing.assert_close(gradient, 2 * batch["logprob"].grad)
    assert metrics["usual/effective_update_ratio"] == pytest.approx(float(own.metrics["effective_update_ratio"]))


def test_log_probs_that_an_engine_could_not_score():
    """Of a demonstration they are not read; at a token of a rollout they are refused by name."""
    made, wanted, spoiled = loss_fn(mu=0.3), micro_batch(), micro_batch()
    spoiled["old_log_probs"][[1, 4]] = float("nan")
    spoiled["old_log_probs"][~spoiled["response_mask"]] = float("nan")
    (loss, metrics), (expected, numbers) = (made(**batch) for batch in (spoiled, wanted))
    assert torch.equal(loss, expected) and metrics == numbers
    spoiled["old_log_probs"][0, 0] = float("-inf")
    with pytest.raises(ValueError, match="old_logprobs"):
        made(**spoiled)


def test_the_controller_steps_with_the_trainer():
    """Micro-batches of one step share a mu, which comes from the steps before; evaluation moves nothing."""
    made = loss_fn(controller={"update_every": 1, "prior": 0.2})
    twin = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1, prior=gk.ConstantPrior(0.2)))
    seen = []
    for step, seeds in ((3, (0, 1)), (4, (2, 3)), (5, (4, 5)), (9, (6,))):
        for seed in seeds:
            _, _, metrics = run(made, seed=seed, step=step)
            assert metrics["mu"] == pytest.approx(float(twin.mu))
            twin.observe(signals(seed))
        with torch.no_grad():
            inputs = micro_batch(seed=99, step=step + 1)
            assert made(**inputs)[1]["mu"] == metrics["mu"]
        seen.append(metrics["mu"])
        twin.step()
    assert len(set(seen)) == 4 and made.controller.steps == 3
    assert metrics["gac/sigma_s2"] > 0


def signals(seed):
    batch = micro_batch(seed=seed)
    tokens = tokens_of(batch)
    return gk.signals_from_logprobs(batch["logprob"].detach(), tokens, gk.HybridObjective(aggregation="token-mean"))


def test_trinity_calls_it():
    """Through TrinityPolicyLoss, as Trinity's workers build it from the settings, with its entropy and KL terms."""
    pytest.importorskip("verl", reason="Trinity's trainer needs verl")
    losses = pytest.importorskip("trinity.trainer.verl.losses", reason="an import of Trinity's trainer is missing")
    from verl.utils import tensordict_utils as tu

    batch = micro_batch()
    attention = torch.cat([torch.ones(ROWS, 2, dtype=torch.long), torch.ones(ROWS, LENGTH, dtype=torch.long)], dim=1)
    tensors = {name: value for name, value in batch.items() if name != "logprob"}
    tensors |= {
        "prompts": torch.zeros(ROWS, 2, dtype=torch.long), "responses": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "attention_mask": attention, "ref_log_prob": batch["old_log_probs"] - 0.1,
        "response_mask": batch["response_mask"].long(),
    }  # fmt: skip
    # verl's log-probs stand one place earlier; the place before each response is the last of its prompt
    flat = torch.zeros(ROWS, 2 + LENGTH, dtype=torch.float64)
    flat[:, 1:-1] = batch["logprob"].detach()
    flat = flat.reshape(-1).requires_grad_()

    def through(policy, arguments):
        config = SimpleNamespace(
            policy_loss_fn=policy, policy_loss_fn_args={**SIZES, **arguments}, loss_agg_mode="token-mean",
            kl_loss_fn="k2", kl_loss_fn_args={"kl_coef": 0.1}, entropy_loss_fn="mix",
            entropy_loss_fn_args={"entropy_coef": 0.1},
        )  # fmt: skip
        flat.grad = None
        output = {"log_probs": flat, "entropy": flat.detach().abs()}
        made = losses.build_trinity_loss(config)
        loss, metrics = made(output, tu.get_tensordict(dict(tensors)))
        loss.backward()
        return loss.detach(), flat.grad.clone(), metrics, made

    loss, gradient, metrics, made = through(PATH, {**GRPO, "mu": 0.3})
    their_loss, their_gradient, _, _ = through("mix_chord", {"mu_peak": 0.3, "mu_valley": 0.3, "clip_range": 0.2})
    torch.testing.assert_close(loss, their_loss, **EXACT)
    torch.testing.assert_close(gradient, their_gradient, **EXACT)
    assert metrics["actor/mu"] == 0.3 and type(made.policy_loss_fn).__name__ in repr(made)


def test_its_class_is_one_and_can_be_sent():
    made = loss_fn(mu=0.3)
    assert type(made) is integration.GACPolicyLossFn and POLICY_LOSS_FN.get(PATH) is integration.GACPolicyLossFn
    assert made.select_keys == ["old_log_probs", "response_mask", "advantages", "expert_mask", "step"]
    twin = pickle.loads(pickle.dumps(made))
    assert torch.equal(run(twin)[0], run(made)[0])
    defaults = integration.GACPolicyLossFn.default_args()
    assert loss_fn(**defaults).objective == gk.HybridObjective(aggregation="token-mean")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "dfpo"}, "objective must be one of"),
        ({"objective_args": {"gate": "tanh"}}, "gate"),
        ({"supervised": "gift"}, "weight must be one of"),
        ({"mu": 2.0}, "mu must be"),
        ({"mu": 0.5, "controller": {}}, "exclude each other"),
        ({"controller": {"estimator": "logit"}}, "estimator"),
        ({"controller": {"alpha": gk.KLTarget()}}, "KLTarget"),
        ({"loss_agg_mode": "mean"}, "aggregation must be one of"),
        ({"train_batch_size_usual": None}, "train_batch_size_usual must be a positive int"),
        ({"train_batch_size_expert": 1}, "at least ngpus_trainer = 2"),
    ],
)
def test_what_is_not_supported_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        loss_fn(**arguments)


def test_settings_may_be_omegaconfs():
    """As they are where a configuration file was read."""
    from omegaconf import OmegaConf

    written = {
        "objective_args": {"gate": "erf", "tau_pos": 2.0},
        "controller": {"prior": {"warmup": 3, "decay": 4}, "alpha": 0.4},
    }
    made = loss_fn(**OmegaConf.create(written))
    assert made.objective.policy == gk.SAPO("erf", 2.0)
    assert made.controller_config == gk.ControllerConfig(prior=gk.CosinePrior(3, 4), alpha=0.4)


def test_steps_of_one_micro_batch_must_agree():
    made, inputs = loss_fn(), micro_batch()
    inputs["step"][2] = 8
    with pytest.raises(ValueError, match="step must be the same"):
        made(**inputs)


def test_check(monkeypatch):
    assert integration.check().status == "ok"
    monkeypatch.setattr(integration, "version_of", lambda name: "0.7.0")
    with pytest.raises(ImportError, match=r">= 0\.6, < 0\.7; found 0\.7\.0"):
        integration._check_version()
    monkeypatch.setattr(integration, "version_of", lambda name: None)
    with pytest.raises(ImportError, match=r"gac-kernels\[trinity\]"):
        integration._check_version()


def test_the_example_learns(capsys):
    pytest.importorskip("trinity.trainer.verl.losses", reason="an import of Trinity's trainer is missing")
    path = Path(__file__).parents[2] / "examples" / "trinity_policy_loss.py"
    runpy.run_path(str(path))["main"]()
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    rewards, mus = ([float(row[index]) for row in rows] for index in (3, 5))
    assert len(rows) == 5 and rewards[-1] > rewards[0] + 0.2 and len(set(mus)) == 5


def test_micro_batches_of_a_step_weigh_as_their_rows():
    """With sequence means, the micro-batches of a step add up to the step's means, times Trinity's count of them."""
    made = loss_fn(mu=0.3, loss_agg_mode="seq-mean-token-mean", ngpus_trainer=1)
    parts = [micro_batch(seed=seed) for seed in range(4)]
    total = sum(float(made(**part)[0]) for part in parts)
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    batch = tokens_of(whole)
    objective = gk.HybridObjective(supervised_aggregation="seq-mean-token-mean")
    expected = 4 * float(gk.hybrid_loss(whole["logprob"].detach(), batch, objective, 0.3).loss)
    assert total == pytest.approx(expected, rel=1e-6)
