"""Logits of any leading shape as the row operators take them, and what is checked of them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import LogitTransform
from ..overlap import overlaps_itself
from ..tensors import FLOATS, INTS, NUMBERS, check_mask, looks_free, plain_tensor, shape_text
from ..types import IGNORE_INDEX, TokenBatch, rising_offsets


def check_logits(name: str, logits: Tensor, targets: Tensor) -> None:
    plain_tensor(name, logits, FLOATS)
    plain_tensor("targets", targets, INTS)
    if logits.ndim < 1 or logits.shape[:-1] != targets.shape:
        raise misfit(name, logits, targets, "V")
    if logits.shape[-1] == 0:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(logits.shape)}")
    if logits.device != targets.device:
        raise ValueError(f"{name} must be on {targets.device} like targets, got {logits.device}")


def misfit(name: str, value: Tensor, targets: Tensor, last: str) -> ValueError:
    """The error for logits or hidden states whose leading shape is not the targets', with the usual cure."""
    text = f"{name} must have shape {shape_text(targets.shape, last)} to match targets, got {tuple(value.shape)}"
    leading = tuple(value.shape[:-1])
    if targets.ndim and leading == (*targets.shape[:-1], targets.shape[-1] + 1):
        text += f"; targets are shifted, so that the last place predicts none of them: give {name}[..., :-1, :]"
    elif leading == (1, *targets.shape):
        text += f"; give {name}[0]"
    return ValueError(text)


def check_targets(name: str, targets: Tensor, live: Tensor, V: int) -> None:
    """Live targets lie in ``[0, V)``: looked at where that costs no device sync."""
    if targets.device.type != "cpu" or targets.numel() == 0 or torch.compiler.is_compiling():
        return
    low, high = (int(bound) for bound in torch.where(live, targets, 0).aminmax())
    if low < 0 or high >= V:
        raise ValueError(f"{name} must be in [0, {V}) or -100, got {low} to {high}")


def live_places(targets: Tensor, mask: Tensor | None) -> Tensor:
    """Bool, shaped as the targets: where the mask is not 0 and the target is not -100."""
    live = targets.ne(IGNORE_INDEX)
    if mask is None:
        return live
    plain_tensor("mask", mask, (torch.bool, *NUMBERS))
    if mask.shape != targets.shape:
        raise ValueError(f"mask must have the targets' shape {tuple(targets.shape)}, got {tuple(mask.shape)}")
    if mask.device != targets.device:
        raise ValueError(f"mask must be on {targets.device} like targets, got {mask.device}")
    check_mask("mask", mask)
    return mask.bool() & live


def as_rows(logits: Tensor) -> Tensor:
    """``(..., V)`` as ``(A, B, V)`` with stride 1 in V: a view wherever strides allow, else a contiguous copy."""
    if logits.shape[-1] > 1 and logits.stride(-1) != 1:
        logits = logits.contiguous()
    if logits.ndim > 3:
        return logits.flatten(0, -3)
    return logits[(None,) * (3 - logits.ndim)]


def in_arithmetic_of(base: Tensor, dtype: torch.dtype) -> Tensor:
    """GIFT's base logits beside logits of ``dtype``: 16 bits and float32 may differ and are read as they are, for sums
    are float32; with float64 on one side the base is taken to what the logits' sums are made in."""
    acc = torch.promote_types(dtype, torch.float32)
    return base if torch.promote_types(base.dtype, torch.float32) is acc else base.to(acc)


def check_writable(logits: Tensor, rows: Tensor) -> None:
    """In place: ``rows`` is a view of ``logits``, and no two rows share memory."""
    if rows.numel() == 0:
        return
    if rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            f"logits must have neighbouring columns and at most two independent row strides to be overwritten with "
            f"inplace=True, got strides {tuple(logits.stride())} for shape {tuple(logits.shape)}"
        )
    if overlaps_itself(rows):
        raise ValueError(
            f"logits must not overlap themselves to be overwritten with inplace=True, got strides "
            f"{tuple(logits.stride())} for shape {tuple(logits.shape)}"
        )


def row_temperature(transform: LogitTransform, where: TokenBatch | Tensor, dtype: torch.dtype) -> Tensor | None:
    """One temperature a row, or None where one number holds for all. ``where`` is the batch, or targets whose first
    dimension is the sequences."""
    if not isinstance(transform.temperature, Tensor):
        return None
    batch = where if isinstance(where, TokenBatch) else None
    targets = where.targets if isinstance(where, TokenBatch) else where
    temperature_S = plain_tensor("transform.temperature", transform.temperature, FLOATS).detach().to(dtype)
    count = batch.num_sequences if batch is not None else targets.shape[0] if targets.ndim else 1
    if temperature_S.shape != (count,):
        raise ValueError(
            f"transform.temperature must have shape ({count},), one a sequence, got {tuple(temperature_S.shape)}"
        )
    if temperature_S.device != targets.device:
        raise ValueError(f"transform.temperature must be on {targets.device}, got {temperature_S.device}")
    if looks_free(temperature_S) and not bool(((temperature_S > 0) & temperature_S.isfinite()).all()):
        raise ValueError(f"transform.temperature must be finite and > 0, got {temperature_S.tolist()}")
    if batch is None or batch.cu_seqlens is None:
        return temperature_S.view(-1, *(1,) * (targets.ndim - 1)).expand(targets.shape).reshape(-1).contiguous()
    if count == 0:  # and all tokens are of no sequence
        return temperature_S.new_ones(targets.shape[0])
    position_N = torch.arange(targets.shape[0], device=targets.device)
    offsets = rising_offsets(batch.cu_seqlens, targets.shape[0])
    ids_N = torch.bucketize(position_N, offsets[1:], right=True).clamp(max=count - 1)
    return temperature_S.index_select(0, ids_N)
