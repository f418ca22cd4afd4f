"""Write the files that tests/test_state_schema.py reads, in the current format: run it when a version is raised, never
to make a test pass. The files of older versions stay; what reads them is the migration.

    python tests/data/write_state.py
"""

from __future__ import annotations

import random
from pathlib import Path

import torch

import gac_kernels as gk
from gac_kernels.controller import STATE_VERSION
from gac_kernels.train.checkpoint import FORMAT_VERSION, save_checkpoint

HERE = Path(__file__).parent
CONFIG = gk.ControllerConfig(alpha=gk.KLTarget(), update_every=2, disagreement_cap=4.0)


def controller() -> gk.GuidedAdaptiveController:
    """A controller after 7 steps, every tensor of its state away from where it began."""
    made, draw = gk.GuidedAdaptiveController(CONFIG), random.Random(0)
    for _ in range(7):
        values = [[draw.uniform(-2.0, -0.1) for _ in range(5)] for _ in range(6)]
        batch = gk.TokenBatch.from_padded(
            torch.zeros(6, 5, dtype=torch.long),
            torch.ones(6, 5),
            is_expert_S=torch.arange(6) < 3,
            advantages=torch.tensor([draw.gauss(0.0, 1.0) for _ in range(6)]),
        )
        made.observe(gk.signals_from_logprobs(torch.tensor(values, dtype=torch.float64), batch))
        made.step(kl=draw.choice([0.01, 0.05, float("inf")]))
    return made


def checkpoint(directory: Path) -> None:
    """A checkpoint with every kind of entry: tied weights, half precision, no elements, nested state."""
    tied = torch.arange(6.0).reshape(2, 3) / 7
    save_checkpoint(
        directory,
        7,
        tensors={"embed.weight": tied, "lm_head.weight": tied, "norm.weight": torch.ones(3, dtype=torch.bfloat16) / 3,
                 "empty": torch.zeros(0, 4)},
        state={"mixing": controller().state_dict(), "rng": torch.arange(16, dtype=torch.uint8), "step": 7,
               "run": {"before": 0.25, "after": None, "losses": [1.5, -0.0], "names": ("a", "b")}},
    )  # fmt: skip


if __name__ == "__main__":
    torch.save(controller().state_dict(), HERE / f"controller_state_v{STATE_VERSION}.pt")
    checkpoint(HERE / f"checkpoints_v{FORMAT_VERSION}")
