"""A tiny Qwen2, a local tokenizer of characters and trainers of TRL on them: nothing is fetched."""

from __future__ import annotations

import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from gac_kernels.train.tokenizer import character_tokenizer

LETTERS = "abcdefgh"


def dataset(rows=16):
    prompts = ["".join(LETTERS[(i * k) % 8] for k in (1, 3, 5)[: 1 + i % 3]) + "=" for i in range(rows)]
    demonstrations = [prompt[:-1][::-1] if i % 5 else None for i, prompt in enumerate(prompts)]
    # With a fingerprint of its own nothing has to be pickled for one, which not every pyarrow and dill can do together.
    return Dataset(pa.table({"prompt": prompts, "demonstration": demonstrations}), fingerprint=f"tiny-{rows}")


def reward(completions, **kwargs):
    """Many different values, so that no group has an advantage of 0 throughout."""
    return [sum(ord(c) % 7 for c in text) / (1 + len(text)) for text in completions]


def tiny_model(tokenizer, *, tied=True):
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=tied,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2ForCausalLM(shape)


def peft_config():
    """LoRA on the attention; skips where PEFT is not installed."""
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


def trainer(
    directory,
    *,
    kind=GRPOTrainer,
    attachment=None,
    data=None,
    callbacks=None,
    peft=False,
    dtype=torch.float32,
    **settings,
):
    tokenizer = character_tokenizer([LETTERS, "="])
    model = tiny_model(tokenizer).to(dtype)
    model.save_pretrained(directory / "model")  # from where TRL loads the reference model
    model.config._name_or_path = str(directory / "model")
    arguments = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_generations": 4, "max_steps": 5,
        "max_completion_length": 8, "learning_rate": 1e-3, "logging_steps": 1, "save_strategy": "no", "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "gradient_checkpointing": False, "seed": 3, "bf16": False,
        "num_iterations": 1, **settings,
    }  # fmt: skip
    return kind(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(output_dir=str(directory), **arguments),
        train_dataset=dataset() if data is None else data,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config() if peft else None,
        **(attachment or {}),
    )


# A chat of characters, its assistant's turns marked for the loss.
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + eos_token }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '=' }}{% endif %}{% endfor %}"
)


def sft_dataset(messages=False, rows=48):
    """Words of 1 to 6 letters and their reverse; as prompt and completion, or as a chat of two turns."""
    words = ["".join(LETTERS[(i * k) % 8] for k in range(1, 2 + i % 6)) for i in range(rows)]
    if not messages:
        columns = {"prompt": [f"{word}=" for word in words], "completion": [word[::-1] for word in words]}
        return Dataset(pa.table(columns), fingerprint=f"sft-{rows}")
    turns = [
        [
            {"role": role, "content": text}
            for text_in, text_out in ((word, word[::-1]), (word[::-1], word))
            for role, text in (("user", text_in), ("assistant", text_out))
        ]
        for word in words
    ]
    return Dataset(pa.table({"messages": turns}), fingerprint=f"chat-{rows}")


def sft_trainer(directory, *, messages=False, peft=False, evaluate=False, **settings):
    tokenizer = character_tokenizer([LETTERS, "="])
    tokenizer.chat_template = CHAT
    arguments = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_steps": 5, "learning_rate": 1e-2,
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "report_to": [], "disable_tqdm": True,
        "gradient_checkpointing": False, "seed": 3, "bf16": False, **settings,
    }  # fmt: skip
    data = sft_dataset(messages)
    return SFTTrainer(
        model=tiny_model(tokenizer),
        args=SFTConfig(output_dir=str(directory), **arguments),
        train_dataset=data,
        eval_dataset=data if evaluate else None,
        processing_class=tokenizer,
        peft_config=peft_config() if peft else None,
    )


@pytest.fixture(autouse=True)
def exact_logs(monkeypatch):
    """The trainer logs its loss rounded to 1e-4 or so; these tests compare to 1e-6."""
    import transformers.trainer

    monkeypatch.setattr(transformers.trainer, "round", lambda value, digits=None: value, raising=False)


def assert_same_curves(ours, theirs):
    assert len(ours) == len(theirs) == 5
    assert any(abs(loss) > 1e-4 for loss, _ in theirs) or any(norm > 1e-3 for _, norm in theirs)
    torch.testing.assert_close(torch.tensor(ours).double(), torch.tensor(theirs).double(), rtol=1e-6, atol=1e-6)


def curve(run):
    """(loss, gradient norm) of every step."""
    return [(row["loss"], row["grad_norm"]) for row in run.state.log_history if "grad_norm" in row]
