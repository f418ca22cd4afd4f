"""A head whose vocabulary is spread over ranks: which columns are ours, and whole rows' statistics.

Shapes: R ranks, N rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from . import reference
from .distributed import all_gather, exchange, of_all_ranks, ranks_disagree
from .schemas import ELSEWHERE

T = TypeVar("T")

# What ranks with parts of one vocabulary exchange about a call, before anything whose size depends on it: once about
# the call, once about how many of its rows are live.
CALL, ROWS = "a loss or log-probs from hidden states with tp_group", "the live rows of hidden states with tp_group"


def told(kind: str, group: dist.ProcessGroup | None, weight: object, check: Callable[[], T]) -> T:
    """``check()``. What it refuses is told to the ranks that wait for this one in the exchange of this kind, so that
    all of them raise. ``weight``: whose device the exchange is on where the group has no CPU backend."""
    if group is None or not isinstance(group, dist.ProcessGroup):
        return check()
    try:
        return check()
    except (TypeError, ValueError) as error:
        if of_all_ranks(error):
            raise
        device = weight.device if isinstance(weight, Tensor) else torch.device("cpu")
        exchange(kind, [1], group, device)
        raise


def checksum(*settings: object) -> int:
    """Of plain values, tensors by their presence, and dataclasses of them: equal on ranks that were given the same."""

    def plain(value: object) -> Any:
        if is_dataclass(value) and not isinstance(value, type):
            return type(value).__qualname__, *(plain(getattr(value, field.name)) for field in fields(value))
        if value is None or isinstance(value, (bool, str)):
            return value
        if isinstance(value, (int, float)):
            return float(value)
        return getattr(value, "__qualname__", type(value).__qualname__)

    return zlib.crc32(repr([plain(value) for value in settings]).encode())


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns ``[start, start + width)`` of a vocabulary of ``total`` columns.

    Columns beyond ``total`` are padding and belong to no shard; a shard may be empty. ``chunk``: the rows a chunk that
    all ranks can hold.
    """

    group: dist.ProcessGroup
    start: int
    width: int
    total: int
    chunk: int = 1

    @classmethod
    def of(
        cls,
        group: dist.ProcessGroup,
        columns: int,
        vocab_size: int | None,
        device: torch.device,
        *,
        chunk: int = 1,
        call: Mapping[str, int] | None = None,
    ) -> VocabularyShard:
        """Shards lie in rank order. Every rank must call; how many columns each has is exchanged on the host, with the
        rows a chunk that each would take, of which the fewest count.

        call: what must be equal on all ranks, by name. The same ValueError on all ranks where it is not,
        and where a rank has refused its arguments (``told``).
        """
        call = call or {}
        size = -1 if vocab_size is None else vocab_size
        table = cls._exchange(CALL, [columns, size, chunk, *call.values()], group, device)
        sizes, totals = [row[0] for row in table], {row[1] for row in table}
        if len(totals) > 1:
            raise ranks_disagree(f"vocab_size must be the same on all ranks of tp_group, got {sorted(totals)}")
        for place, name in enumerate(call, 3):
            if any(row[place] != table[0][place] for row in table):
                got = [row[place] for row in table]
                raise ranks_disagree(f"{name} must be the same on all ranks of tp_group, got by rank {got}")
        if vocab_size is not None and not 0 < vocab_size <= sum(sizes):
            raise ranks_disagree(f"vocab_size must be in [1, {sum(sizes)}], the shards' columns, got {vocab_size}")
        if sum(sizes) == 0:
            raise ranks_disagree("weight must have a row on at least one rank of tp_group, got empty shards on all")
        total = sum(sizes) if vocab_size is None else vocab_size
        start = sum(sizes[: dist.get_rank(group)])
        return cls(group, start, max(0, min(columns, total - start)), total, min(row[2] for row in table))

    @staticmethod
    def _exchange(kind: str, values: list[int], group: dist.ProcessGroup, device: torch.device) -> list[list[int]]:
        table = exchange(kind, [0, *values], group, device)
        if refused := [rank for rank, row in enumerate(table) if row[0]]:
            raise ranks_disagree(f"ranks {refused} of tp_group have refused their arguments; their own errors say why")
        return [row[1:] for row in table]

    def agree_on_rows(self, live: int, device: torch.device) -> None:
        """Chunks are of live rows: The same ValueError on all ranks where they hold different numbers of them."""
        counts = [row[0] for row in self._exchange(ROWS, [live], self.group, device)]
        if any(count != live for count in counts):
            raise ranks_disagree(
                f"batch (its mask) must be the same on all ranks of tp_group, got by rank {counts} live tokens"
            )

    @property
    def replicas(self) -> tuple[int, ...] | None:
        """The global ranks that hold the same rows of the batch, as Signals have them."""
        ranks = dist.get_process_group_ranks(self.group)
        return tuple(sorted(ranks)) if len(ranks) > 1 else None

    def local(self, targets: Tensor) -> Tensor:
        """Targets as columns of this shard; ELSEWHERE where another shard has them, or none."""
        inside = (targets >= self.start) & (targets < self.start + self.width)
        return torch.where(inside, targets - self.start, ELSEWHERE).to(targets.dtype)

    @staticmethod
    def no_statistics(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """What ``merge`` takes from a shard without columns."""
        zeros = torch.zeros(count, dtype=dtype, device=device)
        return zeros, zeros, zeros, torch.stack((zeros - torch.inf, zeros), 1)

    def merge(
        self, targets: Tensor, statistics: tuple[Tensor, ...], transform: reference.RowTransform
    ) -> tuple[Tensor, ...]:
        """``logprobs, entropy, sum_sq, normalizer`` of whole rows from those of this shard's columns, in one
        collective. All ranks get the same bits.

        With w_r = sum exp z over shard r / sum exp z over all: log p = log p_r + log w_r, the entropy is
        sum_r w_r (H_r - log w_r), and sum p^2 is sum_r w_r^2 (sum p^2)_r. The largest w_r is e^0 over a sum that holds
        it: no log-prob comes out above 0 and no entropy below.
        """
        logprobs, entropy, sum_sq, normalizer = statistics
        dtype, ours = logprobs.dtype, self.local(targets) != ELSEWHERE
        logprobs = torch.where(ours, logprobs, 0.0)
        packed = torch.stack((normalizer[:, 0], normalizer[:, 1], entropy, sum_sq, logprobs, ours.to(dtype)))
        top_RN, log_sum_RN, entropy_RN, sum_sq_RN, logp_RN, owner_RN = all_gather(packed, self.group).double().unbind(1)
        # A shard without columns, or with nothing but -inf, has no mass: its own statistics mean nothing.
        empty_RN = top_RN == -torch.inf
        top_N = top_RN.amax(0)
        log_mass_RN = torch.where(empty_RN, -torch.inf, transform.fall(top_RN, top_N) + log_sum_RN)
        most_N = log_mass_RN.amax(0)
        relative_RN = log_mass_RN - most_N
        rest_N = relative_RN.exp().sum(0).log()
        log_sum_N, log_w_RN = most_N + rest_N, relative_RN - rest_N
        w_RN = log_w_RN.exp()
        entropy_N = torch.where(w_RN == 0, 0.0, w_RN * (entropy_RN - log_w_RN)).sum(0)
        sum_sq_N = torch.where(w_RN == 0, 0.0, w_RN.square() * sum_sq_RN).sum(0).clamp(max=1.0)
        logp_RN = torch.where(empty_RN, -torch.inf, logp_RN + log_w_RN)
        logp_N = torch.where(owner_RN > 0, logp_RN, 0.0).sum(0)
        lost_N = owner_RN.sum(0) != 1  # a target in no shard: what a target outside [0, V) is to one process

        def checked(value_N: Tensor) -> Tensor:
            return value_N.masked_fill(lost_N, torch.nan).to(dtype)

        normalizer_N2 = torch.stack((checked(top_N), checked(log_sum_N)), 1)
        return checked(logp_N), checked(entropy_N), checked(sum_sq_N), normalizer_N2

    def sum(self, value: Tensor) -> Tensor:
        """Of all shards, in at least float32; all ranks get the same bits."""
        wide = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        dist.all_reduce(wide, group=self.group)
        return wide
