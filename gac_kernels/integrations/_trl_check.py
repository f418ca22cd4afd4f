"""TRL's hooks, for ``gac-kernels doctor``."""

from __future__ import annotations

from ._trl_head import BEFORE, OLDEST
from .checks import Check, check_host

_TRAINER = "trl.trainer.grpo_trainer:GRPOTrainer"
_ABOVE = "transformers.trainer:Trainer"


def check() -> Check:
    """Whether TRL is here, supported, and has what ``integrations.trl`` replaces or calls."""
    return check_host(
        "trl",
        OLDEST,
        BEFORE,
        {
            "trl.trainer.utils:_ChunkedLogProbFunction": (),
            f"{_TRAINER}._compute_loss": ("model", "inputs"),
            f"{_TRAINER}._generate_and_score_completions": ("inputs",),
            f"{_TRAINER}._get_per_token_logps_and_entropies": ("model", "input_ids", "attention_mask"),
            f"{_ABOVE}._save_optimizer_and_scheduler": ("output_dir",),
            f"{_ABOVE}._load_optimizer_and_scheduler": ("checkpoint",),
        },
    )
