"""Files that may be damaged, or not files at all: read within bounds, refused with OSError or ValueError alone."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 1 << 24
_MAX_DEPTH = 64
_KINDS = (
    (stat.S_ISDIR, "a directory"), (stat.S_ISLNK, "a symbolic link"), (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"),
)  # fmt: skip


def check_regular(mode: int) -> None:
    """Raise ValueError unless `mode` of a stat is that of a regular file."""
    if not stat.S_ISREG(mode):
        kind = next((name for test, name in _KINDS if test(mode)), "of an unknown kind")
        raise ValueError(f"expected a regular file, it is {kind}")


def read_bytes(path: Path, limit: int = MAX_JSON_BYTES, *, follow: bool = True) -> bytes:
    """The content of a regular file of at most `limit` bytes. A FIFO does not block, a device is not read.

    Args:
        follow: whether `path` may be a symbolic link.

    Raises:
        OSError: it is not there or cannot be read.
        ValueError: it is no regular file, or too large.
    """
    check_regular((path.stat() if follow else path.lstat()).st_mode)
    # Between the look and the opening it may have become something else.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        check_regular(status.st_mode)
        data = b"" if status.st_size > limit else file.read(limit + 1)
    if max(len(data), status.st_size) > limit:
        raise ValueError(f"expected at most {limit} bytes, got {max(len(data), status.st_size)}")
    return data


def parse_json(data: bytes) -> Any:
    """The JSON value in `data`: no nan, no infinity, no key twice, at most 64 brackets deep.

    Raises:
        ValueError: it is none, whatever is wrong with it.
    """
    try:
        value = json.loads(
            data, parse_constant=_refuse_constant, parse_float=_finite, parse_int=_bounded, object_pairs_hook=_object
        )
    except RecursionError:
        raise ValueError("brackets too deep") from None
    if data.count(b"[") + data.count(b"{") > _MAX_DEPTH:
        _check_depth(value)
    return value


def read_json_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; ValueError or OSError name the file."""
    try:
        value = parse_json(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is too large for a number")
    return value


def _bounded(text: str) -> int:
    value = int(text)  # ValueError from some thousand digits on
    if abs(value) > sys.float_info.max:
        raise ValueError(f"an integer of {len(text)} digits is too large for a number")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return value


def _check_depth(value: Any) -> None:
    """What can be parsed can still be too deep for whoever walks through it."""
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [child for parent in level for child in _children(parent)]
        if not level:
            return
    raise ValueError("brackets too deep")


def _children(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
