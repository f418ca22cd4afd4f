"""What a checkpoint's manifest.json says, and whether the files beside it are those that were written.

The manifest holds the format's version, the step, size and sha256 of the other files, and the sha256 of all that. A
reader of version 1 passes over that last one, so it came without a new number. Every later version is to write it in
the same way: it tells a later version from a damaged digit.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from ._reading import check_regular, parse_json, read_bytes

FORMAT_VERSION = 1
WEIGHTS, STATE, MANIFEST = "weights.safetensors", "state.pt", "manifest.json"

_SEAL = "sha256"
_KEYS_WITHOUT_SEAL = {"format_version", "step", "files"}
_HASH_CHUNK_BYTES = 1 << 22


class CheckpointError(RuntimeError):
    """Checkpoints are there, but none of them can be used, or one was written by a newer version of this package."""


class DamageError(Exception):
    """One checkpoint is unusable; the message names the file and the reason."""


def sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with the sha256 of everything in it."""
    return {**manifest, _SEAL: _digest(manifest)}


def digest(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest's content, which names the files' content: one checkpoint has one."""
    return _digest({name: value for name, value in manifest.items() if name != _SEAL})


def sha256(path: Path) -> str:
    """Of a file; nothing but a regular file is read."""
    content = hashlib.sha256()
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
    with open(descriptor, "rb") as file:
        check_regular(os.fstat(file.fileno()).st_mode)
        while chunk := file.read(_HASH_CHUNK_BYTES):
            content.update(chunk)
    return content.hexdigest()


def verify(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are exactly those that were written.

    Raises:
        DamageError: something is wrong with this checkpoint.
        CheckpointError: a newer version of this package wrote it.
    """
    file = path / MANIFEST
    try:
        manifest = parse_json(read_bytes(file, follow=False))
        _check_version(file, manifest)
        step, entries = manifest["step"], manifest["files"]
        expected = {name: (entries[name]["bytes"], entries[name]["sha256"]) for name in (WEIGHTS, STATE)}
        if type(step) is not int or step != int(path.name.removesuffix(".replaced").removeprefix("step-")):
            raise DamageError(f"{file}: says step {str(step)[:40]}")
        for name, (size, content) in expected.items():
            file = path / name
            status = file.lstat()
            check_regular(status.st_mode)
            if status.st_size != size:
                raise DamageError(f"{file}: {status.st_size} bytes, the manifest says {str(size)[:40]}")
            if sha256(file) != content:
                raise DamageError(f"{file}: its sha256 is not the manifest's")
    except OSError as error:
        raise DamageError(f"{file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        what = "not a manifest" if file.name == MANIFEST else "cannot be read"
        raise DamageError(f"{file}: {what} ({type(error).__name__}: {str(error)[:200]})") from error
    return manifest


def _check_version(file: Path, manifest: Any) -> None:
    version = manifest["format_version"]
    if type(version) is int and version == FORMAT_VERSION:
        return
    flipped = type(version) is int and _is_a_flipped_bit(manifest)
    if type(version) is int and version > FORMAT_VERSION and not flipped:
        raise CheckpointError(
            f"{file}: format version {version}, written by a newer gac_kernels; this one reads {FORMAT_VERSION}: "
            "update it, or move that checkpoint away to go on without"
        )
    shown = str(version)[:40] if type(version) is int else repr(version)[:40]
    reason = ", and all else in it is that of a manifest of this version" if flipped else ""
    raise DamageError(f"{file}: format version {shown}, this code reads {FORMAT_VERSION}{reason}")


def _is_a_flipped_bit(manifest: dict[str, Any]) -> bool:
    """Whether one bit turned our number into this one: with ours in its place the seal fits; or there is none, and all
    else is what version 1 once wrote without. Anything else is not ours to call damaged."""
    ours, theirs = str(FORMAT_VERSION), str(manifest["format_version"])
    if len(ours) != len(theirs) or sum((ord(a) ^ ord(b)).bit_count() for a, b in zip(ours, theirs, strict=True)) != 1:
        return False
    if _SEAL in manifest:
        return bool(manifest[_SEAL] == digest({**manifest, "format_version": FORMAT_VERSION}))
    return manifest.keys() == _KEYS_WITHOUT_SEAL


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
