"""A head and its hidden states as the losses from hidden states take them, and all that is checked of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import products
from ..distributed import check_group
from ..objectives import GIFT
from ..shards import VocabularyShard
from ..tensors import FLOATS, INTS, plain_tensor
from ..types import TokenBatch
from .rows import as_rows, in_arithmetic_of, misfit


@dataclass(frozen=True)
class Head:
    """The head as one call uses it."""

    hidden: Tensor  # (..., H)
    weight: Tensor  # (V, H), without padded columns
    bias: Tensor | None
    dtype: torch.dtype  # of the products, and of the three but under float16's autocast
    columns: int  # of the whole vocabulary
    shard: VocabularyShard | None


def check_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, vocab_size: int | None,
    group: torch.distributed.ProcessGroup | None, chunk_tokens: int | None = None, call: int = 0,
) -> Head:  # fmt: skip
    """All that can be wrong with a head; and the dtype that autocast gives a linear layer. To bfloat16 it is brought
    here. From float16 a gradient would come rounded, and too early for a loss scale: what takes part in autograd casts
    by itself. ``call``: a checksum of what else ranks of a group must be given alike."""
    plain_tensor("hidden", hidden, FLOATS)
    plain_tensor("weight", weight, FLOATS)
    if bias is not None:
        plain_tensor("bias", bias, FLOATS)
    plain_tensor("targets", targets, INTS)
    if hidden.ndim < 1 or hidden.shape[:-1] != targets.shape:
        raise misfit("hidden", hidden, targets, "H")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"weight must have shape (V, {hidden.shape[-1]}), got {tuple(weight.shape)}")
    if hidden.shape[-1] == 0:
        raise ValueError("hidden must have at least one column, got none")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},) like weight's rows, got {tuple(bias.shape)}")
    of_bias = () if bias is None else (("bias", bias),)
    for name, value in (("weight", weight), *of_bias, ("targets", targets)):
        if value.device != hidden.device:
            raise ValueError(f"{name} must be on {hidden.device} like hidden, got {value.device}")
    cast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype is not torch.float64
    dtype = torch.get_autocast_dtype(hidden.device.type) if cast else hidden.dtype
    for name, value in (("weight", weight), *of_bias):
        if not cast and value.dtype is not dtype:
            raise TypeError(f"{name} must have dtype {hidden.dtype} like hidden, got {value.dtype}")
    if cast and dtype is not torch.float16:
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if vocab_size is not None and (isinstance(vocab_size, bool) or not isinstance(vocab_size, int)):
        raise TypeError(f"vocab_size must be an int or None, got {vocab_size!r}")
    shard = None
    if group is None:
        columns = weight.shape[0] if vocab_size is None else vocab_size
        if weight.shape[0] == 0:
            raise ValueError(
                "weight must have at least one row, got none: a ZeRO-3 shard is gathered by "
                "deepspeed.zero.GatheredParameters, and a rank's empty part of the vocabulary goes with tp_group"
            )
        if not 0 < columns <= weight.shape[0]:
            raise ValueError(f"vocab_size must be in [1, {weight.shape[0]}], weight's rows, got {vocab_size!r}")
        width = columns
    else:
        check_group("tp_group", group)
        if torch.distributed.get_world_size(group) < 1:
            raise ValueError("tp_group must contain this rank, got a group without it")
        if torch.compiler.is_compiling():
            raise RuntimeError("tp_group is not supported under torch.compile: call outside the compiled region")
        alike = {
            "hidden's width": hidden.shape[-1],
            "hidden's dtype (in products)": FLOATS.index(dtype),
            "targets' number": targets.numel(),
            "chunk_tokens": chunk_tokens or 0,
            "whether hidden requires grad": int(hidden.requires_grad and torch.is_grad_enabled()),
            "whether there is a bias": int(bias is not None),
            "function, objective, transform, mu and what the batch holds": call,
        }
        rows = targets.numel()
        chunk = chunk_tokens or products.chunk_rows(rows, weight.shape[0], dtype, hidden.device)
        shard = VocabularyShard.of(group, weight.shape[0], vocab_size, weight.device, chunk=chunk, call=alike)
        columns, width = shard.total, shard.width
    if width != weight.shape[0]:
        weight, bias = weight[:width], None if bias is None else bias[:width]
    return Head(hidden, weight, bias, dtype, columns, shard)


def base_of(
    gift: GIFT | None, batch: TokenBatch, head: Head, hidden: Tensor | None, weight: Tensor | None,
    bias: Tensor | None, vocab_size: int | None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """``base_logits, base_hidden, base_weight, base_bias`` as the operators take them."""
    if gift is None:
        for name, value in (("base_hidden", hidden), ("base_weight", weight), ("base_bias", bias)):
            if value is not None:
                raise ValueError(f"{name} must be None unless objective.supervised is GIFT, which alone reads it")
        return None, None, None, None
    if head.shard is not None:
        raise ValueError("tp_group is not supported with objective.supervised = GIFT")
    if (hidden is None) != (weight is None):
        missing = "base_hidden" if hidden is None else "base_weight"
        raise ValueError(f"{missing} must be given: base_hidden and base_weight go together")
    if bias is not None and hidden is None:
        raise ValueError("base_hidden must be given: base_bias is of the head that base_weight is")
    if hidden is None or weight is None:
        if batch.base_logits is None:
            raise ValueError(
                "batch.base_logits, or base_hidden and base_weight, must be given: objective.supervised = GIFT "
                "compares with the base model"
            )
        if batch.base_logits.shape[-1] != head.columns:
            expected = (*batch.targets.shape, head.columns)
            raise ValueError(f"batch.base_logits must have shape {expected}, got {tuple(batch.base_logits.shape)}")
        return as_rows(in_arithmetic_of(batch.base_logits, head.hidden.dtype)), None, None, None
    for name, value in (("base_hidden", hidden), ("base_weight", weight), ("base_bias", bias)):
        if value is not None and plain_tensor(name, value, FLOATS).device != batch.targets.device:
            raise ValueError(f"{name} must be on {batch.targets.device} like batch.targets, got {value.device}")
    hidden, weight = hidden.detach(), weight.detach()
    bias = None if bias is None else bias.detach()
    try:
        base = check_head(hidden, weight, bias, batch.targets, vocab_size, None)
    except (TypeError, ValueError) as error:
        raise type(error)(f"base_{error}") from error
    if base.columns != head.columns:
        raise ValueError(f"base_weight must have {head.columns} rows like weight, got {base.columns}")
    bias = None if base.bias is None else base.bias.to(base.dtype)
    return None, as_rows(base.hidden.to(base.dtype)), base.weight.to(base.dtype), bias


def check_chunk(chunk_tokens: int | None) -> None:
    if chunk_tokens is None:
        return
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be a positive int or None, got {chunk_tokens!r}")


def chunk_of(chunk_tokens: int | None, rows: int, head: Head) -> int:
    if head.shard is not None:  # the ranks' collectives are of one chunk each
        return head.shard.chunk
    if chunk_tokens is None:
        return products.chunk_rows(rows, head.weight.shape[0], head.dtype, head.hidden.device)
    return chunk_tokens
