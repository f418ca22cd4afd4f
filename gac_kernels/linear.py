"""Rows of hidden states through a head, chunk by chunk: no logits beyond a chunk exist.

A chunk is three matrix products with the row operator between them: logits = h W^T, the gradient written over them, and
from it dh = dz W and dW += dz^T h. Where slopes wait for all log-probs there are two looks, and the first product is
made again.

Shapes: N rows in (A, B), R of them live, H hidden width, V columns of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .schemas import DEMONSTRATION, decode
from .shards import VocabularyShard

_HALVES = (torch.bfloat16, torch.float16)
# Bytes of a chunk's logits. On a GPU products of a few thousand rows run at full speed; on a CPU a few hundred do.
CHUNK_BYTES = {"cpu": 160 << 20, "other": 768 << 20}
_BLOCK_ROWS = 1024  # of a head that is widened block by block: a few megabytes, which stay in cache


def chunk_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows a chunk when the caller does not say: as few chunks as keep the logits within CHUNK_BYTES, of one size."""
    wide = products_in_float32(device, dtype)
    bytes_of_row = max(1, columns) * (4 if wide else dtype.itemsize)
    most = max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["other"]) // bytes_of_row // 16 * 16)
    chunks = max(1, -(-rows // most))
    return max(1, min(rows, -(-rows // chunks + 15) // 16 * 16 if chunks > 1 else rows))


@lru_cache
def _multiplies_halves() -> bool:
    """Whether the CPU has instructions for bfloat16 products. Without them PyTorch takes several times as long as for
    float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def products_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are made in float32 here."""
    return device.type == "cpu" and dtype in _HALVES and not (dtype is torch.bfloat16 and _multiplies_halves())


class _Head:
    """``x W^T + b``, and back. Where products are in float32 the weight is widened a block of columns at a time: there
    never is a float32 copy of the head."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.columns, self.width = weight.shape
        self.wide = products_in_float32(weight.device, weight.dtype)
        self.dtype = torch.float32 if self.wide else weight.dtype
        self._scratch: Tensor | None = None
        self._buffer: Tensor | None = None

    def _blocks(self) -> Iterator[tuple[slice, Tensor]]:
        if not self.wide:
            yield slice(0, self.columns), self.weight
            return
        if self._scratch is None:
            self._scratch = self.weight.new_empty((min(_BLOCK_ROWS, self.columns), self.width), dtype=torch.float32)
        for begin in range(0, self.columns, _BLOCK_ROWS):
            end = min(begin + _BLOCK_ROWS, self.columns)
            yield slice(begin, end), self._scratch[: end - begin].copy_(self.weight[begin:end])

    def logits(self, x_RH: Tensor) -> Tensor:
        """``(R, V)`` in a buffer that the next call writes again. Rows begin on 64 bytes."""
        rows = len(x_RH)
        if self._buffer is None or len(self._buffer) < rows:
            across = -(-self.columns // 32) * 32
            self._buffer = x_RH.new_empty((rows, across), dtype=self.dtype)
        logits_RV = self._buffer[:rows, : self.columns]
        for columns, weight in self._blocks():
            torch.mm(x_RH, weight.t(), out=logits_RV[:, columns])
        if self.bias is not None:
            logits_RV += self.bias
        return logits_RV


class _Gradients:
    """The sums over chunks: dh in its rows, dW and db in at least float32."""

    def __init__(self, head: _Head, hidden: Tensor, chunks: int, want_hidden: bool, want_weight: bool, want_bias: bool):
        self.head, self.single = head, chunks == 1
        acc = torch.promote_types(hidden.dtype, torch.float32)
        weight = head.weight
        self.hidden = hidden.new_empty(hidden.shape) if want_hidden else None
        # One chunk's product is rounded once, whatever dtype it is written in.
        of_weight = weight.dtype if self.single else acc
        self.weight = weight.new_empty(weight.shape, dtype=of_weight) if want_weight else None
        self.bias = weight.new_zeros(head.columns, dtype=acc) if want_bias else None
        self.begun = False

    def add(self, dz_RV: Tensor, x_RH: Tensor, rows: slice) -> None:
        head, dx_RH = self.head, None
        for columns, weight in head._blocks() if self.hidden is not None else ():
            dz = dz_RV[:, columns]
            dx_RH = dz @ weight if dx_RH is None else dx_RH.addmm_(dz, weight)
        if self.hidden is not None:
            self.hidden[rows] = 0 if dx_RH is None else dx_RH
        if self.weight is not None:
            self._add_weight(dz_RV, x_RH)
        if self.bias is not None:
            self.bias += dz_RV.sum(0, dtype=self.bias.dtype)
        self.begun = True

    def _add_weight(self, dz_RV: Tensor, x_RH: Tensor) -> None:
        assert self.weight is not None
        if self.weight.dtype is x_RH.dtype:
            if self.begun:
                self.weight.addmm_(dz_RV.t(), x_RH)
            else:
                torch.mm(dz_RV.t(), x_RH, out=self.weight)
        elif self.single:  # products in float32, the result in 16 bits
            for begin in range(0, self.head.columns, _BLOCK_ROWS):
                end = min(begin + _BLOCK_ROWS, self.head.columns)
                self.weight[begin:end] = dz_RV[:, begin:end].t() @ x_RH
        elif x_RH.device.type == "cpu":  # whose products write no wider dtype than they read
            if not self.begun:
                self.weight.zero_()
            self.weight.addmm_(dz_RV.t().float(), x_RH.float())
        else:
            if not self.begun:
                self.weight.zero_()
            torch.addmm(self.weight, dz_RV.t(), x_RH, out_dtype=torch.float32, out=self.weight)

    def results(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, none = self.head.weight, hidden.new_empty(0)
        if self.weight is not None and not self.begun:
            self.weight.zero_()
        return (
            none if self.hidden is None else self.hidden,
            none if self.weight is None else self.weight.to(weight.dtype),
            none if self.bias is None else self.bias.to(weight.dtype),
        )


@dataclass
class _Base:
    """Where GIFT's base logits come from, a chunk at a time."""

    logits_NV: Tensor | None
    hidden: Tensor | None
    head: _Head | None

    @classmethod
    def of(cls, logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> _Base:
        return cls(logits, hidden, None if weight is None else _Head(weight, bias))

    def __bool__(self) -> bool:
        return self.logits_NV is not None or self.head is not None

    def rows(self, chosen: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
        source = self.logits_NV if self.logits_NV is not None else self.hidden
        assert source is not None
        part = _pick(source, rows if chosen is None else chosen[rows])
        part = part.to(dtype if self.head is None else self.head.dtype)
        return part if self.head is None else self.head.logits(part).to(dtype)


class _Live:
    """The live rows in the order of work, and their way back. With GIFT rollouts come first: only demonstrations need
    the base model."""

    def __init__(self, kind: Tensor, chunk: int, gift: bool) -> None:
        count = kind.numel()
        capturing = kind.is_cuda and torch.cuda.is_current_stream_capturing()
        self.total, self.split = count, 0
        self.chosen: Tensor | None = None
        if not capturing:  # a host that may not wait for the count takes all rows as they are
            if gift:
                rollouts = ((kind != 0) & (kind != DEMONSTRATION)).nonzero()[:, 0]
                self.split = len(rollouts)
                self.chosen = torch.cat((rollouts, (kind == DEMONSTRATION).nonzero()[:, 0]))
            else:
                self.chosen = kind.nonzero()[:, 0]
                if len(self.chosen) == count:
                    self.chosen = None
        self.count = count if self.chosen is None else len(self.chosen)
        begins = [(0, self.split), (self.split, self.count)]
        self.chunks = [slice(b, min(b + chunk, end)) for begin, end in begins for b in range(begin, end, chunk)]

    def take(self, value: Tensor | None) -> Tensor | None:
        return value if value is None or self.chosen is None else value.index_select(0, self.chosen)

    def rows_of(self, hidden: Tensor, dtype: torch.dtype) -> Tensor:
        return _pick(hidden, slice(None) if self.chosen is None else self.chosen).to(dtype)

    def put(self, value_R: Tensor) -> Tensor:
        """One a row of the batch again; 0 in dead rows."""
        if self.chosen is None:
            return value_R
        return value_R.new_zeros((self.total, *value_R.shape[1:])).index_copy_(0, self.chosen, value_R)


def _pick(source: Tensor, which: slice | Tensor) -> Tensor:
    """Rows of ``(A, B, X)`` as ``(R, X)``; strided ones are not copied for it, beyond those that are picked."""
    width = source.shape[1]
    if source.is_contiguous() or source.shape[0] == 1:
        return source.flatten(0, 1)[which]
    if isinstance(which, slice):
        return source.reshape(-1, source.shape[2])[which]
    return source[which // width, which % width]


def _as_written(function: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """Without autograd, and in the dtypes that stand there: autocast would take products of float32 to 16 bits."""

    @wraps(function)
    def run(hidden: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *args, **options)

    return run


@_as_written
def linear_loss(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None,
    weight_N: Tensor, advantages: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, chunk: int, want_hidden: bool, want_weight: bool, want_bias: bool, *static: Any,
    shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary."""
    head, base = _Head(weight, bias), _Base.of(base_logits, base_hidden, base_weight, base_bias)
    live = _Live(kind, chunk, bool(base))
    x_RH = live.rows_of(hidden, head.dtype)
    rows = [live.take(value) for value in (targets, kind, temperature)]
    tokens = [live.take(value) for value in (weight_N, advantages, old_logprobs, ref_logprobs, rollout_weights)]
    gradients = _Gradients(head, x_RH, len(live.chunks), want_hidden, want_weight, want_bias)
    collected = []
    for part in live.chunks:
        x = x_RH[part]
        logits = head.logits(x)[None]
        of_rows, of_tokens = _cut(rows, part), _cut(tokens, part)
        if shard is None:
            base_rows = base.rows(live.chosen, part, head.dtype)[None] if base and part.start >= live.split else None
            results = library.call("fused_rows_", logits, *of_rows, base_rows, *of_tokens, *static)
        else:
            results = _fused_shard(shard, logits, of_rows, of_tokens, static)
        collected.append(_with_supervised(results, bool(base)))
        gradients.add(logits[0], x, part)
    gradient, *others = gradients.results(x_RH)
    if want_hidden:
        gradient = _reduced(gradient, shard)
        gradient = live.put(gradient).to(hidden.dtype).view(hidden.shape)
    return *_joined(collected, live, hidden, (None, None, None, None), bool(base)), gradient.to(hidden.dtype), *others


def _fused_shard(
    shard: VocabularyShard, logits: Tensor, rows: list[Any], tokens: list[Any], static: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    """``fused_rows_`` of rows of which this rank holds some columns."""
    targets, kind, temperature = rows
    logprobs, entropy, sum_sq, normalizer = _statistics_shard(shard, logits, rows, static[:5])
    objective = decode(*static[5:])
    weight, advantages, old, ref, rollout = tokens
    slope, entropy_slope = reference.token_slopes(logprobs, kind, weight, advantages, old, ref, rollout, objective)
    bonus = entropy_slope if objective.entropy_coef else None
    if logits.shape[-1]:
        local = shard.local(targets)
        given = normalizer, entropy, slope, bonus
        library.call("row_gradient_", logits, local, kind, temperature, None, *given, *static[:5])
    return logprobs, entropy, sum_sq, entropy.new_empty(0)


def _statistics_shard(
    shard: VocabularyShard, logits: Tensor, rows: list[Any], static: tuple[Any, ...]
) -> tuple[Tensor, ...]:
    targets, kind, temperature = rows
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if logits.shape[-1]:
        local = shard.local(targets)
        own = library.call("row_statistics", logits, local, kind, temperature, None, *static)[:4]
    else:
        own = shard.no_statistics(len(targets), dtype, logits.device)
    return shard.merge(targets, own)


@_as_written
def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None,
    chunk: int, *static: Any, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary."""
    head, base = _Head(weight, bias), _Base.of(base_logits, base_hidden, base_weight, base_bias)
    live = _Live(kind, chunk, bool(base))
    x_RH = live.rows_of(hidden, head.dtype)
    rows = [live.take(value) for value in (targets, kind, temperature)]
    collected = []
    for part in live.chunks:
        logits, of_rows = head.logits(x_RH[part])[None], _cut(rows, part)
        if shard is not None:
            collected.append((*_statistics_shard(shard, logits, of_rows, static), logits.new_empty(0)))
            continue
        base_rows = base.rows(live.chosen, part, head.dtype)[None] if base and part.start >= live.split else None
        results = list(library.call("row_statistics", logits, *of_rows, base_rows, *static))
        if base and base_rows is None:
            results[3] = torch.cat((results[3], torch.zeros_like(results[3])), 1)
        collected.append(_with_supervised(results, bool(base)))
    return _joined(collected, live, hidden, (None, None, None, 4 if base else 2, None), bool(base))


@_as_written
def linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None,
    normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None, chunk: int, want_hidden: bool,
    want_weight: bool, want_bias: bool, *static: Any, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary."""
    head, base = _Head(weight, bias), _Base.of(base_logits, base_hidden, base_weight, base_bias)
    live = _Live(kind, chunk, bool(base))
    x_RH = live.rows_of(hidden, head.dtype)
    local = targets if shard is None else shard.local(targets)
    rows = [live.take(value) for value in (local, kind, temperature)]
    given = [live.take(value) for value in (normalizer, entropy, slope, entropy_slope)]
    gradients = _Gradients(head, x_RH, len(live.chunks), want_hidden, want_weight, want_bias)
    for part in live.chunks:
        x = x_RH[part]
        logits, of_given = head.logits(x)[None], _cut(given, part)
        base_rows = base.rows(live.chosen, part, head.dtype)[None] if base and part.start >= live.split else None
        if base and base_rows is None:
            of_given[0] = of_given[0][:, :2].contiguous()
        if head.columns:
            library.call("row_gradient_", logits, *_cut(rows, part), base_rows, *of_given, *static)
        gradients.add(logits[0], x, part)
    gradient, *others = gradients.results(x_RH)
    if want_hidden:
        gradient = live.put(_reduced(gradient, shard)).to(hidden.dtype).view(hidden.shape)
    return gradient.to(hidden.dtype), *others


def _reduced(gradient: Tensor, shard: VocabularyShard | None) -> Tensor:
    """The hidden gradient summed over shards, in at least float32."""
    return gradient if shard is None else shard.sum(gradient)


def _cut(values: list[Tensor | None], part: slice) -> list[Any]:
    return [None if value is None else value[part] for value in values]


def _with_supervised(results: Any, gift: bool) -> tuple[Tensor, ...]:
    """A chunk of rollouts has no GIFT loss: it reads 0."""
    *others, supervised = results
    return *others, torch.zeros_like(others[0]) if gift and not supervised.numel() else supervised


def _joined(
    collected: list[tuple[Tensor, ...]], live: _Live, hidden: Tensor, columns: tuple[int | None, ...], gift: bool
) -> tuple[Tensor, ...]:
    """The chunks' results one below the other, back in the batch's places; absent is (0,)."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    if not collected:
        results = [hidden.new_zeros((live.total, *(() if c is None else (c,))), dtype=dtype) for c in columns]
    else:
        results = [torch.cat(parts) for parts in zip(*collected, strict=True)]
        results = [value if not value.numel() else live.put(value) for value in results]
    return *results[:-1], results[-1] if gift else hidden.new_empty(0, dtype=dtype)


LINEAR = {
    name: library.define_composite(name, function)
    for name, function in (
        ("linear_loss", linear_loss), ("linear_statistics", linear_statistics), ("linear_gradient", linear_gradient),
    )
}  # fmt: skip
