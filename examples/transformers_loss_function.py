"""``model.loss_function`` of transformers replaced by ours: a tiny model on a CPU, in half a minute, nothing fetched.

    pip install '.[train]' accelerate
    python examples/transformers_loss_function.py

The task is to write a word backwards. The same model learns it with transformers' own loss, with ours that equals it,
and with NLL-phi, whose phi = p (1 - p) weighs a token little where the model is sure already or finds it next to
impossible. With accelerate the loop is transformers' Trainer, without it a bare one.
"""

from __future__ import annotations

import importlib.util
import random
import tempfile
from collections.abc import Callable

import torch
from _tiny import tiny_model
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

import gac_kernels as gk
from gac_kernels.integrations.transformers import CausalLMLoss

LETTERS = "abcdefgh"
BATCH = 32
LOSSES: dict[str, Callable[..., Tensor] | None] = {
    "transformers' own": None,
    "ours, NLL": CausalLMLoss(gk.HybridObjective(supervised=gk.NLL("none"))),
    "ours, NLL-phi": CausalLMLoss(gk.HybridObjective(supervised=gk.NLL("phi"))),
}


def main(steps: int = 100) -> dict[str, tuple[float, float]]:
    """Nats a token and share of right tokens on words never seen, after so many steps, by loss."""
    measured = {}
    for name, loss in LOSSES.items():
        model, tokenizer = tiny_model([LETTERS, "="])
        if loss is not None:
            model.loss_function = loss
        train(model, examples(tokenizer, BATCH * 16, seed=1), steps)
        measured[name] = nats, right = evaluate(model, examples(tokenizer, 256, seed=2))
        print(f"{name:20s}   {nats:.3f} nats a token   {right:.1%} of tokens right")
    return measured


def examples(tokenizer: Callable[..., dict[str, list[int]]], count: int, seed: int) -> list[dict[str, Tensor]]:
    """Words of four letters, their letters backwards, and labels on those alone."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        word = "".join(draw.choices(LETTERS, k=4))
        ids = torch.tensor(tokenizer(f"{word}={word[::-1]}")["input_ids"])
        labels = torch.where(torch.arange(len(ids)) > 4, ids, -100)
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return made


def train(model: PreTrainedModel, data: list[dict[str, Tensor]], steps: int) -> None:
    """So many steps of two micro-batches each."""
    if importlib.util.find_spec("accelerate") is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(steps):
            optimizer.zero_grad()
            parts = [data[(2 * step + half) * BATCH // 2 % len(data) :][: BATCH // 2] for half in range(2)]
            tokens = sum(int((row["labels"] != -100).sum()) for part in parts for row in part)
            for part in parts:
                batch = {name: torch.stack([row[name] for row in part]) for name in part[0]}
                model(**batch, num_items_in_batch=tokens).loss.backward()
            optimizer.step()
        return
    with tempfile.TemporaryDirectory() as directory:
        settings = TrainingArguments(
            output_dir=directory, per_device_train_batch_size=BATCH // 2, gradient_accumulation_steps=2,
            max_steps=steps, learning_rate=3e-3, save_strategy="no", logging_strategy="no", report_to=[], use_cpu=True,
            disable_tqdm=True, seed=0,
        )  # fmt: skip
        trainer = Trainer(model=model, args=settings, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        trainer.train()


@torch.no_grad()
def evaluate(model: PreTrainedModel, data: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Nats a token, share of right tokens."""
    model.eval()
    batch = {name: torch.stack([row[name] for row in data]) for name in data[0]}
    targets, live = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    logits = model(batch["input_ids"]).logits[:, :-1]
    scored = gk.token_logprobs(logits, targets, outputs=("logprobs",)).logprobs
    return float(-scored.sum() / live.sum()), float((logits.argmax(-1) == targets)[live].float().mean())


if __name__ == "__main__":
    main()
