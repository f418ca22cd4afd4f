"""A head whose vocabulary is spread over ranks: which columns are ours, and whole rows' statistics.

Shapes: R ranks, N rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed import all_gather, all_gather_ints
from .schemas import ELSEWHERE


@dataclass(frozen=True)
class VocabularyShard:
    """This rank's columns ``[start, start + width)`` of a vocabulary of ``total`` columns.

    Columns beyond ``total`` are padding and belong to no shard; a shard may be empty.
    """

    group: dist.ProcessGroup
    start: int
    width: int
    total: int

    @classmethod
    def of(
        cls, group: dist.ProcessGroup, columns: int, vocab_size: int | None, device: torch.device
    ) -> VocabularyShard:
        """Shards lie in rank order. Every rank must call; how many columns each has is exchanged on the host, and
        compared, so that ranks that disagree raise alike."""
        table = all_gather_ints([columns, -1 if vocab_size is None else vocab_size], group, device)
        sizes, totals = [row[0] for row in table], {row[1] for row in table}
        if len(totals) > 1:
            raise ValueError(f"vocab_size must be the same on all ranks of tp_group, got {sorted(totals)}")
        if vocab_size is not None and not 0 < vocab_size <= sum(sizes):
            raise ValueError(f"vocab_size must be in [1, {sum(sizes)}], the shards' columns, got {vocab_size}")
        if sum(sizes) == 0:
            raise ValueError("weight must have a row on at least one rank of tp_group, got empty shards on all")
        total = sum(sizes) if vocab_size is None else vocab_size
        start = sum(sizes[: dist.get_rank(group)])
        return cls(group, start, max(0, min(columns, total - start)), total)

    def local(self, targets: Tensor) -> Tensor:
        """Targets as columns of this shard; ELSEWHERE where another shard has them, or none."""
        inside = (targets >= self.start) & (targets < self.start + self.width)
        return torch.where(inside, targets - self.start, ELSEWHERE).to(targets.dtype)

    @staticmethod
    def no_statistics(count: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
        """What ``merge`` takes from a shard without columns."""
        zeros = torch.zeros(count, dtype=dtype, device=device)
        return zeros, zeros, zeros, torch.stack((zeros - torch.inf, zeros), 1)

    def merge(self, targets: Tensor, statistics: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``logprobs, entropy, sum_sq, normalizer`` of whole rows from those of this shard's columns, in one
        collective. All ranks get the same bits.

        With w_r = sum exp z over shard r / sum exp z over all: log p = log p_r + log w_r, the entropy is
        sum_r w_r (H_r - log w_r), and sum p^2 is sum_r w_r^2 (sum p^2)_r.
        """
        logprobs, entropy, sum_sq, normalizer = statistics
        dtype, ours = logprobs.dtype, self.local(targets) != ELSEWHERE
        logprobs = torch.where(ours, logprobs, 0.0)
        packed = torch.stack((normalizer[:, 0], normalizer[:, 1], entropy, sum_sq, logprobs, ours.to(dtype)))
        top_RN, log_sum_RN, entropy_RN, sum_sq_RN, logp_RN, owner_RN = all_gather(packed, self.group).double().unbind(1)
        # A shard without columns, or with nothing but -inf, has no mass: its own statistics mean nothing.
        empty_RN = top_RN == -torch.inf
        top_N = top_RN.amax(0)
        log_mass_RN = torch.where(empty_RN, -torch.inf, (top_RN - top_N) + log_sum_RN)
        log_sum_N = log_mass_RN.logsumexp(0)
        log_w_RN = log_mass_RN - log_sum_N
        w_RN = log_w_RN.exp()
        entropy_N = torch.where(w_RN == 0, 0.0, w_RN * (entropy_RN - log_w_RN)).sum(0)
        sum_sq_N = torch.where(w_RN == 0, 0.0, w_RN.square() * sum_sq_RN).sum(0)
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
