"""CausalLMLoss and the model that calls it, or does not: evaluation, mixtures of experts, losses of a model's own."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")

import transformers

import gac_kernels as gk
from gac_kernels.integrations._calling_model import calls_loss_function
from gac_kernels.integrations.transformers import CausalLMLoss, attach

V = 23
NLL = gk.HybridObjective(supervised=gk.NLL("none"))
TINY = {
    "vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**TINY))


@pytest.fixture
def batch():
    ids = torch.randint(V, (4, 7), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.masked_fill(torch.arange(7) < torch.arange(4)[:, None], -100)}


def controller(mu):
    made = gk.GuidedAdaptiveController(gk.ControllerConfig(init_mu=mu))
    made.observe = lambda signals: pytest.fail("evaluation was observed")
    return made


@pytest.mark.parametrize("gradient", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("mu", [None, 0.0, 0.3, "controller"])
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)])
def test_evaluation_of_demonstrations_is_their_loss_whatever_mu(model, batch, mu, inplace, gradient, items):
    model.eval()
    own = {} if items is None else {"num_items_in_batch": items}
    stock = model(**batch, **own)
    given = {"controller": controller(0.2)} if mu == "controller" else {"mu": mu}
    model.loss_function = CausalLMLoss(NLL, inplace=inplace, **given)
    with torch.set_grad_enabled(gradient):
        out = model(**batch, **own)
    torch.testing.assert_close(out.loss, stock.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close(model.loss_function.result.loss, stock.loss, rtol=2e-6, atol=0)
    assert torch.equal(out.logits, stock.logits)


def test_evaluation_of_rollouts_too_is_the_sum_of_both_branches(model, batch):
    rest = {"advantages": torch.tensor([0.0, 1.0, -1.0, 0.5]), "is_expert": torch.tensor([True, False, False, False])}
    seen = []
    for mu in (0.1, 0.8):
        model.eval().loss_function = CausalLMLoss(gk.HybridObjective(gk.GRPO(), gk.NLL("none")), mu=mu)
        seen.append(model(**batch, **rest).loss.detach())
        result = model.loss_function.result
        torch.testing.assert_close(seen[-1], result.policy_loss + result.supervised_loss)
        assert result.supervised_loss > 1
    assert seen[0] == seen[1]


def test_a_frozen_mode_without_gradient_is_evaluation(model, batch):
    model.loss_function = CausalLMLoss(NLL, mu=0.25)
    loss = model(**batch).loss
    with torch.no_grad():
        torch.testing.assert_close(4 * loss, model(**batch).loss)


def test_backward_from_evaluation_says_that_mu_is_missing(model, batch):
    model.eval().loss_function = CausalLMLoss(NLL, mu=0.25)
    with pytest.raises(RuntimeError, match=r"leaves mu out: the model is in eval mode. Call model.train\(\)"):
        model(**batch).loss.backward()
    unscaled, scaled = (
        torch.autograd.grad(model(**batch, evaluation=value).loss, model.lm_head.weight)[0] for value in (True, False)
    )
    torch.testing.assert_close(unscaled / 4, scaled)
    model.loss_function = CausalLMLoss(NLL, mu=0.25, evaluation=False)
    assert torch.equal(torch.autograd.grad(model(**batch).loss, model.lm_head.weight)[0], scaled)
    model.loss_function = CausalLMLoss(NLL)  # without a mu the two are one
    model(**batch).loss.backward()
    with pytest.raises(TypeError, match="evaluation must be True, False or None, got int"):
        CausalLMLoss(NLL, evaluation=1)
    with pytest.raises(TypeError, match="'evaluations' is not an argument of this loss: 'evaluation' is"):
        model(**batch, evaluations=True)


def test_training_is_scaled_by_mu(model, batch):
    """Neither a wrapper around the loss nor one around the model changes what mode is seen."""
    model.loss_function = CausalLMLoss(NLL, mu=0.25)
    loss = model(**batch).loss
    inner = model.loss_function
    model.loss_function = lambda *args, **kwargs: inner(*args, **kwargs)
    assert torch.equal(torch.nn.DataParallel(model, device_ids=None).module(**batch).loss, loss)
    torch.testing.assert_close(4 * loss, model.eval()(**batch).loss)


@pytest.mark.parametrize("kind", ["Mixtral", "Qwen3Moe"])
@pytest.mark.parametrize("inplace", [False, True])
def test_the_loss_that_a_mixture_of_experts_adds_is_not_ours(kind, inplace, batch):
    more = {"Mixtral": {"num_local_experts": 4}, "Qwen3Moe": {"num_experts": 4, "moe_intermediate_size": 16}}[kind]
    config = getattr(transformers, f"{kind}Config")(
        **TINY, **more, num_experts_per_tok=2, output_router_logits=True, router_aux_loss_coef=0.5
    )
    torch.manual_seed(0)
    net = getattr(transformers, f"{kind}ForCausalLM")(config)
    stock = net(**batch)
    stock.loss.backward()
    wanted = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    attach(net, CausalLMLoss(NLL, inplace=inplace))
    out = net(**batch)
    out.loss.backward()
    torch.testing.assert_close(out.loss, stock.loss, rtol=2e-6, atol=0)
    torch.testing.assert_close([p.grad for p in net.parameters()], wanted, rtol=1e-4, atol=1e-7)
    plain = cross_entropy(stock.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(net.loss_function.result.loss, plain.detach(), rtol=2e-6, atol=0)


def test_the_result_is_not_the_memory_of_the_loss():
    logits = torch.randn(2, 5, V, requires_grad=True)
    for inplace, grad in ((False, True), (True, True), (False, False)):
        made = CausalLMLoss(NLL, inplace=inplace)
        with torch.set_grad_enabled(grad):
            loss = made(logits * 1.0, torch.randint(V, (2, 5)))
        before = made.result.loss.clone()
        with torch.no_grad():
            loss += 1.0
        assert torch.equal(made.result.loss, before)


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("Qwen2ForCausalLM", True), ("LlamaForCausalLM", True), ("GPT2LMHeadModel", True),
        ("MixtralForCausalLM", True), ("XLNetLMHeadModel", False), ("BartForCausalLM", False),
        ("MBartForCausalLM", False), ("WhisperForConditionalGeneration", False), ("WhisperForCausalLM", False),
        ("T5ForConditionalGeneration", False), ("XLMWithLMHeadModel", False),
    ],
)  # fmt: skip
def test_models_that_never_call_a_loss_function_are_known(name, calls):
    assert calls_loss_function(getattr(transformers, name)) is calls


def test_attach_refuses_models_with_a_loss_of_their_own(batch):
    xlnet = transformers.XLNetLMHeadModel(
        transformers.XLNetConfig(vocab_size=V, d_model=16, n_layer=1, n_head=2, d_inner=16)
    )
    with pytest.raises(ValueError, match="XLNetLMHeadModel computes a loss by itself"):
        attach(xlnet, CausalLMLoss())
    xlnet.loss_function = unused = CausalLMLoss()
    xlnet(**batch)
    with pytest.warns(UserWarning, match=r"CausalLMLoss has not been called.*XLNet, Whisper, Bart"):
        assert unused.result is None
    small = {k: TINY[k] for k in ("vocab_size", "hidden_size", "intermediate_size")}
    bert = transformers.ModernBertForMaskedLM(
        transformers.ModernBertConfig(
            **small, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            cls_token_id=1, sep_token_id=2,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="ModernBertForMaskedLM has loss_type 'ForMaskedLM'"):
        attach(bert, CausalLMLoss())


def test_attach_reaches_into_what_wraps_a_model(model, batch, recwarn):
    loss = CausalLMLoss(NLL)
    wrapped = torch.nn.Sequential(model)
    assert attach(wrapped, loss) is loss is model.loss_function
    assert torch.equal(model(**batch).loss, loss.result.loss) and not recwarn
    with pytest.raises(TypeError, match="loss must be a CausalLMLoss, got function"):
        attach(model, cross_entropy)
    with pytest.raises(TypeError, match="model must hold a model of transformers, got Linear without one"):
        attach(torch.nn.Linear(2, 2), loss)
    with pytest.raises(TypeError, match="model must be a model of transformers, got str"):
        attach("Qwen2", loss)


def test_attach_reaches_into_peft(model, batch):
    peft = pytest.importorskip("peft")
    lora = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    loss = attach(lora, CausalLMLoss(NLL))
    assert torch.equal(lora(**batch).loss, loss.result.loss)


def test_compiled_losses_follow_whether_gradients_are_on():
    logits, labels = torch.randn(2, 5, V), torch.randint(V, (2, 5))
    made = CausalLMLoss(NLL, mu=0.25)
    run = torch.compile(lambda x: made(x, labels), backend="eager", fullgraph=True)
    trained = run(logits.requires_grad_())
    with torch.no_grad():
        torch.testing.assert_close(4 * trained, run(logits))


def test_a_compiled_loss_is_observed_too():
    controller = gk.GuidedAdaptiveController()
    made = CausalLMLoss(NLL, controller=controller)
    logits, labels = torch.randn(2, 5, V, requires_grad=True), torch.randint(V, (2, 5))
    torch.compile(lambda x: made(x, labels), backend="eager")(logits).backward()
    controller.step()
    assert controller.metrics()["gac/sigma_s2"] > 0
