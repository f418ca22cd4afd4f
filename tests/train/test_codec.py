"""Special tokens: one begin token as template and tokenizer intend, no end token behind a prompt, one behind a
demonstration; and prompts that the model can hold."""

from __future__ import annotations

import json

import pytest
from small_runs import small
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gac_kernels.train.loop import Trainer
from gac_kernels.train.rollouts import Codec

SPECIAL = ["<unk>", "<s>", "</s>", "<end>", "[CLS]"]
CHARACTERS = "0123456789+=- isumuer[]ABC"
UNK, BOS, EOS, END, CLS = range(5)


def tokenizer(template="$A", **names):
    """One token a character; what stands around a text is the template's."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *sorted(set(CHARACTERS))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, index) for index, token in enumerate(SPECIAL)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"} | names
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, additional_special_tokens=["<end>", "[CLS]"],
        **names,
    )  # fmt: skip


def ids(text, own):
    return own.convert_tokens_to_ids(list(text))


@pytest.mark.parametrize(
    ("template", "text", "opening"),
    [
        ("<s> $A", "1+1=", [BOS]),
        ("<s> $A </s>", "1+1=", [BOS]),
        ("$A </s>", "1+1=", []),
        ("$A", "1+1=", []),
        ("[CLS] $A <end>", "1+1=", [CLS]),
        ("[CLS] <s> $A </s> <end>", "1+1=", [CLS, BOS]),
        ("<s> $A", "<s>1+1=", [BOS]),  # a chat template wrote it
        ("<s> $A </s>", "<s>1+1=", [BOS]),
        ("[CLS] <s> $A", "<s>1+1=", [CLS, BOS]),
        ("[CLS] <s> $A", "[CLS]<s>1+1=", [CLS, BOS]),
        ("$A", "<s>1+1=", [BOS]),  # the tokenizer adds none, the template does
    ],
)
def test_a_prompt_is_opened_once_and_never_closed(template, text, opening):
    own = tokenizer(template)
    assert Codec(own, [EOS]).prompt(text) == [*opening, *ids("1+1=", own)]


def test_a_tokenizer_without_a_begin_token():
    own = tokenizer(bos_token=None)
    assert Codec(own, [EOS]).prompt("1+1=") == ids("1+1=", own)


@pytest.mark.parametrize(
    ("text", "closing"),
    [("1+1 is 2", [EOS]), ("1+1 is 2</s>", [EOS]), ("1+1 is 2</s></s>", [EOS]), ("1+1 is 2<end>", [END]),
     ("1+1 is 2<end></s>", [END]), ("", [EOS])],
)  # fmt: skip
@pytest.mark.parametrize("template", ["<s> $A", "<s> $A </s>", "$A </s>"])
def test_a_demonstration_is_closed_once(template, text, closing):
    own = tokenizer(template)
    assert Codec(own, [EOS, END]).response(text) == [*ids(text.split("<")[0], own), *closing]


@pytest.fixture(params=["<s> $A", "<s> $A </s>"])
def model(request, tmp_path):
    own = tokenizer(request.param)
    own.chat_template = "{{ bos_token }}{% for m in messages %}[u]{{ m['content'] }}[r]{% endfor %}"
    shape = LlamaConfig(
        vocab_size=len(own), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=40, eos_token_id=EOS, bos_token_id=BOS, pad_token_id=UNK,
    )  # fmt: skip
    LlamaForCausalLM(shape).save_pretrained(tmp_path / "m")
    own.save_pretrained(tmp_path / "m")
    return tmp_path / "m", own


def run_on(model, path, prompts, **settings):
    lines = [{"prompt": p, "answer": str(i), "demonstration": f"is {i}"} for i, p in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, lines)))
    settings = {"max_new_tokens": 8, "updates_per_rollout": 2, "reference": True, "eval_size": 1} | settings
    return Trainer(small(path.parent / "o", model=model, task=str(path), demonstration_pool=None, **settings))


@pytest.mark.parametrize("templated", [False, True])
def test_rows_of_a_step_begin_once_and_end_once(model, tmp_path, templated):
    directory, own = model
    prompts = [f"{i}+1=" if i % 2 else f"sum: {i}+1=" for i in range(6)]
    if templated:
        messages = ([{"role": "user", "content": prompt}] for prompt in prompts)
        prompts = [own.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]
    trainer = run_on(directory, tmp_path / "t.jsonl", prompts)
    trainer.step()
    batch = trainer._batch
    width = batch.prompt_mask.shape[1]
    for row in range(len(batch.is_expert)):
        prompt = batch.input_ids[row, :width][batch.prompt_mask[row]].tolist()
        assert prompt[0] == BOS and prompt.count(BOS) == 1 and EOS not in prompt
        if batch.is_expert[row]:
            response = batch.targets[row][batch.response_mask[row]].tolist()
            assert response[-1] == EOS and response.count(EOS) == 1 and BOS not in response
    # The reference is the model that the run began with: on the first batch both gave the same log-probs.
    assert batch.old_logprobs.equal(batch.ref_logprobs)


def test_a_prompt_that_the_model_cannot_hold_is_refused_by_line(model, tmp_path):
    path = tmp_path / "t.jsonl"
    fits = "1" * (40 - 8 - 1)  # positions, less the completion and the begin token
    run_on(model[0], path, ["1", fits, "2"])
    with pytest.raises(
        ValueError, match=r"t\.jsonl, line 2: prompt '1+'? has 33 tokens, .*max_new_tokens=8 .* 40 positions"
    ):
        run_on(model[0], path, ["1", fits + "1", "2"])


def test_a_prompt_too_long_for_the_tiny_model_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"line 3: prompt '1+ has 1500 tokens, .* 1024 positions"):
        run_on("tiny", tmp_path / "t.jsonl", ["1", "2", "1" * 1500])
