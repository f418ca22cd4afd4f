"""What ranks exchange for the controller: ragged rows in one packed collective, and the KL.

Every rank computes from the same numbers in the same order (gathered in rank order, never reduced by the network), so
results are equal bit for bit on all ranks, and equal to those of one process that saw the rows of all.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from .signals import AGGREGATIONS, METADATA_FIELDS, SIGNAL_COLUMNS, Signals

__all__ = [
    "all_gather", "all_gather_ints", "all_gather_text", "check_group", "copies_in", "describe",
    "exchange", "gather_rows", "gather_signals", "mean_kl", "world_size",
]  # fmt: skip


def check_group(name: str, group: object) -> None:
    """None, for the default group, or what torch.distributed gives for a group, also where this rank is not in it."""
    if group is None:
        return
    if not dist.is_available() or not (
        isinstance(group, dist.ProcessGroup) or group == dist.GroupMember.NON_GROUP_MEMBER
    ):
        raise TypeError(f"{name} must be a process group or None, got {type(group).__name__}")


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in `group`, or in the default group; 1 without torch.distributed. ValueError if this rank is not in it."""
    if not (dist.is_available() and dist.is_initialized()):
        return 1
    size = dist.get_world_size(group)
    if size < 1:
        raise ValueError("process_group must contain this rank, got a group without it")
    return size


