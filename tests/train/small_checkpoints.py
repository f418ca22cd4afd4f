"""A small checkpoint, and what a directory of them holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gac_kernels.train.checkpoint import save_checkpoint

FILES = ("weights.safetensors", "state.pt", "manifest.json")


def save(directory: Path, step: int, **options: Any) -> Path:
    """Save a checkpoint whose content tells its step."""
    weight = torch.arange(6.0) + step
    return save_checkpoint(directory, step, tensors={"w": weight}, state={"step": step, "half": weight / 2}, **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
