"""The data that flows through the package: one batch type in, one loss type out.

Shape legend, used as suffixes everywhere: ``N`` response tokens of a batch, ``S`` sequences, ``T`` tokens a
sequence (padded length), ``V`` vocabulary, ``H`` hidden width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .results import METRICS as METRICS
from .results import SCALARS as SCALARS
from .results import HybridLoss as HybridLoss
from .results import TokenLogprobs as TokenLogprobs
from .tensors import (
    FLOATS,
    INTS,
    check_mask,
    check_offsets,
    check_shape,
    holds_numbers,
    looks_free,
    plain_tensor,
    refuse_odd,
)
from .tensors import shape_text as shape_text

if TYPE_CHECKING:
    from .objectives import HybridObjective

IGNORE_INDEX = -100


def _check_tensor(name: str, value: object, dtypes: tuple[torch.dtype, ...], device: torch.device | None) -> Tensor:
    tensor = plain_tensor(name, value, dtypes)
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} must be on {device} like targets, got {tensor.device}")
    return tensor


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Response tokens of ``S`` sequences with everything a hybrid loss needs to know about them.

    Build one with :meth:`from_padded` or :meth:`from_packed`; both validate shapes, dtypes and devices and neither
    reads a value back from an accelerator. Targets are already shifted: logits row ``t`` predicts targets row ``t``.

    Attributes:
        targets: ``(S, T)`` padded or ``(N,)`` packed, int32 or int64 token ids.
        mask: bool, shaped as ``targets``; False where a token takes no part. Places holding ``-100`` are False.
        cu_seqlens: ``(S + 1,)`` int64 offsets of a packed batch, else None.
        is_expert: ``(S,)`` bool, True for demonstrations.
        advantages: ``(S,)`` or shaped as ``targets`` (one a sequence where the two are the same), or None when the
            batch holds demonstrations only.
        old_logprobs: log-probs under the policy that sampled; None means on-policy (ratio 1, slope alive).
        ref_logprobs: log-probs under the reference model of the KL penalty.
        rollout_weights: detached importance weights that multiply the policy term of rollouts and never their KL or
            entropy bonus; on demonstrations they multiply the supervised term.
        token_weights: detached weights of all that a token adds to the loss: policy term, KL and entropy bonus of
            rollouts, supervised term of demonstrations. Neither weight changes what the loss is divided by.
        base_logits: ``(*targets.shape, V)`` logits of the base model, needed by GIFT.
        groups: ``(S,)`` integer ids of the prompt each sequence answers, needed by DFPO.
    """

    targets: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    is_expert: Tensor
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None
    base_logits: Tensor | None = None
    groups: Tensor | None = None
    token_weights: Tensor | None = None

    @classmethod
    def from_padded(
        cls,
        targets_ST: Tensor,
        mask_ST: Tensor,
        *,
        is_expert_S: Tensor | None = None,
        advantages: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        token_weights: Tensor | None = None,
        base_logits: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> TokenBatch:
        """A batch of ``S`` rows padded to ``T``; padding may stand left, right or in between.

        Args:
            targets_ST: ``(S, T)`` int32/int64 target ids; ``-100`` masks a place.
            mask_ST: ``(S, T)`` bool, or 0 and 1 in numbers, of the tokens that count.
            is_expert_S: ``(S,)`` bool; None means every row is a rollout.
            advantages: ``(S,)`` or ``(S, T)`` float. May be None if and only if every row is a demonstration.
            old_logprobs, ref_logprobs: ``(S, T)`` float.
            rollout_weights, token_weights: ``(S, T)``, or one a sequence, ``(S,)`` or ``(S, 1)``; float, not negative.
            base_logits: ``(S, T, V)`` float.
            groups: ``(S,)`` integer ids, in any order.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came. On a CPU also where a value
                that is read is nan or infinite (advantages, old_logprobs, ref_logprobs at tokens of rollouts, weights
                at all tokens that count), or a weight is negative. On an accelerator nobody looks: see the FAQ.
        """
        _check_tensor("targets_ST", targets_ST, INTS, None)
        if targets_ST.ndim != 2:
            raise ValueError(f"targets_ST must be two-dimensional (S, T), got shape {tuple(targets_ST.shape)}")
        return cls._build(
            "mask_ST", targets_ST, mask_ST, None, targets_ST.shape[0], is_expert_S, advantages,
            {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_weights": rollout_weights,
             "token_weights": token_weights},
            base_logits, groups,
        )  # fmt: skip

    @classmethod
    def from_packed(
        cls,
        targets_N: Tensor,
        cu_seqlens: Tensor,
        *,
        mask_N: Tensor | None = None,
        is_expert_S: Tensor | None = None,
        advantages: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        token_weights: Tensor | None = None,
        base_logits: Tensor | None = None,
        groups: Tensor | None = None,
    ) -> TokenBatch:
        """A batch of ``S`` sequences laid end to end; sequence ``s`` owns ``[cu_seqlens[s], cu_seqlens[s + 1])``.

        Args:
            targets_N: ``(N,)`` int32/int64 target ids; ``-100`` masks a place.
            cu_seqlens: ``(S + 1,)`` int32/int64, from 0 to ``N``, never falling. Checked here where that costs no
                device sync (CPU); on an accelerator, and under torch.compile, every offset is clamped to ``[0, N]`` and
                one that falls is raised to the largest before it: its sequence is empty.
            mask_N: ``(N,)`` mask; None means that every token counts.
            is_expert_S, advantages, groups: as in :meth:`from_padded`; advantages ``(S,)`` or ``(N,)``.
            old_logprobs, ref_logprobs: ``(N,)`` float. base_logits: ``(N, V)`` float.
            rollout_weights, token_weights: ``(N,)``, or one a sequence, ``(S,)`` or ``(S, 1)``; float, not negative.
        """
        _check_tensor("targets_N", targets_N, INTS, None)
        if targets_N.ndim != 1:
            raise ValueError(f"targets_N must be one-dimensional (N,), got shape {tuple(targets_N.shape)}")
        _check_tensor("cu_seqlens", cu_seqlens, INTS, targets_N.device)
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must have shape (S + 1,), got {tuple(cu_seqlens.shape)}")
        cu_seqlens = cu_seqlens.long().contiguous()
        check_offsets(cu_seqlens, targets_N.shape[0])
        if mask_N is None:
            mask_N = torch.ones_like(targets_N, dtype=torch.bool)
        return cls._build(
            "mask_N", targets_N, mask_N, cu_seqlens, cu_seqlens.shape[0] - 1, is_expert_S, advantages,
            {"old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs, "rollout_weights": rollout_weights,
             "token_weights": token_weights},
            base_logits, groups,
        )  # fmt: skip

    @classmethod
    def _build(
        cls,
        mask_name: str,
        targets: Tensor,
        mask: Tensor,
        cu_seqlens: Tensor | None,
        num_sequences: int,
        is_expert: Tensor | None,
        advantages: Tensor | None,
        per_token: dict[str, Tensor | None],
        base_logits: Tensor | None,
        groups: Tensor | None,
    ) -> TokenBatch:
        device, shape, rows = targets.device, tuple(targets.shape), (num_sequences,)
        _check_tensor(mask_name, mask, (torch.bool, torch.uint8, torch.int32, torch.int64, *FLOATS), device)
        check_shape(mask_name, mask, shape)
        check_mask(mask_name, mask)
        if is_expert is not None:
            _check_tensor("is_expert_S", is_expert, (torch.bool,), device)
            check_shape("is_expert_S", is_expert, rows)
        if advantages is not None:
            _check_tensor("advantages", advantages, FLOATS, device)
            check_shape("advantages", advantages, rows, shape)
        elif num_sequences and (is_expert is None or _has_rollouts(is_expert)):
            raise ValueError("advantages must be given: (S,) or one a token, because the batch holds rollout sequences")
        for name, value in per_token.items():
            if value is not None:
                _check_tensor(name, value, FLOATS, device)
                by_sequence = (rows, (*rows, 1)) if name.endswith("weights") else ()
                check_shape(name, value, shape, *by_sequence)
        if base_logits is not None:
            _check_tensor("base_logits", base_logits, FLOATS, device)
            if tuple(base_logits.shape[:-1]) != shape:
                raise ValueError(
                    f"base_logits must have shape {shape_text(shape, 'V')}, got {tuple(base_logits.shape)}"
                )
        if groups is not None:
            _check_tensor("groups", groups, INTS, device)
            check_shape("groups", groups, rows)
        if is_expert is None:
            is_expert = torch.zeros(rows, dtype=torch.bool, device=device)
        batch = cls(
            targets=targets,
            mask=mask.bool() & targets.ne(IGNORE_INDEX),
            cu_seqlens=cu_seqlens,
            is_expert=is_expert.contiguous(),
            advantages=None if advantages is None else advantages.detach(),
            base_logits=None if base_logits is None else base_logits.detach(),
            groups=None if groups is None else groups.long().contiguous(),
            **{name: None if value is None else value.detach() for name, value in per_token.items()},
        )
        by_token = {
            name: batch._by_token(value)
            for name in ("rollout_weights", "token_weights")
            if (value := getattr(batch, name)) is not None
        }
        batch = replace(batch, **by_token) if by_token else batch
        batch._check_values()
        return batch

    def _by_token(self, value: Tensor) -> Tensor:
        """One a token of what is one a token or one a sequence, ``(S,)`` or ``(S, 1)``."""
        shape, S = self.targets.shape, self.num_sequences
        if value.shape == shape and (self.cu_seqlens is None or value.shape != (S,)):
            return value
        value_S = value.reshape(-1)
        if self.cu_seqlens is None:
            return value_S[:, None].expand(shape)
        if S == 0:
            return value_S.new_zeros(shape)
        offsets, position_N = rising_offsets(self.cu_seqlens, shape[0]), torch.arange(shape[0], device=value.device)
        return value_S.index_select(0, torch.bucketize(position_N, offsets[1:], right=True).clamp(max=S - 1))

    def _check_values(self) -> None:
        """What engines return holds numbers at the tokens that read it: looked at where that costs no device sync. One
        pass over each tensor, and no more where it holds nothing odd anywhere."""
        if not looks_free(self.mask):
            return
        for name in ("advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "token_weights"):
            value = getattr(self, name)
            weight = name.endswith("weights")
            if value is None or holds_numbers(value, weight):
                continue
            read = self.mask if weight else self.mask & self._by_token((~self.is_expert).float()).bool()
            at = self._by_token(value) if name == "advantages" else value
            refuse_odd(name, at, read, weight)

    @property
    def returned(self) -> tuple[Tensor, ...]:
        """What engines return of rollouts' tokens, as far as it was given."""
        given = self.old_logprobs, self.ref_logprobs, self.rollout_weights
        return tuple(value for value in given if value is not None)

    def read_by(self, objective: HybridObjective) -> TokenBatch | None:
        """This batch as ``unscored`` counts it: without reference log-probs where no penalty reads them; None where
        nothing that engines return is read."""
        unread = self.ref_logprobs is not None and not objective.kl_coef
        batch = replace(self, ref_logprobs=None) if unread else self
        return batch if batch.returned else None

    def unscored(self) -> Tensor:
        """Live tokens of rollouts at which one of these is nan or infinite, float32 0-d: their RL term is nothing."""
        live = self.mask & self._by_token((~self.is_expert).float()).bool()
        odd = torch.stack([~value.isfinite() for value in self.returned]).any(0)
        return (live & odd).sum().float()

    def to(self, device: torch.device | str) -> TokenBatch:
        """The same batch on another device; itself where all of it is there already."""
        held = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        moved = {name: value.to(device) for name, value in held.items()}
        return self if all(moved[name] is value for name, value in held.items()) else replace(self, **moved)

    def _counts(self, objective: HybridObjective) -> Tensor:
        """What the policy's and the supervised branch divide by, float64 ``(2,)``."""
        if self.cu_seqlens is None:
            live_S = self.mask.sum(1)
        else:
            below = torch.nn.functional.pad(self.mask.cumsum(0), (1, 0))
            live_S = below[rising_offsets(self.cu_seqlens, self.mask.shape[0])].diff()
        branches = ((~self.is_expert, objective.aggregation), (self.is_expert, objective.supervised_aggregation))
        counted = [((live_S if how == "token-mean" else live_S > 0) * rows_S).sum() for rows_S, how in branches]
        return torch.stack(counted).double()

    @property
    def num_sequences(self) -> int:
        """``S``, known to the host."""
        return self.is_expert.shape[0]

    @property
    def max_length(self) -> int | None:
        """``T`` of a padded batch, None for a packed one (its longest sequence is not known to the host)."""
        return self.targets.shape[1] if self.cu_seqlens is None else None


def _has_rollouts(is_expert: Tensor) -> bool:
    """Looked at where that costs no device sync; elsewhere nobody says so."""
    return looks_free(is_expert) and not bool(is_expert.all())


def rising_offsets(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """Offsets as every backend takes them, in ``[0, tokens]`` and never falling, whatever they hold: each is clamped
    there, and raised to the largest before it. So no token is in two sequences, and what falls is an empty one."""
    return cu_seqlens.clamp(0, tokens).cummax(0).values


@dataclass(frozen=True, eq=False)
class Denominators:
    """Global counts that a branch's loss is divided by, instead of this batch's own.

    Under gradient accumulation or data parallelism give the counts of the whole optimizer step; micro-batches then add
    up to exactly the loss of one batch. What is counted follows the aggregation: tokens for ``token-mean``, sequences
    with at least one token for the three ``seq-mean-*``. A field left None uses the batch's own count.
    """

    policy: float | Tensor | None = None
    supervised: float | Tensor | None = None

    @classmethod
    def of(
        cls,
        batches: TokenBatch | Iterable[TokenBatch],
        objective: HybridObjective,
        *,
        group: torch.distributed.ProcessGroup | None = None,
    ) -> Denominators:
        """The counts of an optimizer step: of all its micro-batches and all ranks, as 0-d tensors; no host sync.

        They are divided by the number of ranks, for DDP and FSDP average the gradients of as many losses. Where
        gradients are summed over ranks instead, multiply them by it.

        Args:
            batches: this rank's micro-batches of the step, one at least, all on one device.
            objective: whose two aggregations say what is counted.
            group: the ranks that share the step; None: all, if torch.distributed is initialised. Each must call, with
                the same aggregations: else ValueError on all of them, on a device counts that are nan.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        batches = [batches] if isinstance(batches, TokenBatch) else list(batches)
        if not batches:
            raise ValueError("batches must hold at least one TokenBatch, got none")
        if odd := [one for one in batches if not isinstance(one, TokenBatch)]:
            raise TypeError(f"batches must be TokenBatches, got {type(odd[0]).__name__}")
        if not hasattr(objective, "supervised_aggregation"):
            raise TypeError(f"objective must be a HybridObjective, got {type(objective).__name__}")
        if group is not None and not isinstance(group, torch.distributed.ProcessGroup):
            raise TypeError(f"group must be a process group or None, got {type(group).__name__}")
        counts = torch.stack([one._counts(objective) for one in batches]).sum(0)
        ranks = 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size(group)
        if ranks > 1:
            counts = _over_ranks(counts, (objective.aggregation, objective.supervised_aggregation), group)
        policy, supervised = (counts / ranks).unbind()
        return cls(policy, supervised)


def _over_ranks(counts: Tensor, ways: tuple[str, str], group: torch.distributed.ProcessGroup | None) -> Tensor:
    """The sums over ranks. What ranks count travels with them: nan, and ValueError on a CPU, if it is not the same."""
    code = zlib.crc32(repr(ways).encode()) % 4096
    packed = torch.cat((counts, counts.new_full((1,), code), counts.new_full((1,), code * code)))
    torch.distributed.all_reduce(packed, group=group)
    same = packed[2].square() == packed[3] * torch.distributed.get_world_size(group)  # equal codes only: Cauchy-Schwarz
    if packed.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(same):
        raise ValueError(f"the aggregations of objective must be the same on all ranks, got {ways} on this one")
    return torch.where(same, packed[:2], torch.nan)