def all_gather(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """(ranks, *x.shape), every rank's `x` in rank order. The shapes must be equal; nothing waits on the host."""
    gathered = x.new_empty((dist.get_world_size(group), *x.shape))
    dist.all_gather(list(gathered.unbind(0)), x.contiguous(), group=group)
    return gathered


def all_gather_ints(values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device) -> list[list[int]]:
    """Every rank's 64-bit integers, on the host.

    Through the group's CPU backend if it has one ("cpu:gloo,cuda:nccl"). A group without one ("nccl") exchanges them on
    `device`, and the host waits for it.
    """
    has_cpu = "cpu:" in dist.get_backend_config(group)
    return all_gather(torch.tensor(values, dtype=torch.int64, device="cpu" if has_cpu else device), group).tolist()


def ranks_disagree(text: str) -> ValueError:
    """The error that every rank of a group raises alike, because all know it from the same exchange."""
    error = ValueError(text)
    error.of_all_ranks = True  # type: ignore[attr-defined]
    return error


def of_all_ranks(error: Exception) -> bool:
    """Whether the other ranks raise the error as well, and none waits for this one."""
    return getattr(error, "of_all_ranks", False)


# Every exchange of integers has this size, and says first what it is about: two that meet by mistake, because ranks do
# not make the same calls, end in an error and not in a collective of unequal sizes.
_WORDS = 32
_KINDS = (
    "Signals.all_reduce()", "step() of a controller", "a loss or log-probs from hidden states with tp_group",
    "the live rows of hidden states with tp_group", "a text",
)  # fmt: skip


def exchange(
    kind: str, values: Sequence[int], group: dist.ProcessGroup | None, device: torch.device
) -> list[list[int]]:
    """Every rank's `values`, as many on each: at most 31 integers. Every rank must call, for the same `kind`; else
    the same ValueError everywhere."""
    row = [_KINDS.index(kind), *values]
    table = all_gather_ints(row + [0] * (_WORDS - len(row)), group, device)
    kinds = [_KINDS[other[0]] for other in table]
    if any(other != kind for other in kinds):
        raise ranks_disagree(f"all ranks of the group must make the same calls in the same order, got by rank {kinds}")
    return [other[1 : len(row)] for other in table]


def all_gather_text(text: str, group: dist.ProcessGroup | None, device: torch.device) -> list[str]:
    """Every rank's text: its length, then its bytes."""
    own = list(text.encode())
    sizes = [row[0] for row in exchange("a text", [len(own)], group, device)]
    table = all_gather_ints(own + [0] * (max(sizes) - len(own)), group, device)
    return [bytes(row[:size]).decode() for row, size in zip(table, sizes, strict=True)]


def copies_in(group: dist.ProcessGroup | None, replicas: tuple[int, ...] | None) -> int:
    """How many ranks of `group` hold the same rows as this one, itself included; `replicas` as in Signals."""
    if replicas is None:
        return 1
    return max(1, len(set(replicas) & set(dist.get_process_group_ranks(group))))


def gather_signals(signals: Signals, group: dist.ProcessGroup | None, device: torch.device) -> Signals:
    """The rows of all ranks in rank order, on all ranks; each set of rows that several ranks hold once."""
    if world_size(group) == 1:
        return signals
    table = exchange("Signals.all_reduce()", describe(signals), group, device)
    gathered = gather_rows(signals, table, group, device)
    assert gathered is not None  # None comes only where no rank has Signals
    holders = set(dist.get_process_group_ranks(group))
    longest = max(row[_COPIES] for row in table)
    if longest:  # the ranks outside of the group that hold its members' rows hold the result's as well, or nobody does
        own = list(signals.replicas or ())
        table = all_gather_ints(own + [-1] * (longest - len(own)), group, device)
        holders |= {rank for row in table for rank in row if rank >= 0}
    return replace(gathered, replicas=tuple(sorted(holders)))


def gather_rows(
    signals: Signals | None, table: list[list[int]], group: dist.ProcessGroup | None, device: torch.device
) -> Signals | None:
    """The rows of all ranks in rank order, or None where no rank has signals. Every rank must call.

    A rank without signals passes None and takes part all the same. `table`: every rank's `describe`. It is compared
    before any row moves, so that a difference raises the same ValueError everywhere instead of ending in a collective
    of unequal sizes. Of ranks that hold the same rows the first counts.
    """
    made = [header for header in table if header[0] >= 0]
    if not made:
        return None
    if any(header[2:_SET] != made[0][2:_SET] for header in made):
        ways = [None if header[0] < 0 else _metadata(header) for header in table]
        raise ranks_disagree(f"signals of all ranks must agree in {METADATA_FIELDS}, got by rank {ways}")
    has_sum_sq, policy, supervised, norm_length, width = _metadata(made[0])
    dtype = torch.float64 if any(header[1] for header in made) else torch.float32
    rows, hidden = _gather_rows(signals, _counts(table), dtype, width, group, device)
    return Signals(rows, has_sum_sq, policy, supervised, norm_length, hidden)


_SET, _COPIES = 7, 8  # in a header: which set of rows the rank holds, and how many ranks do; 0 where no other does


def describe(signals: Signals | None) -> list[int]:
    """[rows or -1 for None, needs float64, *metadata, _SET, _COPIES], as integers."""
    if signals is None:
        return [-1, 0, 0, 0, 0, 0, 0, 0, 0]
    has_sum_sq, policy, supervised, norm_length, width = signals.metadata()
    wide = any(t is not None and t.dtype == torch.float64 for t in (signals.rows, signals.hidden))
    (bits,) = struct.unpack("<q", struct.pack("<d", norm_length or 0.0))
    indices = AGGREGATIONS.index(policy), AGGREGATIONS.index(supervised)
    size = len(signals.rows), int(wide), int(has_sum_sq), *indices, bits, -1 if width is None else width
    copies = signals.replicas or ()
    return [*size, zlib.crc32(repr(copies).encode()) if copies else 0, len(copies)]


def _counts(table: list[list[int]]) -> list[int]:
    """How many rows each rank brings: of those that hold the same, the first brings them all."""
    counts, brought = [], dict[tuple[int, int], int]()
    for rank, header in enumerate(table):
        rows, held = max(header[0], 0), (header[_SET], header[_COPIES])
        if header[0] >= 0 and header[_COPIES]:
            first = brought.setdefault(held, rank)
            if table[first][0] != header[0]:
                raise ranks_disagree(
                    "ranks that hold the same rows (those of one tp_group) must observe the same micro-batches, got "
                    f"{table[first][0]} rows on rank {first} of the group and {header[0]} on rank {rank}"
                )
            rows = rows if first == rank else 0
        counts.append(rows)
    return counts


def _metadata(header: list[int]) -> tuple[bool, str, str, float | None, int | None]:
    """What _describe wrote, back."""
    _, _, has_sum_sq, policy, supervised, bits, width, *_ = header
    (norm_length,) = struct.unpack("<d", struct.pack("<q", bits))
    aggregations = AGGREGATIONS[policy], AGGREGATIONS[supervised]
    return bool(has_sum_sq), *aggregations, norm_length or None, None if width < 0 else width


def _gather_rows(
    signals: Signals | None,
    counts: list[int],
    dtype: torch.dtype,
    width: int | None,
    group: dist.ProcessGroup | None,
    device: torch.device,
) -> tuple[Tensor, Tensor | None]:
    """One collective of blocks padded to the longest; hidden rows travel as further columns of their sequence."""
    columns = len(SIGNAL_COLUMNS)
    packed = torch.zeros((max(counts), columns + (width or 0)), dtype=dtype, device=device)
    if max(counts) > 0:
        if signals is not None:
            packed[: len(signals.rows), :columns] = signals.rows
            if signals.hidden is not None:
                packed[: len(signals.rows), columns:] = signals.hidden
        blocks = all_gather(packed, group)
        packed = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return packed[:, :columns], None if width is None else packed[:, columns:]


def mean_kl(kl: Tensor, tokens: Tensor, share: float, group: dist.ProcessGroup | None) -> Tensor:
    """Mean of the ranks' KL weighted by their live RL tokens, whether there is one, how many were not finite: (3,).

    `kl` and `tokens` are float64 0-d; every rank must call. share: 1 / how many ranks of the group hold this rank's
    tokens. A rank whose KL is not finite is left out, and is counted if it has tokens; one without tokens weighs
    nothing, whatever its KL. If no rank with a finite KL has tokens, because nobody observed this step, ranks weigh
    alike. If no KL is finite, nor their mean, there is no mean and at least one is counted.
    """
    finite, live = kl.abs() < torch.inf, (tokens > 0).double() * share
    clean, weight = torch.where(finite, kl, 0.0), torch.where(finite, tokens * share, 0.0)
    terms = torch.stack((clean * weight, weight, clean, finite.double(), torch.where(finite, 0.0, live)))
    weighted, weights, plain, ranks, bad = all_gather(terms, group).sum(0).unbind()
    mean = torch.where(weights > 0, weighted / weights, plain / ranks)
    there = (ranks > 0) & (mean.abs() < torch.inf)
    bad = bad.round()  # the shares of ranks that hold the same
    return torch.stack((mean, there.double(), torch.where(there, bad, bad.clamp(min=1.0))))
