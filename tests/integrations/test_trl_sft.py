"""TRL's SFTTrainer with our losses, against stock TRL and against plain formulas on the model's logits."""

from __future__ import annotations

import copy
import runpy
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")
pytest.importorskip("datasets")

from trl_support import assert_same_curves, curve, exact_logs, sft_trainer  # noqa: F401

import gac_kernels as gk
from gac_kernels.integrations import _trl_head
from gac_kernels.integrations.trl import attach_sft

METRICS = ("entropy", "mean_token_accuracy", "num_tokens")


def metrics(run):
    return [[row[name] for name in METRICS] for row in run.state.log_history if "grad_norm" in row]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"completion_only_loss": False},
        {"messages": True, "assistant_only_loss": True},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 32},
        {"gradient_checkpointing": True},
        {"average_tokens_across_devices": False},
        {"peft": True},
    ],
    ids=["completions", "all tokens", "assistant", "padding-free", "packed", "checkpointing", "own counts", "peft"],
)
@pytest.mark.parametrize("objective", [None, gk.NLL("none")], ids=["head", "nll"])
def test_nll_is_stock_trl(tmp_path, settings, objective):
    """Losses, gradient norms and TRL's three metrics over five steps of two micro-batches of unlike lengths."""
    settings = settings | {"optim": "sgd", "learning_rate": 0.1}
    stock, ours = sft_trainer(tmp_path / "stock", **settings), sft_trainer(tmp_path / "ours", **settings)
    attach_sft(ours, objective=objective)
    stock.train(), ours.train()
    assert_same_curves(curve(ours), curve(stock))
    torch.testing.assert_close(torch.tensor(metrics(ours)), torch.tensor(metrics(stock)), rtol=1e-6, atol=1e-6)
    assert 0 < max(row[1] for row in metrics(stock)) < 1  # an accuracy that says something


def test_dft_with_our_head_is_stock_trl(tmp_path):
    stock, ours = (sft_trainer(tmp_path / name, loss_type="dft") for name in ("stock", "ours"))
    attach_sft(ours, objective=None)
    stock.train(), ours.train()
    assert_same_curves(curve(ours), curve(stock))


def rows_of(run, inputs):
    """Log-probs of the model's own logits in float64 ``(N, V)``, and targets: of the tokens that count."""
    model_inputs = {name: value for name, value in inputs.items() if name not in ("labels", "num_items_in_batch")}
    logits = run.accelerator.unwrap_model(run.model)(**model_inputs).logits
    labels = inputs["labels"][:, 1:]
    return logits[:, :-1][labels != -100].double().log_softmax(-1), labels[labels != -100]


def terms_of(objective, logprobs_NV, targets_N, base_NV):
    logp = logprobs_NV.gather(1, targets_N[:, None])[:, 0]
    if isinstance(objective, gk.NLL):
        return -(logp.exp() * (1 - logp.exp())).detach() * logp
    tilted = base_NV + objective.beta * torch.nn.functional.one_hot(targets_N, base_NV.shape[1])
    return -(tilted.softmax(-1) * logprobs_NV).sum(-1)


