"""Rows of hidden states through a head, chunk by chunk: no logits beyond a chunk exist.

A chunk is three matrix products with the row operator between them: logits = h W^T, the gradient written over them, and
from it dh = dz W and dW += dz^T h. Where slopes wait for all log-probs there are two looks, and the first product is
made again.

Shapes: N rows in (A, B), R of them live, H hidden width, V columns of the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from . import library, reference
from .objectives import HybridObjective
from .products import Gradients, Head
from .schemas import DEAD, ROLLOUT, decode
from .shards import VocabularyShard
from .units import Units, slopes_in_unit, weights_in_unit


@dataclass
class _Base:
    """Where GIFT's base logits come from, a chunk at a time."""

    logits_NV: Tensor | None
    hidden: Tensor | None
    head: Head | None

    @classmethod
    def of(cls, logits: Tensor | None, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> _Base:
        return cls(logits, hidden, None if weight is None else Head(weight, bias))

    def __bool__(self) -> bool:
        return self.logits_NV is not None or self.head is not None

    def rows(self, chosen: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor:
        source = self.logits_NV if self.logits_NV is not None else self.hidden
        assert source is not None
        part = _pick(source, rows if chosen is None else chosen[rows])
        part = part.to(dtype if self.head is None else self.head.dtype)
        return part if self.head is None else self.head.logits(part).to(dtype)


def _host_may_wait(kind: Tensor) -> bool:
    return not (kind.is_cuda and torch.cuda.is_current_stream_capturing())


class _Live:
    """The live rows in the order of work, and their way back. With GIFT rollouts come first: only demonstrations need
    the base model. A host that may not wait for their number takes all rows as they are, the dead ones as zeros: 0 nan
    in the head's gradient would be nan."""

    def __init__(self, kind: Tensor, chunk: int, gift: bool) -> None:
        count = kind.numel()
        self.total, self.split = count, 0
        self.chosen: Tensor | None = None
        self.dead: Tensor | None = None
        if not _host_may_wait(kind):
            self.dead = kind == DEAD
        elif gift:
            order = kind.sort(stable=True).indices  # dead, rollouts, demonstrations
            dead, self.split = torch.stack(((kind == DEAD).sum(), (kind == ROLLOUT).sum())).tolist()
            self.chosen = order[dead:]
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
        rows = _pick(hidden, slice(None) if self.chosen is None else self.chosen).to(dtype)
        return rows if self.dead is None else rows.masked_fill(self.dead[:, None], 0.0)

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


class _Work:
    """The rows of a call, and its chunks with their logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[Tensor | None, ...],
        base: tuple[Tensor | None, ...], chunk: int, shard: VocabularyShard | None = None,
    ) -> None:  # fmt: skip
        """``rows``: targets, kind, temperature; ``base``: the four of GIFT's base model. ``shard``: of ranks that have
        not compared their live rows yet."""
        self.hidden, self.head, self.base = hidden, Head(weight, bias), _Base.of(*base)
        assert rows[1] is not None
        self.live = _Live(rows[1], chunk, bool(self.base))
        if shard is not None:
            shard.agree_on_rows(self.live.count, hidden.device)
        self.x_RH = self.live.rows_of(hidden, self.head.dtype)
        self._rows = self.take(*rows)

    def take(self, *values: Tensor | None) -> list[Tensor | None]:
        """What is one a row of the batch, of the live rows."""
        return [self.live.take(value) for value in values]

    def gradients(self, *wanted: bool) -> Gradients:
        return Gradients(self.head, self.x_RH, len(self.live.chunks), *wanted)

    def __iter__(self) -> Iterator[tuple[slice, Tensor, list[Any], Tensor | None]]:
        """Of each chunk: which rows, their logits ``(1, R, V)``, targets, kind and temperature, and base logits."""
        for part in self.live.chunks:
            base = None
            if self.base and part.start >= self.live.split:
                base = self.base.rows(self.live.chosen, part, self.head.dtype)[None]
            yield part, self.head.logits(self.x_RH[part])[None], _cut(self._rows, part), base

    def finish(self, gradients: Gradients, shard: VocabularyShard | None, units: Units | None) -> tuple[Tensor, ...]:
        """The gradients as the operators return them, that of the hidden states in the batch's places; their unit."""
        gradient, *others = gradients.results(self.x_RH)
        if gradients.hidden is not None:
            gradient = gradient if shard is None else shard.sum(gradient)
            gradient = self.live.put(gradient).view(self.hidden.shape)
        if units is None:
            return gradient.to(self.hidden.dtype), *others, self.hidden.new_empty(0)
        return gradient, *others, units.unit

    def join(self, collected: list[tuple[Tensor, ...]], columns: tuple[int | None, ...]) -> tuple[Tensor, ...]:
        """The chunks' results one below the other, back in the batch's places; absent is ``(0,)``. ``columns``: of each
        result, None where it is one number a row."""
        dtype = torch.promote_types(self.hidden.dtype, torch.float32)
        if collected:
            results = [torch.cat(parts) for parts in zip(*collected, strict=True)]
            results = [self.live.put(value) if value.numel() else value for value in results]
        else:
            shapes = [(self.live.total,) if width is None else (self.live.total, width) for width in columns]
            results = [self.hidden.new_zeros(shape, dtype=dtype) for shape in shapes]
        return *results[:-1], results[-1] if self.base else self.hidden.new_empty(0, dtype=dtype)


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
    shard: VocabularyShard | None = None, objective: HybridObjective | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary. With
    ``objective``, whose terms are functions in Python, ``static`` ends with the transform's and GIFT's numbers."""
    base = base_logits, base_hidden, base_weight, base_bias
    work, units = _Work(hidden, weight, bias, (targets, kind, temperature), base, chunk, shard), None
    if hidden.dtype is torch.float16:
        term, by_row = objective or decode(*static[5:]), not work.head.wide
        weight_N, units = weights_in_unit(
            weight_N, kind, temperature, advantages, rollout_weights, static, term, by_row
        )
    tokens = work.take(weight_N, advantages, old_logprobs, ref_logprobs, rollout_weights)
    (shrink,) = work.take(None if units is None else units.shrink_N)
    gradients, collected = work.gradients(want_hidden, want_weight, want_bias), []
    for part, logits, rows, base_rows in work:
        if shard is None and objective is None:
            results = library.call("fused_rows_", logits, *rows, base_rows, *_cut(tokens, part), *static)
        else:
            term = objective or decode(*static[5:])
            results = _eager_terms(shard, logits, rows, base_rows, _cut(tokens, part), static[:5], term)
        collected.append(_with_supervised(results, bool(work.base)))
        gradients.add(logits[0], work.x_RH[part], part, None if shrink is None else shrink[part, None])
    return *work.join(collected, (None,) * 4), *work.finish(gradients, shard, units)


def _eager_terms(
    shard: VocabularyShard | None, logits: Tensor, rows: list[Any], base_rows: Tensor | None, tokens: list[Any],
    static: tuple[Any, ...], objective: HybridObjective,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``fused_rows_`` with the slopes made in eager PyTorch between the two operators on rows: where this rank holds
    some of the columns, or a term is a function in Python."""
    targets, kind, temperature = rows
    if shard is None:
        logprobs, entropy, sum_sq, normalizer, supervised = library.call(
            "row_statistics", logits, *rows, base_rows, *static
        )
    else:
        logprobs, entropy, sum_sq, normalizer = _statistics_shard(shard, logits, rows, static)
        supervised = entropy.new_empty(0)
    weight, advantages, old, ref, rollout = tokens
    slope, entropy_slope = reference.token_slopes(
        logprobs, kind, weight, advantages, old, ref, rollout, objective, entropy
    )
    bonus = entropy_slope if objective.entropy_coef else None
    if logits.shape[-1]:
        local = targets if shard is None else shard.local(targets)
        given = normalizer, entropy, slope, bonus
        library.call("row_gradient_", logits, local, kind, temperature, base_rows, *given, *static)
    return logprobs, entropy, sum_sq, supervised


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
    scale, softcap, heat = static[:3]
    transform = reference.RowTransform(scale, softcap, heat if temperature is None else temperature)
    return shard.merge(targets, own, transform)


@_as_written
def linear_statistics(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None,
    chunk: int, *static: Any, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary."""
    base = base_logits, base_hidden, base_weight, base_bias
    work = _Work(hidden, weight, bias, (targets, kind, temperature), base, chunk, shard)
    collected = []
    for _, logits, rows, base_rows in work:
        if shard is not None:
            collected.append((*_statistics_shard(shard, logits, rows, static), logits.new_empty(0)))
            continue
        results = list(library.call("row_statistics", logits, *rows, base_rows, *static))
        if work.base and base_rows is None:
            results[3] = torch.cat((results[3], torch.zeros_like(results[3])), 1)
        collected.append(_with_supervised(results, bool(work.base)))
    return work.join(collected, (None, None, None, 4 if work.base else 2, None))


@_as_written
def linear_gradient(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None, base_bias: Tensor | None,
    normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None, chunk: int, want_hidden: bool,
    want_weight: bool, want_bias: bool, *static: Any, shard: VocabularyShard | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says; with ``shard`` the weight is this rank's part of the vocabulary."""
    base = base_logits, base_hidden, base_weight, base_bias
    local = targets if shard is None else shard.local(targets)
    work, units = _Work(hidden, weight, bias, (local, kind, temperature), base, chunk), None
    if hidden.dtype is torch.float16:
        by_row = not work.head.wide
        slope, entropy_slope, units = slopes_in_unit(slope, entropy_slope, temperature, static, by_row)
    given = work.take(normalizer, entropy, slope, entropy_slope)
    (shrink,) = work.take(None if units is None else units.shrink_N)
    gradients = work.gradients(want_hidden, want_weight, want_bias)
    for part, logits, rows, base_rows in work:
        of_rows = _cut(given, part)
        if work.base and base_rows is None:
            of_rows[0] = of_rows[0][:, :2].contiguous()  # without the base row's
        if work.head.columns:
            library.call("row_gradient_", logits, *rows, base_rows, *of_rows, *static)
        gradients.add(logits[0], work.x_RH[part], part, None if shrink is None else shrink[part, None])
    return work.finish(gradients, shard, units)


def _cut(values: list[Tensor | None], part: slice) -> list[Any]:
    return [None if value is None else value[part] for value in values]


def _with_supervised(results: Any, gift: bool) -> tuple[Tensor, ...]:
    """A chunk of rollouts has no GIFT loss: it reads 0."""
    *others, supervised = results
    return *others, torch.zeros_like(others[0]) if gift and not supervised.numel() else supervised


LINEAR = {
    name: library.define_composite(name, function)
    for name, function in (
        ("linear_loss", linear_loss), ("linear_statistics", linear_statistics), ("linear_gradient", linear_gradient),
    )
}  # fmt: skip
