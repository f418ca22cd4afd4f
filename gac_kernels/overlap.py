"""Which tensors share memory: nothing that is still to be read may lie where a gradient is written in place.

A tensor is a set of runs of bytes, at every sum of multiples of its strides. Two share memory where two runs meet;
whether they do is a question about sums of whole numbers, which is answered exactly: views of one buffer that
interleave without touching are told apart from those that overlap. Most pairs are told apart by their first and last
bytes alone.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _runs(tensor: Tensor) -> tuple[int, list[tuple[int, int]], bool]:
    """Bytes of a run, ``(stride in bytes, size)`` of the dimensions that repeat it, and whether elements coincide
    already inside a run."""
    size_of = tensor.element_size()
    dims = sorted((stride * size_of, n) for stride, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)
    run, folded = size_of, False
    left: list[tuple[int, int]] = []
    for stride, n in dims:
        if stride <= run and not left:
            folded |= stride < run
            run += stride * (n - 1)
        else:
            left.append((stride, n))
    return run, left[::-1], folded


def _reaches(terms: list[tuple[int, int, int]], low: int, high: int, moved: bool) -> bool:
    """Whether some ``sum of stride k`` with ``k`` in ``[least, most]`` of each term lies in ``[low, high]``; unless
    ``moved``, other than with every ``k`` 0. Large strides first: what the small ones can't make up for is left out."""
    if not terms:
        return moved and low <= 0 <= high
    (stride, least, most), rest = terms[0], terms[1:]
    below, above = sum(s * k for s, k, _ in rest), sum(s * k for s, _, k in rest)
    first, last = max(least, -((above - low) // stride)), min(most, (high - below) // stride)
    return any(_reaches(rest, low - stride * k, high - stride * k, moved or k != 0) for k in range(first, last + 1))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first element to behind the last."""
    last = sum(stride * (n - 1) for stride, n in zip(tensor.stride(), tensor.shape, strict=True))
    return (last + 1) * tensor.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether some byte belongs to an element of both. Nothing is read; tensors without memory share none."""
    start, other = a.data_ptr(), b.data_ptr()
    if not start or not other or not a.numel() or not b.numel():
        return False
    if other >= start + _extent(a) or start >= other + _extent(b):
        return False
    (run, dims, _), (other_run, other_dims, _) = _runs(a), _runs(b)
    moves: dict[int, list[int]] = {}
    for stride, n in dims:
        moves.setdefault(stride, [0, 0])[0] -= n - 1
    for stride, n in other_dims:
        moves.setdefault(stride, [0, 0])[1] += n - 1
    terms = [(stride, moves[stride][0], moves[stride][1]) for stride in sorted(moves, reverse=True)]
    apart = other - start  # the runs meet where the second begins in (-other_run, run) of the first
    return _reaches(terms, 1 - other_run - apart, run - 1 - apart, True)


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two of its elements share memory."""
    if not tensor.numel():
        return False
    run, dims, folded = _runs(tensor)
    return folded or _reaches([(stride, 1 - n, n - 1) for stride, n in dims], 1 - run, run - 1, False)


def is_leaf_memory(logits: Tensor) -> bool:
    """Whether a gradient would be written over a leaf that requires grad, or over a view of one, which torch refuses:
    its values would be lost, and its grad would be its own memory. Without autograd nothing is written."""
    if not (torch.is_grad_enabled() and logits.requires_grad):
        return False
    base = logits._base
    return logits.is_leaf or (base is not None and base.is_leaf and base.requires_grad)


def refuse_leaf(logits: Tensor) -> None:
    if is_leaf_memory(logits):
        what = "a leaf" if logits.is_leaf else "a view of a leaf"
        raise ValueError(
            f"logits must be computed to be overwritten with inplace=True, got {what} that requires grad: its values "
            "would be lost, and its grad would be its own memory; leave inplace out"
        )


def refuse_shared(logits: Tensor, **read: object) -> None:
    """ValueError naming the first of ``read`` that shares memory with logits that a gradient will overwrite."""
    for name, value in read.items():
        if isinstance(value, Tensor) and overlap(logits, value):
            raise ValueError(
                f"{name.replace('__', '.')} must not share memory with logits that inplace=True overwrites, for it is "
                f"read after that: give a copy, or leave inplace out"
            )


def first_shared(written: list[Tensor], read: list[Tensor]) -> tuple[int, str, int] | None:
    """Of dense tensors: a written one that shares memory with another written or with a read one, as ``(place,
    "written" or "read", place of the other)``; None where there is none. Takes as long as sorting them."""
    spans = [
        (value.data_ptr(), value.data_ptr() + value.numel() * value.element_size(), kind, place)
        for kind, values in (("written", written), ("read", read))
        for place, value in enumerate(values)
        if value.numel() and value.data_ptr()
    ]
    ends: dict[str, tuple[int, int]] = {"written": (0, -1), "read": (0, -1)}  # the furthest, and whose it is
    for begin, end, kind, place in sorted(spans):
        for other in ("written", "read") if kind == "written" else ("written",):
            if begin < ends[other][0]:
                own = (place, other, ends[other][1])
                return own if kind == "written" else (ends[other][1], "read", place)
        ends[kind] = max(ends[kind], (end, place))
    return None
