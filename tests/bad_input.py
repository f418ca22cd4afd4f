"""A row of the bad input tables: a call of the public interface that must be refused, and what the error must say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

import gac_kernels as gk

S, T, V, H = 3, 5, 7, 4
NAN, INF = float("nan"), float("inf")
KINDS = ("shape", "dtype", "type", "device", "range", "nan", "empty", "contradictory")


class Row(NamedTuple):
    name: str  # of gk.__all__
    kind: str  # of KINDS
    call: Callable[[], Any]
    error: type[Exception]
    argument: str  # both stand in the error's text
    came: str


def table(name: str, call: Callable[..., Any], *cells: tuple) -> list[Row]:
    """Rows of one public name: ``call(**given)`` for each ``(kind, given, error, argument, came)``."""

    def row(kind: str, given: dict[str, Any], error: type[Exception], argument: str, came: str) -> Row:
        return Row(name, kind, lambda: call(**given), error, argument, came)

    return [row(*cell) for cell in cells]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device="meta")


def padded(**given: Any) -> gk.TokenBatch:
    """A batch of 3 rollouts of 5 tokens, but for what is given."""
    given = {
        "targets_ST": torch.zeros(S, T, dtype=torch.long),
        "mask_ST": torch.ones(S, T, dtype=torch.bool),
        "advantages": torch.zeros(S),
    } | given
    return gk.TokenBatch.from_padded(given.pop("targets_ST"), given.pop("mask_ST"), **given)


def packed(**given: Any) -> gk.TokenBatch:
    """The same 15 tokens laid end to end, as sequences of 4, 5 and 6."""
    given = {
        "targets_N": torch.zeros(S * T, dtype=torch.long),
        "cu_seqlens": torch.tensor([0, 4, 9, 15]),
        "advantages": torch.zeros(S),
    } | given
    return gk.TokenBatch.from_packed(given.pop("targets_N"), given.pop("cu_seqlens"), **given)
