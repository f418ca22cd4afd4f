"""What ranks exchange for the controller: ragged rows in one packed collective, and the KL.

Every rank computes from the same numbers in the same order (gathered in rank order, never reduced by the network), so
results are equal bit for bit on all ranks, and equal to those of one process that saw the rows of all.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .signals import AGGREGATIONS, METADATA_FIELDS, SIGNAL_COLUMNS, Signals

__all__ = ["all_gather", "all_gather_ints", "check_group", "gather_signals", "mean_kl", "world_size"]


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


def gather_signals(
    signals: Signals | None, group: dist.ProcessGroup | None, device: torch.device, tag: tuple[int, ...] = ()
) -> Signals | None:
    """The rows of all ranks in rank order, or None where no rank has signals. Every rank must call.

    A rank without signals passes None and takes part all the same. `tag` must be equal on all ranks. Sizes and the way
    the signals were made are exchanged and compared before any row moves, so that a difference raises the same
    ValueError everywhere instead of ending in a collective of unequal sizes.
    """
    if world_size(group) == 1:
        return signals
    table = all_gather_ints([*tag, *_describe(signals)], group, device)
    tags, headers = [row[: len(tag)] for row in table], [row[len(tag) :] for row in table]
    if any(other != tags[0] for other in tags):
        raise ValueError(f"controllers of all ranks must agree in (step, configuration), got by rank {tags}")
    counts = [max(header[0], 0) for header in headers]
    made = [header for header in headers if header[0] >= 0]
    if not made:
        return None
    if any(header[2:] != made[0][2:] for header in made):
        ways = [None if header[0] < 0 else _metadata(header) for header in headers]
        raise ValueError(f"signals of all ranks must agree in {METADATA_FIELDS}, got by rank {ways}")
    has_sum_sq, policy, supervised, norm_length, width = _metadata(made[0])
    dtype = torch.float64 if any(header[1] for header in made) else torch.float32
    rows, hidden = _gather_rows(signals, counts, dtype, width, group, device)
    return Signals(rows, has_sum_sq, policy, supervised, norm_length, hidden)


def _describe(signals: Signals | None) -> list[int]:
    """[rows or -1 for None, needs float64, *metadata], as integers."""
    if signals is None:
        return [-1, 0, 0, 0, 0, 0, 0]
    has_sum_sq, policy, supervised, norm_length, width = signals.metadata()
    wide = any(t is not None and t.dtype == torch.float64 for t in (signals.rows, signals.hidden))
    (bits,) = struct.unpack("<q", struct.pack("<d", norm_length or 0.0))
    indices = AGGREGATIONS.index(policy), AGGREGATIONS.index(supervised)
    return [len(signals.rows), int(wide), int(has_sum_sq), *indices, bits, -1 if width is None else width]


def _metadata(header: list[int]) -> tuple[bool, str, str, float | None, int | None]:
    """What _describe wrote, back."""
    _, _, has_sum_sq, policy, supervised, bits, width = header
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
    if signals is not None:
        packed[: len(signals.rows), :columns] = signals.rows
        if signals.hidden is not None:
            packed[: len(signals.rows), columns:] = signals.hidden
    if max(counts) > 0:
        blocks = all_gather(packed, group)
        packed = torch.cat([block[:count] for block, count in zip(blocks, counts, strict=True)])
    return packed[:, :columns], None if width is None else packed[:, columns:]


def mean_kl(kl: Tensor, tokens: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """(mean of the ranks' KL weighted by their live RL tokens, whether there is one, how many were not finite), 0-d.

    Arguments are float64 0-d; every rank must call. A rank whose KL is not finite is left out, and is counted if it has
    tokens; one without tokens weighs nothing, whatever its KL. If no rank with a finite KL has tokens, because nobody
    observed this step, ranks weigh alike. If no KL is finite, there is no mean and at least one is counted.
    """
    finite = kl.abs() < torch.inf
    clean, weight = torch.where(finite, kl, 0.0), torch.where(finite, tokens, 0.0)
    terms = torch.stack((clean * weight, weight, clean, finite.double(), (~finite & (tokens > 0)).double()))
    weighted, weights, plain, ranks, bad = all_gather(terms, group).sum(0).unbind()
    mean = torch.where(weights > 0, weighted / weights, plain / ranks)
    any_finite = ranks > 0
    return mean, any_finite, torch.where(any_finite, bad, bad.clamp(min=1.0))
