"""A run's directory as a sitting finds it, the same on every rank, and what it puts there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._fingerprints import check_fingerprints, fingerprints
from .checkpoint import Checkpoint, load_checkpoint, sweep_checkpoints
from .config import TrainConfig
from .ranks import Ranks

_OF_ONE_RANK = ("output", "device")  # settings in which ranks may differ


@dataclass(frozen=True)
class Found:
    """What this rank begins with.

    checkpoint: the one to continue from, if any. fingerprints: of the files that the run reads.
    """

    checkpoint: Checkpoint | None
    fingerprints: dict[str, str]

    @classmethod
    def look(cls, config: TrainConfig, resume: bool) -> Found:
        """Find it; a directory that holds another run is not written over."""
        if resume:
            return cls(load_checkpoint(config.output / "checkpoints"), fingerprints(config))
        for name in ("checkpoints", "metrics.jsonl"):
            if (config.output / name).exists():
                raise ValueError(
                    f"output: {config.output} holds a run already ({name}); "
                    "continue it with resume=True, or name another directory"
                )
        return cls(None, fingerprints(config))

    def agree(self, ranks: Ranks, config: TrainConfig) -> None:
        """Raise ValueError, on every rank, where ranks found different things: they would train apart in silence."""
        settings = {name: value for name, value in config.to_dict().items() if name not in _OF_ONE_RANK}
        name = None if self.checkpoint is None else f"{self.checkpoint.path.name} ({self.checkpoint.digest[:8]})"
        own = ((name, self.checkpoint and self.checkpoint.digest), settings, self.fingerprints)
        checkpoints, all_settings, all_files = zip(*ranks.gather(own), strict=True)
        if any(one != checkpoints[0] for one in checkpoints):
            names = "; ".join(f"rank {rank}: {one[0] or 'none'}" for rank, one in enumerate(checkpoints))
            raise ValueError(
                f"the ranks found different checkpoints: {names}. Is output ({config.output}) one and the same disk "
                "for all, and can each rank read it?"
            )
        if differing := _differing(all_settings):
            shown = "; ".join(f"{name}: {', '.join(repr(one[name]) for one in all_settings)}" for name in differing)
            raise ValueError(f"the ranks were given different settings: {shown}")
        if differing := _differing(all_files):
            raise ValueError(f"the ranks read different files: {', '.join(differing)} (see --task and --model)")

    def check(self, config: TrainConfig) -> None:
        """Raise ValueError naming what is not as the run to continue began with."""
        if self.checkpoint is None:
            return
        config.check_resumable(self.checkpoint.state["config"])
        check_fingerprints(config, self.checkpoint.state["run"].get("fingerprints"), self.fingerprints)


def _differing(values: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys under which not all hold the same."""
    names = sorted({name for one in values for name in one})
    return [name for name in names if any(one.get(name) != values[0].get(name) for one in values)]


def sweep(config: TrainConfig, step: int) -> None:
    """Remove what a killed sitting left: half checkpoints, checkpoints too many, half files of the exported model."""
    sweep_checkpoints(config.output / "checkpoints", step, config.checkpoint_keep)
    model = config.output / "model"
    for path in list(model.iterdir()) if model.is_dir() else ():
        if path.name.startswith(".tmp") and (path.is_symlink() or not path.is_dir()):  # safetensors' own
            path.unlink()


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the file under another name first, so that a kill leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
