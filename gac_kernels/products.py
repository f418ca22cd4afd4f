"""The matrix products of a head, a chunk of rows at a time: logits, and the gradients that come back from them.

Shapes: R rows of a chunk, H hidden width, V columns of the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

_HALVES = (torch.bfloat16, torch.float16)
# Bytes of a chunk's logits. On a GPU products of a few thousand rows run at full speed; on a CPU a few hundred do.
CHUNK_BYTES = {"cpu": 160 << 20, "other": 768 << 20}
_PARTS = 8
_BLOCK_ROWS = 1024  # of a head that is widened block by block: a few megabytes, which stay in cache


def chunk_rows(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> int:
    """Rows a chunk when the caller does not say: as few chunks as keep the logits within CHUNK_BYTES, of one size."""
    wide = products_in_float32(device, dtype)
    bytes_of_row = max(1, columns) * (4 if wide else dtype.itemsize)
    most = max(16, CHUNK_BYTES.get(device.type, CHUNK_BYTES["other"]) // bytes_of_row // 16 * 16)
    chunks = max(1, -(-rows // most))
    return max(1, min(rows, (-(-rows // chunks) + 15) // 16 * 16 if chunks > 1 else rows))


@lru_cache
def _multiplies_halves() -> bool:
    """Whether the CPU has instructions for bfloat16 products. Without them PyTorch takes several times as long as for
    float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def products_in_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of this dtype are made in float32 here."""
    return device.type == "cpu" and dtype in _HALVES and not (dtype is torch.bfloat16 and _multiplies_halves())


class Head:
    """``x W^T + b``, and back. Where products are in float32 the weight is widened a block of columns at a time: there
    never is a float32 copy of the head."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.columns, self.width = weight.shape
        self.wide = products_in_float32(weight.device, weight.dtype)
        self.dtype = torch.float32 if self.wide else weight.dtype
        self._scratch: Tensor | None = None
        self._buffer: Tensor | None = None

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns and their rows of the weight in the dtype of the products, one block after the other."""
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
        for columns, weight in self.blocks():
            torch.mm(x_RH, weight.t(), out=logits_RV[:, columns])
        if self.bias is not None:
            logits_RV += self.bias
        return logits_RV

    def release(self) -> None:
        """Give back the memory of the logits, whoever still holds them."""
        if self._buffer is not None:
            self._buffer.untyped_storage().resize_(0)
        self._scratch = self._buffer = None


class Gradients:
    """The sums over chunks: dh in its rows, dW and db in at least float32.

    Where dW leaves in bfloat16, its float32 sum lies in parts that are narrowed one after the other: the two never lie
    side by side as a whole. A float16 head's gradients leave in float32.
    """

    def __init__(self, head: Head, hidden: Tensor, chunks: int, want_hidden: bool, want_weight: bool, want_bias: bool):
        self.head, self.begun = head, False
        weight, acc = head.weight, torch.promote_types(hidden.dtype, torch.float32)
        self.half = weight.dtype is torch.float16
        self.dtype = acc if self.half else weight.dtype
        self.hidden = hidden.new_empty(hidden.shape, dtype=acc if self.half else hidden.dtype) if want_hidden else None
        self.bias = weight.new_zeros(head.columns, dtype=acc) if want_bias else None
        self.weight: Tensor | None = None
        self.parts: list[Tensor] = []  # rows of dW, of the result itself where no sum is wider than it
        if not want_weight:
            return
        if chunks <= 1 or self.dtype is acc:  # one chunk's product is rounded once, whatever dtype it is written in
            self.weight = torch.empty_like(weight, dtype=self.dtype, memory_format=torch.contiguous_format)
            whole = self.dtype in (head.dtype, acc)
            self.parts = list(self.weight.split(max(1, head.columns) if whole else _BLOCK_ROWS))
        else:
            rows = max(1, -(-head.columns // _PARTS))
            sizes = [min(rows, head.columns - begin) for begin in range(0, head.columns, rows)]
            self.parts = [weight.new_empty((size, head.width), dtype=acc) for size in sizes]

    def add(self, dz_RV: Tensor, x_RH: Tensor, rows: slice, shrink_R1: Tensor | None = None) -> None:
        """A chunk's part: ``dz`` is the gradient of its logits, ``x`` its hidden states, which are the ``rows``. With
        ``shrink``, powers of two, ``dz`` is too large by their inverses."""
        head, dx_RH = self.head, None
        for columns, weight in head.blocks() if self.hidden is not None else ():
            dz = dz_RV[:, columns]
            if self.half and not head.wide:
                dx_RH = _product_in_float32(dz, weight)
            else:
                dx_RH = dz @ weight if dx_RH is None else dx_RH.addmm_(dz, weight)
        if self.hidden is not None:
            self.hidden[rows] = 0 if dx_RH is None else dx_RH if shrink_R1 is None else dx_RH * shrink_R1
        narrow_R1 = None if shrink_R1 is None else shrink_R1.to(x_RH.dtype)
        x_RH = x_RH if narrow_R1 is None else x_RH * narrow_R1
        begin = 0
        for part in self.parts:
            self._add_product(part, dz_RV[:, begin : begin + len(part)].t(), x_RH)
            begin += len(part)
        if self.bias is not None and narrow_R1 is not None:
            self.bias += _product_in_float32(narrow_R1.t(), dz_RV)[0]
        elif self.bias is not None:
            self.bias += dz_RV.sum(0, dtype=self.bias.dtype)
        self.begun = True

    def _add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if total.dtype is b.dtype:
            torch.addmm(total, a, b, beta=float(self.begun), out=total)  # with beta 0 what was there is not read
        elif total.dtype is not torch.float32:  # one chunk: a product in float32, the result in 16 bits
            total.copy_(a @ b)
        elif not self.begun and not b.is_cuda:
            torch.mm(a.float(), b.float(), out=total)
        elif not b.is_cuda:  # a CPU's products write no wider dtype than they read
            total.addmm_(a.float(), b.float())
        else:
            torch.addmm(total, a, b, out_dtype=torch.float32, beta=float(self.begun), out=total)

    def results(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dh, dW and db, ``(0,)`` where not wanted. The sums are spent."""
        dtype = self.dtype
        none = hidden.new_empty(0, dtype=dtype)
        if not self.begun:
            for part in self.parts:
                part.zero_()
        weight, parts = self.weight, self.parts
        if weight is None and parts:
            self.head.release()
            for index, part in enumerate(parts):
                parts[index] = part.to(dtype)
            weight = torch.cat(parts)
        return (
            none if self.hidden is None else self.hidden,
            none if weight is None else weight,
            none if self.bias is None else self.bias.to(dtype),
        )


def _product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of 16-bit matrices, its sums not rounded."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()
