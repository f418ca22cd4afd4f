"""CausalLMLoss as a model's loss_function, against transformers' own and against the plain functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import log_softmax

pytest.importorskip("transformers")

from transformers.loss.loss_utils import ForCausalLMLoss

import gac_kernels as gk
from gac_kernels.integrations.transformers import CausalLMLoss, check

B, T, V = 3, 7, 19
NLL = gk.HybridObjective(supervised=gk.NLL("none"))
HYBRID = gk.HybridObjective(gk.GRPO(), gk.NLL("phi"), kl_coef=0.1)


def labelled(dtype=torch.float32, ignore=-100):
    torch.manual_seed(0)
    logits = torch.randn(B, T, V).to(dtype)
    labels = torch.randint(0, V, (B, T))
    labels[0, :3] = labels[1, 5:] = ignore
    return logits, labels


def both(call, logits):
    """Value and gradient."""
    leaf = logits.clone().requires_grad_()
    loss = call(leaf)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_items_in_batch": 40},
        {"num_items_in_batch": torch.tensor(40)},
        {"num_items_in_batch": torch.tensor([40])},
        {"ignore_index": -1},
        {"ignore_index": 3},
        {"vocab_size": V, "position_ids": torch.arange(T)},
    ],
    ids=["own count", "int", "tensor", "replica", "ignore", "ignored token", "more keywords"],
)
@pytest.mark.parametrize("shifted", [False, True])
def test_nll_is_transformers_own(given, shifted, dtype):
    logits, labels = labelled(dtype, given.get("ignore_index", -100))
    given = {"vocab_size": V, **given}
    where = {"labels": None, "shift_labels": labels} if shifted else {"labels": labels}
    ours, theirs = (
        both(lambda x, f=f: f(logits=x, **where, **given), logits) for f in (CausalLMLoss(NLL), ForCausalLMLoss)
    )
    theirs = theirs[0].reshape(()), theirs[1]
    assert ours[0].dtype == torch.float32 and ours[1].dtype == dtype
    torch.testing.assert_close(ours[0], theirs[0], rtol=2e-6, atol=0)
    torch.testing.assert_close(ours[1], theirs[1])


def test_phi_weighs_each_token():
    logits, labels = labelled()
    loss, gradient = both(lambda x: CausalLMLoss()(x, labels), logits)
    leaf = logits.double().requires_grad_()
    logp = log_softmax(leaf[:, :-1], -1).gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    live, p = labels[:, 1:] != -100, logp.detach().exp()
    wanted = -(p * (1 - p) * logp)[live].mean()
    wanted.backward()
    torch.testing.assert_close(loss.double(), wanted.detach(), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), leaf.grad, rtol=1e-5, atol=1e-8)


def test_the_last_row_of_logits_gets_no_gradient_and_may_be_nan():
    logits, labels = labelled()
    logits[:, -1] = float("nan")
    loss, gradient = both(lambda x: CausalLMLoss()(x, labels), logits)
    assert loss.isfinite() and not gradient[:, -1].any() and gradient[:, :-1].isfinite().all()


def test_in_place_is_the_same_gradient_over_the_logits():
    logits, labels = labelled()
    loss, gradient = both(lambda x: CausalLMLoss()(x, labels), logits)
    leaf = logits.clone().requires_grad_()
    made = leaf * 1.0
    written = CausalLMLoss(inplace=True)(made, labels)
    written.backward()
    assert torch.equal(written.detach(), loss) and torch.equal(leaf.grad, gradient)
    assert torch.equal(made.detach(), gradient)


def tiny(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples"))
    monkeypatch.delitem(sys.modules, "_tiny", raising=False)
    from _tiny import tiny_model

    return tiny_model(["abcdefgh", "="])


@pytest.mark.parametrize("per_token", [False, True])
def test_a_hybrid_batch_comes_through_the_models_call(monkeypatch, per_token):
    model, _ = tiny(monkeypatch)
    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (4, 6))
    labels = torch.where(torch.arange(6) > 2, ids, -100)
    is_expert = torch.tensor([False, True, False, True])
    old, ref = (-3 + 0.1 * torch.randn(4, 6) for _ in range(2))
    advantages = torch.randn(4, 6) if per_token else torch.randn(4)
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1))
    model.loss_function = CausalLMLoss(HYBRID, controller=controller)
    out = model(
        input_ids=ids, labels=labels, advantages=advantages, is_expert=is_expert, old_logprobs=old, ref_logprobs=ref,
        num_items_in_batch=50, policy_items=2.0, supervised_items=torch.tensor(9),
    )  # fmt: skip
    along = slice(3, None)  # labels 3, 4, 5 are predicted by rows 2, 3, 4
    batch = gk.TokenBatch.from_padded(
        ids[:, along], torch.ones(4, 3), is_expert_S=is_expert,
        advantages=advantages[:, along] if per_token else advantages, old_logprobs=old[:, along],
        ref_logprobs=ref[:, along],
    )  # fmt: skip
    logp = log_softmax(out.logits[:, 2:-1], -1).gather(-1, ids[:, along, None])[..., 0]
    wanted = gk.hybrid_loss(
        logp, batch, HYBRID, controller.mu, denominators=gk.Denominators(policy=2.0, supervised=9.0)
    )
    torch.testing.assert_close(out.loss, wanted.loss, rtol=1e-5, atol=0)
    result = model.loss_function.result
    torch.testing.assert_close(result.policy_loss, wanted.policy_loss, rtol=1e-5, atol=1e-8)
    assert not result.loss.requires_grad and torch.equal(result.loss, out.loss)
    before = float(controller.mu)
    controller.step()
    assert float(controller.metrics()["gac/sigma_r2"]) > 0 and float(controller.mu) != before


def test_the_controller_does_not_see_evaluation(monkeypatch):
    logits, labels = labelled()
    controller = gk.GuidedAdaptiveController()
    seen = []
    monkeypatch.setattr(controller, "observe", seen.append)
    loss = CausalLMLoss(HYBRID, controller=controller)
    given = {"advantages": torch.randn(B), "ref_logprobs": torch.zeros(B, T)}
    loss(logits, labels, **given)
    assert not seen
    loss(logits.requires_grad_(), labels, **given)
    assert len(seen) == 1 and seen[0] is loss.result.signals


def test_trainer_with_our_nll_is_stock(monkeypatch, tmp_path):
    pytest.importorskip("accelerate")
    import transformers.trainer
    from transformers import Trainer, TrainingArguments

    monkeypatch.setattr(transformers.trainer, "round", lambda value, digits=None: value, raising=False)
    curves = []
    for loss in (None, CausalLMLoss(NLL)):
        model, _ = tiny(monkeypatch)
        if loss is not None:
            model.loss_function = loss
        ids = torch.randint(0, model.config.vocab_size, (24, 8), generator=torch.Generator().manual_seed(1))
        labels = ids.masked_fill(torch.arange(8) < torch.arange(24)[:, None] % 6, -100)  # as many tokens as it comes
        data = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
        arguments = TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=4,
            logging_steps=1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        run = Trainer(model=model, args=arguments, train_dataset=data)
        run.train()
        curves.append([(row["loss"], row["grad_norm"]) for row in run.state.log_history if "grad_norm" in row])
    assert len(curves[0]) == 4 and curves[0][0][0] > 1.0
    torch.testing.assert_close(torch.tensor(curves[1]), torch.tensor(curves[0]), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "given", "error", "message"),
    [
        ({"objective": gk.NLL()}, {}, TypeError, "objective must be a HybridObjective, got NLL"),
        ({"objective": gk.HybridObjective(supervised=gk.GIFT())}, {}, ValueError, "GIFT needs a base model"),
        (
            {"controller": gk.GuidedAdaptiveController(gk.ControllerConfig(estimator="hidden"))},
            {},
            ValueError,
            "estimator must be 'coefficient' or 'logit'.*got 'hidden'",
        ),
        ({}, {"labels": None}, ValueError, "labels or shift_labels must be given"),
        ({}, {"vocab_size": V + 1}, ValueError, f"vocab_size must be the number of logits, {V}, got {V + 1}"),
        ({}, {"labels": torch.zeros(B, T + 1, dtype=torch.long)}, ValueError, "logits must have shape"),
        ({"mu": 1.5}, {}, ValueError, "mu"),
        ({"mu": 0.5}, {"advantages": torch.ones(B + 1)}, ValueError, r"advantages must have shape \(3,\)"),
        (
            {"mu": 0.5},
            {"advantages": torch.ones(B), "num_items_in_batch": 9},
            ValueError,
            "policy_items and supervised_items must",
        ),
        (
            {"objective": gk.HybridObjective(supervised_aggregation="seq-mean-token-mean")},
            {"num_items_in_batch": 9},
            ValueError,
            "supervised_aggregation must be 'token-mean' with num_items_in_batch",
        ),
    ],
)
def test_what_does_not_fit_raises(options, given, error, message):
    logits, labels = labelled()
    with pytest.raises(error, match=message):
        CausalLMLoss(**options)(**{"logits": logits, "labels": labels, **given})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("is_expert_S", "'is_expert_S' is not an argument of this loss: 'is_expert' is"),
        ("old_logprob", "'old_logprob' is not an argument of this loss: 'old_logprobs' is"),
        ("mu", "'mu' is an argument of CausalLMLoss itself"),
    ],
)
def test_a_misspelt_keyword_is_not_swallowed(name, says):
    logits, labels = labelled()
    loss = CausalLMLoss(mu=0.5)
    with pytest.raises(TypeError, match=says):
        loss(logits, labels, **{name: 1.0})
    loss(logits, labels, cache_position=None, use_cache=False, output_attentions=True, attention_mask=None)


def test_advantages_need_a_mu():
    logits, labels = labelled()
    given = {"advantages": torch.ones(len(labels))}
    with pytest.raises(ValueError, match="mu or controller must be given to CausalLMLoss where advantages are"):
        CausalLMLoss()(logits, labels, **given)
    assert CausalLMLoss(mu=1.0)(logits, labels, **given) == 0 != CausalLMLoss(mu=0.5)(logits, labels, **given)
    assert CausalLMLoss().mu == 1.0


def test_check_of_the_installed_transformers():
    assert check().status == "ok", check()
