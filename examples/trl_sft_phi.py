"""TRL's SFTTrainer with NLL-phi in place of its loss: a tiny model on a CPU, in under half a minute, nothing fetched.

    pip install '.[train,trl]'
    python examples/trl_sft_phi.py

The task is to write a word backwards. One model that has learnt some of it goes on for as many steps with plain NLL,
with NLL-phi, whose phi = p (1 - p) weighs a token little where the model is sure already or finds it next to
impossible, and with GIFT, which holds on to the model as it was. A toy shows that they run, and ranks none.
"""

from __future__ import annotations

import copy
import random
import tempfile

import pyarrow as pa
import torch
from datasets import Dataset, disable_progress_bars
from transformers import Qwen2Config, Qwen2ForCausalLM
from trl import SFTConfig, SFTTrainer

import gac_kernels as gk
from gac_kernels.integrations.trl import attach_sft
from gac_kernels.train.tokenizer import character_tokenizer

LETTERS = "abcdefgh"


def words(count: int, seed: int) -> Dataset:
    """Words of four letters and, as completion, their letters backwards."""
    draw = random.Random(seed)
    asked = ["".join(draw.choices(LETTERS, k=4)) for _ in range(count)]
    columns = {"prompt": [f"{word}=" for word in asked], "completion": [word[::-1] for word in asked]}
    return Dataset(pa.table(columns), fingerprint=f"words-{count}-{seed}")


def train(model: Qwen2ForCausalLM, objective: gk.NLL | gk.GIFT, steps: int) -> tuple[float, float]:
    """Loss in nats a token, and share of right tokens, on words that were never seen, after so many steps."""
    with tempfile.TemporaryDirectory() as directory:
        settings = SFTConfig(
            output_dir=directory, per_device_train_batch_size=64, per_device_eval_batch_size=256, max_steps=steps,
            learning_rate=3e-3, save_strategy="no", report_to=[], gradient_checkpointing=False, bf16=False,
            use_cpu=True, disable_tqdm=True, logging_strategy="no", seed=0,
        )  # fmt: skip
        trainer = SFTTrainer(
            model=model, args=settings, train_dataset=words(512, seed=1), eval_dataset=words(256, seed=2),
            processing_class=character_tokenizer([LETTERS, "="]),
        )  # fmt: skip
        attach_sft(trainer, objective=objective)
        trainer.train()
        measured = trainer.evaluate()  # evaluation keeps TRL's loss, whatever the training's
        return measured["eval_loss"], measured["eval_mean_token_accuracy"]


def main() -> None:
    """Learn some of the task, then go on from there by each objective."""
    torch.manual_seed(0)
    tokenizer = character_tokenizer([LETTERS, "="])
    shape = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = Qwen2ForCausalLM(shape)
    disable_progress_bars()
    measured = {"to begin with": train(model, gk.NLL("none"), steps=60)}
    for name, objective in (("NLL", gk.NLL("none")), ("NLL-phi", gk.NLL("phi")), ("GIFT", gk.GIFT(beta=5.0))):
        learner = copy.deepcopy(model)
        learner.__dict__.pop("forward", None)  # TRL's patch, which a copy would share with its original
        measured[f"40 steps of {name}"] = train(learner, objective, steps=40)
    for name, (loss, accuracy) in measured.items():
        print(f"{name:20s} held-out loss {loss:.3f}   tokens right {accuracy:.3f}")


if __name__ == "__main__":
    main()
