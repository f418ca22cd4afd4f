"""A tiny Qwen2, a local tokenizer of characters and a trainer of TRL on them: nothing is fetched."""

from __future__ import annotations

import pyarrow as pa
import torch
from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

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


def trainer(directory, *, kind=GRPOTrainer, attachment=None, data=None, callbacks=None, **settings):
    tokenizer = character_tokenizer([LETTERS, "="])
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=128, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(shape)
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
        **(attachment or {}),
    )


def curve(run):
    """(loss, gradient norm) of every step."""
    return [(row["loss"], row["grad_norm"]) for row in run.state.log_history if "grad_norm" in row]
