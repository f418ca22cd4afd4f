"""TRL's GRPOTrainer with demonstrations mixed in by GAC: a tiny model on a CPU, in under a minute, nothing fetched.

    pip install '.[train,trl]'
    python examples/trl_hybrid.py

The task is to write a word backwards. Every second prompt has a demonstration, and the reward is the share of right
letters.
"""

from __future__ import annotations

import random
import tempfile

import pyarrow as pa
from _tiny import tiny_model
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from gac_kernels.integrations.trl import attach

LETTERS = "abcd"


def words() -> Dataset:
    """Words of three letters, asked for backwards."""
    draw = random.Random(0)
    asked = ["".join(draw.choices(LETTERS, k=3)) for _ in range(256)]
    columns = {
        "prompt": [f"{word}=" for word in asked],
        "answer": [word[::-1] for word in asked],
        "demonstration": [word[::-1] if index % 2 else None for index, word in enumerate(asked)],
    }
    return Dataset(pa.table(columns), fingerprint="words")


def right_letters(completions: list[str], answer: list[str], **_: object) -> list[float]:
    """1 for the answer and nothing else."""
    return [
        sum(a == b for a, b in zip(text, want, strict=False)) / max(len(text), len(want))
        for text, want in zip(completions, answer, strict=True)
    ]


def main(steps: int = 200) -> None:
    """Train, and print what became of reward and mu."""
    model, tokenizer = tiny_model([LETTERS, "="])
    with tempfile.TemporaryDirectory() as directory:
        settings = GRPOConfig(
            output_dir=directory, per_device_train_batch_size=64, num_generations=4, max_completion_length=5,
            max_steps=steps, learning_rate=3e-3, loss_type="sapo", logging_steps=min(steps, 20), save_strategy="no",
            report_to=[], gradient_checkpointing=False, bf16=False, use_cpu=True, disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=right_letters, args=settings, train_dataset=words(), processing_class=tokenizer
        )
        attach(trainer, demonstrations="demonstration")  # loss_type's policy loss, NLL-phi, and GAC for mu
        trainer.train()
    for row in trainer.state.log_history:
        if "gac/mu" in row:
            print(f"step {row['step']:4d}   reward {row['reward']:.3f}   mu {row['gac/mu']:.3f}")


if __name__ == "__main__":
    main()
