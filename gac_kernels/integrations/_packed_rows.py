"""Where the sequences of padding-free rows begin and end, from what transformers' collators hand to a model.

Shapes: B rows of T tokens, S sequences laid end to end in them, row after row; N = B T.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import IGNORE_INDEX

_HINT = (
    "a collator that returns cu_seq_lens_q says it, as DataCollatorWithFlattening(return_flash_attn_kwargs=True) does"
)


def boundaries(
    labels_BT: Tensor,
    *,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    position_ids: Tensor | None = None,
    sizes: tuple[int, ...] = (),
) -> Tensor | None:
    """Offsets ``(S + 1,)`` of the sequences in the N tokens, int64; None where each row is one sequence.

    Args:
        labels_BT: where ``-100`` stands, nothing counts.
        cu_seq_lens_q: ``(S + 1,)``, from 0 to N. No row may end inside a sequence.
        seq_idx: ``(B, T)``, of every token the number of its sequence; -1 for padding. A host sync.
        position_ids: ``(B, T)`` or ``(1, T)``: a sequence begins where they fall, or stay at the row's lowest. A host
            sync. Padding, where they do so too, makes no sequences.
        sizes: of the arguments that hold one value a sequence: for positions, which padding may disturb.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    B, T = labels_BT.shape
    for name, value in (("cu_seq_lens_q", cu_seq_lens_q), ("seq_idx", seq_idx), ("position_ids", position_ids)):
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if cu_seq_lens_q is not None:
        return _checked_offsets(cu_seq_lens_q.to(labels_BT.device), B, T)
    if seq_idx is not None:
        if tuple(seq_idx.shape) != (B, T):
            raise ValueError(f"seq_idx must have the labels' shape {(B, T)}, got {tuple(seq_idx.shape)}")
        return _offsets(seq_idx.diff(dim=1) != 0, B, T, labels_BT.device)
    positions = None if position_ids is None or T == 0 else _of_text(position_ids, B, T)
    if positions is None:
        return None
    steps = positions.diff(dim=1)
    restart = (steps < 0) | ((steps == 0) & (positions[:, 1:] == positions.amin(1, keepdim=True)))
    if not bool(restart.any()):
        return None
    offsets = _offsets(restart, B, T, labels_BT.device)
    return offsets if _several(labels_BT, offsets) or len(offsets) - 1 in set(sizes) - {B} else None


def _checked_offsets(offsets: Tensor, B: int, T: int) -> Tensor:
    if offsets.ndim == 2 and offsets.shape[0] == 1:
        offsets = offsets[0]
    if offsets.ndim != 1 or offsets.shape[0] < 2 or offsets.is_floating_point():
        raise ValueError(
            f"cu_seq_lens_q must be integers of shape (S + 1,), got {offsets.dtype} of shape {tuple(offsets.shape)}"
        )
    offsets = offsets.long()
    if offsets.device.type != "cpu" or torch.compiler.is_compiling():
        return offsets
    if int(offsets[0]) != 0 or int(offsets[-1]) != B * T or bool((offsets.diff() < 0).any()):
        raise ValueError(
            f"cu_seq_lens_q must rise from 0 to the number of tokens, {B * T}, without falling, got {offsets.tolist()}"
        )
    if B > 1 and not bool(torch.isin(torch.arange(0, B * T + 1, T), offsets).all()):
        raise ValueError(
            f"cu_seq_lens_q must have an offset wherever one of the {B} rows of {T} tokens ends, got {offsets.tolist()}"
        )
    return offsets


def _of_text(position_ids: Tensor, B: int, T: int) -> Tensor | None:
    """``(B or 1, T)``, of positions in several dimensions (images) the first; None where they are not these tokens'."""
    positions = position_ids[None] if position_ids.ndim == 1 else position_ids
    positions = positions[0] if positions.ndim == 3 else positions
    return positions if positions.ndim == 2 and positions.shape[1] == T and positions.shape[0] in (1, B) else None


def _offsets(begins: Tensor, B: int, T: int, device: torch.device) -> Tensor:
    """From ``(B or 1, T - 1)``, whether a token begins another sequence than the one before it."""
    first = torch.ones(B, 1, dtype=torch.bool, device=device)
    starts = torch.cat([first, begins.to(device).expand(B, T - 1)], dim=1).flatten().nonzero()[:, 0]
    return torch.cat([starts, starts.new_full((1,), B * T)])


def _several(labels_BT: Tensor, offsets: Tensor) -> bool:
    """Whether a row holds two sequences of which any token is predicted and counts."""
    B, T = labels_BT.shape
    live = labels_BT.ne(IGNORE_INDEX).flatten()
    live[offsets[:-1]] = False
    below = torch.nn.functional.pad(live.cumsum(0), (1, 0))
    counted = offsets[:-1][below[offsets].diff() > 0]
    return bool((torch.div(counted, T, rounding_mode="floor").bincount(minlength=B) > 1).any())


def check_per_sequence(name: str, value: Tensor | None, shape: tuple[int, ...], S: int) -> None:
    """ValueError for a value that is neither one a sequence nor, where that is allowed, one a token."""
    if value is not None and tuple(value.shape) not in ((S,), (S, 1), shape):
        raise ValueError(
            f"{name} must have shape ({S},), one for each of the {S} sequences packed into {shape[0]} row(s), or the "
            f"labels' {shape}, got {tuple(value.shape)}; {_HINT}"
        )


def flat(value: Tensor | None, shape: tuple[int, ...]) -> Tensor | None:
    """One a token: ``(N,)``. One a sequence: as it is."""
    return value if value is None or tuple(value.shape) != shape else value.reshape(-1)


def last_places(offsets: Tensor, N: int) -> Tensor:
    """``(N,)`` bool, True at the last token of a sequence, which predicts none of its own."""
    marks = torch.zeros(N + 1, dtype=torch.bool, device=offsets.device)
    return marks.index_fill(0, offsets.clamp(0, N), True)[1:]
