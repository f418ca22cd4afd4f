"""Small runs for the tests of the loop."""

from __future__ import annotations

from typing import Any

from gac_kernels.train.config import TrainConfig

# Narrow and short: a step takes some 30 ms.
SMALL = {
    "digits": 2, "demonstration_pool": 24, "tiny_hidden": 16, "tiny_layers": 1, "warmup_sft_steps": 0,
    "warmup_sft_batch": 8, "steps": 4, "learning_rate": 1e-3, "lr_warmup": 1, "prompts_per_step": 2, "group_size": 3,
    "demonstrations_per_step": 3, "max_new_tokens": 24, "eval_size": 6, "checkpoint_every": 0,
}  # fmt: skip


def small(output: Any = "unused", **settings: Any) -> TrainConfig:
    return TrainConfig(output, **{**SMALL, **settings})
