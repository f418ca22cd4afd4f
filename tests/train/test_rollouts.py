"""Completions and how they become a batch: every row must mean what it would mean alone."""

from __future__ import annotations

import pytest
import torch
from small_runs import small
from transformers import GenerationConfig

import gac_kernels as gk
from gac_kernels.train.model import build_model, stop_tokens, tiny_model
from gac_kernels.train.policy import Head, Policy, head_of
from gac_kernels.train.rollouts import (
    Answered,
    Codec,
    Sampling,
    assemble,
    generate,
)
from gac_kernels.train.tasks import Example, build_task
from gac_kernels.train.tokenizer import character_tokenizer


@pytest.fixture(scope="module")
def policy():
    config = small(dtype="float64")
    model, tokenizer = build_model(config, build_task(config))
    with torch.no_grad():  # far from uniform, so that a wrong position or mask shows
        for parameter in model.parameters():
            parameter.mul_(3.0)
    return Policy(model, head_of(model)), Codec(tokenizer, stop_tokens(model, tokenizer))


PROMPTS = ["11+22=", "9", "5+5=#"]


def rows(codec, **changes):
    """Two groups of three rollouts with prompts of unequal length, two demonstrations, two micro-batches."""
    answered = [
        Answered(group, codec.prompt(PROMPTS[group]), [*codec.prompt("12345"[: 1 + i + group]), 1], float(i == group))
        for group in (0, 1)
        for i in range(3)
    ]
    demonstrations = [(slot, Example(PROMPTS[2], "10", "1 #10" + "0" * slot)) for slot in (0, 1)]
    settings = {"group_size": 3, "micro_batches": 2, "baseline": "mean", "scale": "group", "device": "cpu"}
    return answered, demonstrations, assemble(codec, answered, demonstrations, **{**settings, **changes})


def test_rows_keep_their_text_mask_and_kind_in_micro_batch_order(policy):
    _, codec = policy
    answered, demonstrations, batch = rows(codec)
    wanted = [(a.group, a.prompt, a.response, False) for a in answered]
    wanted += [(s, codec.prompt(e.prompt), codec.response(e.demonstration), True) for s, e in demonstrations]
    wanted = [row for slot in (0, 1) for row in wanted if row[0] == slot]
    width = batch.prompt_mask.shape[1]
    for i, (slot, prompt, response, expert) in enumerate(wanted):
        assert batch.input_ids[i, :width][batch.prompt_mask[i]].tolist() == prompt
        assert batch.prompt_mask[i].tolist() == sorted(batch.prompt_mask[i].tolist())  # padding stands left
        assert batch.targets[i][batch.response_mask[i]].tolist() == response
        assert batch.response_mask[i, : len(response)].all()
        assert (batch.is_expert[i].item(), batch.micro[i].item()) == (expert, slot)
    rewards = torch.tensor([a.reward for a in answered])
    advantages = gk.group_advantages(rewards, 3)
    torch.testing.assert_close(batch.advantages[~batch.is_expert], advantages, rtol=0, atol=0)
    assert batch.advantages[batch.is_expert].eq(0).all()


def test_micro_batches_hold_whole_groups_and_their_counts_add_up(policy):
    _, codec = policy
    _, _, batch = rows(codec)
    parts = batch.micro_batches()
    assert [part.groups.tolist() for part in parts] == [[0, 0, 0, -1], [1, 1, 1, -1]]
    for expert in (False, True):
        for aggregation in ("token-mean", "seq-mean-token-mean"):
            assert sum(p.count(aggregation, expert=expert) for p in parts) == batch.count(aggregation, expert=expert)
    assert batch.count("token-mean", expert=False) == 2 + 3 + 4 + 3 + 4 + 5
    assert batch.count("seq-mean-token-sum", expert=True) == 2


