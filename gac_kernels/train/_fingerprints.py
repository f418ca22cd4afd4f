"""What a run reads beside its settings: the task file, the model directory's tokenizer and configuration.

A resumed run takes its weights from the checkpoint, and these from where they were. Had one changed it would be another
run: other problems held out, other tokens for the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import TrainConfig

_TOKENIZER = (
    "tokenizer", "vocab", "merges", "special_tokens_map", "added_tokens", "chat_template", "spiece", "sentencepiece",
    "source", "target", "bpe", "normalizer",
)  # fmt: skip
_CHAT_TEMPLATES = "additional_chat_templates"
_TOKENIZER_ENDINGS = (".model", ".tiktoken", ".jinja")
_MODEL = ("config.json", "generation_config.json")


def fingerprints(config: TrainConfig) -> dict[str, str]:
    """Name -> sha256 of everything that a resumed run reads anew; built-in tasks and models have none.

    Raises:
        OSError: a file cannot be read.
    """
    found = {}
    if config.task != "arithmetic":
        found["task"] = _digest([Path(config.task)])
    if config.model != "tiny":
        directory = Path(config.model)
        found["tokenizer"] = _digest(_tokenizer_files(directory), directory)
        found["model"] = _digest([p for name in _MODEL if (p := directory / name).is_file()], directory)
    return found


def check_fingerprints(config: TrainConfig, saved: Any, own: dict[str, str]) -> None:
    """Raise ValueError naming what is no longer what the run began with.

    Args:
        saved: of the checkpoint; None where it holds none, as those of earlier versions.
    """
    if saved is None:
        return
    where = {
        "task": f"the task file {config.task}",
        "tokenizer": f"the tokenizer in {config.model}",
        "model": f"{' or '.join(_MODEL)} in {config.model}",
    }
    changed = [where[name] for name in own if saved.get(name) != own[name]]
    if changed:
        raise ValueError(
            f"resume needs what the run began with; this has changed since: {'; '.join(changed)}. "
            "Put it back as it was, or begin a new run in another output directory"
        )


def _tokenizer_files(directory: Path) -> list[Path]:
    own = [p for p in directory.iterdir() if p.name.startswith(_TOKENIZER) or p.name.endswith(_TOKENIZER_ENDINGS)]
    more = (directory / _CHAT_TEMPLATES).iterdir() if (directory / _CHAT_TEMPLATES).is_dir() else ()
    return sorted(path for path in (*own, *more) if path.is_file())


def _digest(files: Iterable[Path], directory: Path | None = None) -> str:
    """Of the files' content, and of their names within a directory."""
    digest = hashlib.sha256()
    for path in files:
        data = path.read_bytes()
        if directory is not None:
            digest.update(f"{path.relative_to(directory).as_posix()}\0{len(data)}\0".encode())
        digest.update(data)
    return digest.hexdigest()
