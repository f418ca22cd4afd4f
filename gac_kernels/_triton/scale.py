"""``gac_kernels::scale_`` on Triton: every program reads the factor and leaves at once where it is 1."""

import triton
import triton.language as tl
from torch import Tensor

from .row_memory import read_tile, start_of, write_tile
from .rows import check_device, on_device, programs
from .token_loss import LAUNCH


@triton.jit(do_not_specialize=["rows", "pieces", "B", "V", "a", "b"])
def scale_kernel(
    gradient, factor, rows: tl.int64, pieces: tl.int64, B: tl.int64, V: tl.int64, a: tl.int64, b: tl.int64,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A program takes every so many tiles of all the rows."""
    by = tl.load(factor).to(tl.float64)
    wide: tl.constexpr = gradient.dtype.element_ty == tl.float64
    dtype: tl.constexpr = tl.float64 if wide else tl.float32
    if by != 1.0:
        for work in range(tl.program_id(0).to(tl.int64), rows * pieces, tl.num_programs(0)):
            # A dense tensor is one row, which may be longer than 31 bits say: the tile is a row of its own.
            first = work % pieces * (LANES * WIDTH)
            start = start_of(work // pieces, B, a, b) + first
            size = tl.minimum(V - first, LANES * WIDTH).to(tl.int32)
            value = read_tile(gradient, start, 0, size, 0.0, LANES, WIDTH).to(dtype) * by.to(dtype)
            write_tile(gradient, start, 0, size, value.to(gradient.dtype.element_ty), LANES, WIDTH)


def scale_(gradient: Tensor, factor: Tensor) -> None:
    """As the schema in ``schemas.py`` says."""
    check_device(gradient)
    if gradient.numel() == 0:
        return
    rows = gradient.view(1, 1, -1) if gradient.is_contiguous() else gradient
    (A, B, V), (a, b, _) = rows.shape, rows.stride()
    width = 16 // gradient.element_size()
    lanes = 128 * 4
    pieces = triton.cdiv(V, lanes * width)
    with on_device(gradient):
        scale_kernel[(min(A * B * pieces, programs(gradient.device, 8)),)](
            rows, factor, A * B, pieces, B, V, a, b, LANES=lanes, WIDTH=width, **LAUNCH
        )