@pytest.mark.parametrize("from_logits", [False, True], ids=["hidden", "logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_each_row_alone_at_its_own_temperature(policy, temperature, from_logits):
    policy, codec = policy
    _, _, batch = rows(codec)
    model, policy = policy.model, Policy(policy.model, None if from_logits else policy.head)
    assert from_logits or policy.head is not None
    loss, out = policy(batch, temperature, gk.HybridObjective(), 0.5)
    assert loss is out.loss and loss.requires_grad
    logprobs, entropy = out.logprobs, out.token_entropy
    assert policy(batch, temperature)[0].equal(logprobs)
    width = batch.prompt_mask.shape[1]
    for i in range(len(batch.is_expert)):
        prompt = batch.input_ids[i, :width][batch.prompt_mask[i]]
        response = batch.targets[i][batch.response_mask[i]]
        with torch.no_grad():
            logits = model(torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
        logps = (logits / (1.0 if batch.is_expert[i] else temperature)).log_softmax(-1)
        n = len(response)
        torch.testing.assert_close(logprobs[i, :n], logps.gather(-1, response[:, None])[:, 0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(entropy[i, :n], -(logps.exp() * logps).sum(-1), rtol=1e-9, atol=1e-9)
        assert logprobs[i, n:].eq(0).all()


def test_greedy_completions_are_the_models_argmax_whatever_stands_beside(policy):
    policy, codec = policy
    model = policy.model
    prompts = [codec.prompt(text) for text in PROMPTS]
    together = generate(policy, codec, prompts, Sampling(8, None))
    for prompt, completion in zip(prompts, together, strict=True):
        ids = list(prompt)
        for _ in range(8):
            with torch.no_grad():
                ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
            if ids[-1] in codec.stop_ids:
                break
        assert completion == ids[len(prompt) :]


def test_a_completion_ends_with_its_first_stop_token(policy):
    policy, codec = policy
    torch.manual_seed(0)
    completions = generate(policy, codec, [codec.prompt("1+1=")] * 64, Sampling(12, 3.0))
    ended = [c for c in completions if codec.tokenizer.eos_token_id in c]
    assert ended and len(ended) < 64 and {len(c) for c in completions if c not in ended} == {12}
    assert all(c.index(codec.tokenizer.eos_token_id) == len(c) - 1 for c in ended)


def test_sampling_ignores_the_habits_in_a_models_generation_config(policy):
    policy, codec = policy
    model = policy.model
    own = GenerationConfig(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=9.0, max_length=9)
    draws = []
    for settings in (model.generation_config, own):
        before, model.generation_config = model.generation_config, settings
        torch.manual_seed(1)
        draws.append(generate(policy, codec, [codec.prompt("1+1=")] * 8, Sampling(12, 1.5)))
        assert model.generation_config is settings
        model.generation_config = before
    assert draws[0] == draws[1] and len(set(map(tuple, draws[0]))) > 1


def test_sampling_reaches_the_whole_vocabulary():
    """transformers' own default would keep the 50 likeliest tokens only."""
    config = small()
    tokenizer = character_tokenizer([chr(33 + i) for i in range(90)])
    model = tiny_model(config, tokenizer).eval()
    torch.manual_seed(0)
    drawn = generate(Policy(model, None), Codec(tokenizer, [1]), [[5]] * 2000, Sampling(1, 1.0))
    assert {ids[0] for ids in drawn} == set(range(len(tokenizer)))


def test_every_stop_token_of_a_models_generation_config_counts(policy):
    policy, codec = policy
    model = policy.model
    before, model.generation_config = model.generation_config, GenerationConfig(eos_token_id=[5, 1])
    assert stop_tokens(model, codec.tokenizer) == [1, 5]
    model.generation_config = before


def test_further_micro_batches_hold_no_live_token(policy):
    policy, codec = policy
    *_, batch = rows(codec)
    parts = batch.micro_batches(at_least=4)
    assert len(parts) == 4 and all(not part.response_mask.any() for part in parts[2:])
    loss, out = policy(parts[3], 1.0, gk.HybridObjective(), 0.5)
    loss.backward()
    assert float(loss) == 0 and not out.signals.rows.any()
    assert all(p.grad is not None and not p.grad.any() for p in policy.parameters())
    policy.zero_grad()


def test_heads_are_understood_or_left_alone():
    """Scales and soft caps of the config are taken over; what gives other logits is not believed."""
    import transformers as t

    torch.manual_seed(0)
    cases = {
        "Qwen2": ({}, Head(1.0, None)),
        "Gemma2": ({"final_logit_softcapping": 5.0}, Head(1.0, 5.0)),
        "Granite": ({"logits_scaling": 8.0}, Head(0.125, None)),
        "Cohere": ({"logit_scale": 0.25}, Head(0.25, None)),
    }
    shape = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 4, "pad_token_id": 0}
    for name, (settings, want) in cases.items():
        model = getattr(t, f"{name}ForCausalLM")(getattr(t, f"{name}Config")(**shape, **settings)).eval()
        assert head_of(model) == want, name
        model.config.update({"logit_scale": 3.0})
        assert head_of(model) is None, name  # the model itself goes on as it was built, and the config is wrong
    model = t.Qwen2ForCausalLM(t.Qwen2Config(**shape)).eval()
    model.lm_head = torch.nn.Sequential(model.lm_head)
    assert head_of(model) is None
