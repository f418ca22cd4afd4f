"""Checkpoints that a kill at any moment cannot spoil.

A checkpoint is a directory `step-00000100/` of three files: `weights.safetensors`, `state.pt` (everything else,
readable with `weights_only=True`) and `manifest.json` (size and sha256 of the other two). It is written under a
temporary name, flushed to the disk file by file, and gets its name by one atomic rename; older checkpoints go only
after that. So every directory with a proper name is whole, and what the disk damages later is told by the manifest:
a file that changed, or anything else in its place.

One process writes (rank 0); any number may read.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._extras import require
from ._manifest import (
    FORMAT_VERSION,
    MANIFEST,
    STATE,
    WEIGHTS,
    CheckpointError,
    DamageError,
    digest,
    sealed,
    sha256,
    verify,
)
from ._storable import check_count, check_state, untie

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint", "save_checkpoint", "sweep_checkpoints"]

_NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
_TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` found.

    step: optimizer steps finished when it was saved.
    tensors: name -> contiguous tensor on the CPU with the saved dtype and shape; names that were tied share one tensor.
    state: the saved dictionary, its tensors on the CPU.
    path: the directory it was read from.
    digest: sha256 of its manifest, which holds those of its files: equal for equal content only.
    """

    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    path: Path
    digest: str = ""