@pytest.mark.parametrize("objective", [gk.NLL("phi"), gk.GIFT(beta=2.0)], ids=["phi", "gift"])
@pytest.mark.parametrize("layout", [{}, {"padding_free": True, "max_length": None}, {"peft": True}], ids=str)
def test_a_step_of_two_micro_batches_is_the_formula(tmp_path, objective, layout):
    """The gradient that reaches the optimizer against that of one formula over all of the step's tokens. The base
    model is one of other weights (with PEFT the model without its adapter, which then is moved away from it)."""
    made = sft_trainer(tmp_path, max_steps=1, learning_rate=0.0, max_grad_norm=0.0, **layout)
    gift = isinstance(objective, gk.GIFT)
    peft = "peft" in layout
    base = None
    if gift and not peft:
        base = copy.deepcopy(made.model)
        base.__dict__.pop("forward")
        torch.nn.init.normal_(base.get_input_embeddings().weight, std=0.5)
    attach_sft(made, objective=objective, base_model=base)
    if peft:
        for name, value in made.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(value, std=0.3)
    seen, gradients = [], {}
    inner = made.compute_loss

    def watched(model, inputs, *args, **kwargs):
        seen.append(dict(inputs))
        return inner(model, inputs, *args, **kwargs)

    def keep(optimizer, *_):
        gradients.update({n: p.grad.clone() for n, p in made.model.named_parameters() if p.grad is not None})

    made.compute_loss = watched
    made.create_optimizer()
    made.optimizer.register_step_pre_hook(keep)
    made.train()
    assert len(seen) == 2
    made.model.zero_grad()
    made.model.train()
    total, count = 0.0, 0
    for inputs in seen:
        logprobs, targets = rows_of(made, inputs)
        with torch.no_grad():
            base_NV = None
            if gift and peft:
                with made.model.disable_adapter():
                    base_NV = rows_of(made, inputs)[0]
            elif gift:
                labels = inputs["labels"][:, 1:]
                rest = {name: value for name, value in inputs.items() if name != "labels"}
                base_NV = base(**rest).logits[:, :-1][labels != -100].double().log_softmax(-1)
        total, count = total + terms_of(objective, logprobs, targets, base_NV).sum(), count + len(targets)
    loss = total / count
    loss.backward()
    (row,) = [row for row in made.state.log_history if "grad_norm" in row]
    assert row["loss"] == pytest.approx(loss.item(), rel=1e-6)
    expected = {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys() and max(float(g.abs().max()) for g in expected.values()) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(gradients[name], value, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("objective", [gk.NLL("none"), gk.NLL("phi"), gk.GIFT()], ids=["none", "phi", "gift"])
def test_under_autocast_the_first_loss_is_float32s_within_bfloat16(tmp_path, objective):
    exact, rounded = (sft_trainer(tmp_path / str(bf16), max_steps=1, bf16=bf16) for bf16 in (False, True))
    for made in (exact, rounded):
        attach_sft(made, objective=objective)
        made.train()
    ((loss, norm),), ((loss16, norm16),) = curve(exact), curve(rounded)
    assert loss16 == pytest.approx(loss, rel=2**-8) and norm16 == pytest.approx(norm, rel=2**-5)
    assert loss16 != loss


def test_gift_compares_with_the_model_as_it_was(tmp_path):
    """The copy keeps the first weights while the trainer's move: its log-probs are those from before."""
    made = sft_trainer(tmp_path, learning_rate=1e-2)
    before = copy.deepcopy(made.model.state_dict())
    attached = attach_sft(made, objective=gk.GIFT())
    made.train()
    assert not attached.base_model.training
    for name, value in attached.base_model.state_dict().items():
        assert torch.equal(value, before[name]), name
    moved = [not torch.equal(value, before[name]) for name, value in made.model.state_dict().items()]
    assert any(moved)
    assert not any(value.requires_grad for value in attached.base_model.parameters())
    losses = [loss for loss, _ in curve(made)]
    assert losses[-1] < losses[0]


def test_evaluation_keeps_trls_loss(tmp_path):
    stock, ours = sft_trainer(tmp_path / "stock", evaluate=True), sft_trainer(tmp_path / "ours", evaluate=True)
    attach_sft(ours, objective=gk.NLL("phi"))
    theirs, mine = stock.evaluate(), ours.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert mine[name] == pytest.approx(theirs[name], rel=1e-6)


def test_a_batch_without_a_token_trains_nothing(tmp_path):
    made = sft_trainer(tmp_path, max_steps=1)
    attach_sft(made)
    inputs = next(iter(made.get_train_dataloader()))
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    made.model.train()
    loss = made.compute_loss(made.model, inputs, num_items_in_batch=torch.tensor(7))
    loss.backward()
    assert loss.item() == 0
    assert all(not value.grad.any() for value in made.model.parameters() if value.grad is not None)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0], ids=["flat", "peaked", "sharp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_top1_is_the_argmax(scale, dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(400, 16, dtype=dtype) * scale, torch.randn(50, 16, dtype=dtype)
    bias = torch.randn(50, dtype=dtype)
    logits = hidden.double() @ weight.double().t() + bias.double()
    targets = torch.where(torch.rand(400) < 0.5, logits.argmax(-1), torch.randint(50, (400,)))
    outputs = ("log_probs", "is_top1")
    *_, top1 = _trl_head.Head.apply(hidden, weight, bias, targets, 0.7, 8, 30.0, 0.5, outputs=outputs)
    assert torch.equal(top1, logits.argmax(-1) == targets)
    assert 100 < int(top1.sum()) < 400


@pytest.mark.parametrize(
    ("settings", "options", "error", "message"),
    [
        ({"loss_type": "dft"}, {}, ValueError, "loss_type must be 'nll'.*got 'dft'"),
        ({"label_smoothing_factor": 0.1}, {}, ValueError, "label_smoothing_factor.*got 0.1"),
        ({}, {"objective": gk.SAPO()}, TypeError, "objective must be an NLL, a GIFT or None, got SAPO"),
        ({}, {"base_model": torch.nn.Linear(2, 2)}, ValueError, "base_model goes with objective = GIFT"),
        ({}, {"objective": gk.GIFT(), "base_model": torch.nn.Linear(2, 2)}, TypeError, "base_model.*got Linear"),
    ],
    ids=["dft", "smoothing", "objective", "base without gift", "base"],
)
def test_what_is_not_supported_raises(tmp_path, settings, options, error, message):
    made = sft_trainer(tmp_path, **settings)
    with pytest.raises(error, match=message):
        attach_sft(made, **options)


def test_base_model_must_be_another_model_of_the_same_vocabulary(tmp_path):
    made = sft_trainer(tmp_path)
    with pytest.raises(ValueError, match="base_model must not be the model in training"):
        attach_sft(made, objective=gk.GIFT(), base_model=made.model)
    small = copy.deepcopy(made.model)
    small.__dict__.pop("forward")
    small.resize_token_embeddings(8)
    with pytest.raises(ValueError, match="base_model must have the trainer's vocabulary of 12 tokens, got 8"):
        attach_sft(made, objective=gk.GIFT(), base_model=small)


def test_only_an_sft_trainer_and_only_once(tmp_path):
    with pytest.raises(TypeError, match=r"trainer must be a trl.SFTTrainer, got object"):
        attach_sft(object())
    made = sft_trainer(tmp_path)
    attach_sft(made)
    with pytest.raises(ValueError, match="attached already"):
        attach_sft(made)


def test_example_learns_by_each_objective(capsys):
    runpy.run_path(str(Path(__file__).parents[2] / "examples" / "trl_sft_phi.py"), run_name="__main__")
    begin, *others = [line for line in capsys.readouterr().out.splitlines() if "held-out loss" in line]
    assert [line.split()[3] for line in others] == ["NLL", "NLL-phi", "GIFT"]
    losses = [float(line.split("held-out loss")[1].split()[0]) for line in (begin, *others)]
    assert max(losses[1:]) < 0.8 * losses[0]