def save_checkpoint(
    directory: Path, step: int, *, tensors: dict[str, Tensor], state: dict[str, Any], keep: int = 2
) -> Path:
    """Write `directory/step-<step>` durably, then remove all but the newest `keep` checkpoints up to `step`.

    Until the new checkpoint has its name, nothing older is touched: whatever fails before leaves all as it was. A
    checkpoint of the same step is replaced; a *damaged* one of a later step is removed.

    Args:
        directory: made if need be; the temporary directory lives in it too.
        step: optimizer steps finished, >= 0.
        tensors: name -> dense tensor, any device and strides. Names of one and the same tensor (tied weights) are
            stored once and tied again by `load_checkpoint`; overlapping views are stored each by itself.
        state: nested dict / list / tuple / set of numbers, strings and tensors: what `weights_only=True` reads.
        keep: how many checkpoints stay, >= 1. With 1 a checkpoint damaged on disk has no predecessor to fall back to.

    Returns:
        The path of the new checkpoint.

    Raises:
        TypeError: an entry of `tensors` or `state` cannot be stored; names the entry.
        ValueError: `step` or `keep` is out of range, or an intact checkpoint of a later step is there already.
        CheckpointError: one of this step or a later one is there that a newer version of this package wrote.
        OSError: writing failed (disk full, ...); the earlier checkpoints are untouched.
    """
    check_count("step", step, 0)
    check_count("keep", keep, 1)
    unique, aliases = untie(tensors)
    check_state(state, "state")
    directory = Path(directory)
    _make_directory(directory)
    _refuse_later(directory, step)

    target = directory / f"step-{step:08d}"
    temporary = directory / f"{_TEMPORARY}{target.name}-{os.getpid()}-{secrets.token_hex(4)}"
    temporary.mkdir()
    try:
        _write_weights(temporary / WEIGHTS, unique, aliases)
        _write_state(temporary / STATE, state)
        files = {name: _seal(temporary / name) for name in (WEIGHTS, STATE)}
        manifest = sealed({"format_version": FORMAT_VERSION, "step": step, "files": files})
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        _flush(temporary / MANIFEST)
        _flush(temporary)
        _publish(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not stay full because of this
        raise
    _flush(directory)
    _prune(directory, step, keep)
    return target


def load_checkpoint(directory: Path) -> Checkpoint | None:
    """Read the newest intact checkpoint of `directory`.

    A damaged one (a file missing, truncated, changed, unreadable, or a link, FIFO, device or directory in its place) is
    skipped with a `RuntimeWarning` that names the file and the reason, and the one before it is tried.

    Returns:
        The checkpoint, all tensors on the CPU, or None if there is none.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged, with the reason of each; or the newest that
            is not was written by a newer version of this package, which is not passed over in favour of an older one.
    """
    damages: list[str] = []
    for _, path in _checkpoints(Path(directory)):
        try:
            manifest = verify(path)
        except DamageError as damage:
            damages.append(str(damage))
            warnings.warn(f"skipped a damaged checkpoint: {damage}", RuntimeWarning, stacklevel=2)
            continue
        # Past the hashes nothing is excused: an error here is a bug or a version that does not fit, not damage.
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        tensors = _read_weights(path / WEIGHTS)
        return Checkpoint(manifest["step"], tensors=tensors, state=state, path=path, digest=digest(manifest))
    if damages:
        raise CheckpointError(f"every checkpoint in {directory} is damaged:\n  " + "\n  ".join(damages))
    return None


def sweep_checkpoints(directory: Path, step: int, keep: int) -> None:
    """Remove what a killed save left: unfinished directories, and checkpoints before that of `step` beyond the `keep`
    newest. Later ones stay for the next save to judge. For the one process that writes."""
    kept = {step}
    for other, path in _checkpoints(Path(directory)):
        if other < step:
            if other not in kept and len(kept) < keep:
                kept.add(other)
            else:
                _discard(path)
    if Path(directory).is_dir():
        _discard_temporaries(Path(directory))


# Writing ------------------------------------------------------------------------------------------------------------


def _write_weights(path: Path, tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    safetensors = require("safetensors", package="safetensors", purpose="saving a checkpoint")
    save_file = require("safetensors.torch", package="safetensors", purpose="saving a checkpoint").save_file
    try:
        save_file(tensors, path, metadata={"format": "pt", "aliases": json.dumps(aliases)})
    except KeyError as error:  # its table of dtypes
        names = [name for name, tensor in tensors.items() if tensor.dtype in error.args]
        if not names:
            raise
        raise TypeError(f"tensors {names} have a dtype that safetensors cannot hold: {error}") from error
    except safetensors.SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from error


def _write_state(path: Path, state: dict[str, Any]) -> None:
    with open(path, "wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # torch hides the cause behind a failed internal check
                raise OSError(f"could not write {path}: {error.__context__}") from error
            raise


def _seal(path: Path) -> dict[str, int | str]:
    """Flush a finished file to the disk and return its entry of the manifest."""
    _flush(path)
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def _flush(path: Path) -> None:
    """fsync a file or a directory (which holds the names: a rename is durable only with it)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        _flush(directory.parent)


def _publish(temporary: Path, target: Path) -> None:
    """Give a finished checkpoint its name. A directory cannot be renamed onto a full one, so that steps aside first,
    under a name that `load_checkpoint` still reads: no moment is without a checkpoint."""
    if target.is_dir():
        aside = target.with_name(target.name + ".replaced")
        _discard(aside)
        os.replace(target, aside)
    else:
        _discard(target)  # if it is there, as something that is no checkpoint
    os.replace(temporary, target)


def _refuse_later(directory: Path, step: int) -> None:
    """A later step would win at the next load, and this one would be lost without a word."""
    for other, path in _checkpoints(directory):
        if other >= step and _is_intact(path) and other > step:  # one of a newer version raises, of this step too
            raise ValueError(
                f"step is {step}, but {path} holds an intact checkpoint of a later step: "
                "resume from it or use another directory"
            )


def _prune(directory: Path, step: int, keep: int) -> None:
    kept: list[int] = []
    for other, path in _checkpoints(directory):
        if other <= step and other not in kept and len(kept) < keep:
            kept.append(other)
        else:  # too old, replaced, or damaged and of a later step
            _discard(path)
    _discard_temporaries(directory)


def _discard_temporaries(directory: Path) -> None:
    for path in [path for path in directory.iterdir() if path.name.startswith(_TEMPORARY)]:
        _discard(path)


def _discard(path: Path) -> None:
    """Remove a directory; it loses its name first, so that a kill midway leaves no half checkpoint. A link goes without
    what it points to, and so does a file or FIFO in a checkpoint's place."""
    if not os.path.lexists(path):
        return
    if not path.name.startswith(_TEMPORARY):
        named, path = path, path.with_name(f"{_TEMPORARY}{path.name}-{secrets.token_hex(4)}")
        os.replace(named, path)
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:  # a network disk keeps files that are open; the next save tries again
        warnings.warn(f"could not remove {path}: {error}", RuntimeWarning, stacklevel=2)


# Reading ------------------------------------------------------------------------------------------------------------


def _checkpoints(directory: Path) -> Iterator[tuple[int, Path]]:
    """(step, path) of every checkpoint, newest first; of one step, the replacing before the replaced."""
    if not os.path.lexists(directory):
        return
    found = [(match, path) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name))]
    for match, path in sorted(found, key=lambda item: (-int(item[0][1]), item[0][2] is not None)):
        yield int(match[1]), path


def _is_intact(path: Path) -> bool:
    try:
        verify(path)
    except DamageError:
        return False
    return True


def _read_weights(path: Path) -> dict[str, Tensor]:
    safe_open = require("safetensors", package="safetensors", purpose="loading a checkpoint").safe_open
    with safe_open(path, framework="pt", device="cpu") as file:
        # Its tensors are pages of the file: cloned, they outlive its removal, on a network disk too.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - it is no dict
        aliases = json.loads(file.metadata()["aliases"])
    return tensors | {alias: tensors[name] for alias, name in aliases.items()}
