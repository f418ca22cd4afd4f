"""How a kernel reads and writes one row of logits.

A tile is (LANES, WIDTH): a lane's WIDTH neighbouring columns come with one 16-byte access where the row begins on such
a boundary, which is decided at run time, so that no length compiles anything anew. The lane of a column depends on the
column alone. Nothing outside the row is touched. Rows begin anywhere in 64 bits; columns fit into 31, which halves the
registers that addresses take.
"""

import triton
import triton.language as tl


@triton.jit
def columns(i, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of the tile that begins at column ``i``."""
    return i + (tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :])


@triton.jit
def start_of(n, B, stride_a, stride_b):
    """Where row ``n`` of (A, B, V) begins, in elements; all int64."""
    return n // B * stride_a + n % B * stride_b


@triton.jit
def whole_tiles(start, V, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Columns of the tiles that lie inside the row, 0 where it does not begin on a 16-byte boundary."""
    return tl.where(start % WIDTH == 0, V // (LANES * WIDTH) * (LANES * WIDTH), 0)


@triton.jit
def read_whole(pointer, start, i, whole, POLICY: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The tile at column ``i`` of the ``whole`` ones, without a value where there is none."""
    column = columns(i, LANES, WIDTH)
    place = (pointer + start // WIDTH * WIDTH) + column
    return tl.load(place, mask=(column >= 0) & (column < whole), eviction_policy=POLICY)


@triton.jit
def write_whole(pointer, start, i, value, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Nobody reads here what is written, so that it should not push out what will be read again."""
    place = (pointer + start // WIDTH * WIDTH) + columns(i, LANES, WIDTH)
    tl.store(place, value, eviction_policy="evict_first")


@triton.jit
def read_tile(pointer, start, i, V, other: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Columns ``i`` on of the row of ``V`` columns at ``start``; ``other`` beyond its end."""
    column = columns(i, LANES, WIDTH)
    whole = tl.where(start % WIDTH == 0, V // WIDTH * WIDTH, 0)
    value = tl.load((pointer + start // WIDTH * WIDTH) + column, mask=column < whole, other=other)
    if whole < tl.minimum(V, i + LANES * WIDTH):
        rest = tl.load((pointer + start) + column, mask=(column >= whole) & (column < V), other=other)
        value = tl.where(column < whole, value, rest)
    return value


@triton.jit
def write_tile(pointer, start, i, V, value, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of :func:`read_tile`."""
    column = columns(i, LANES, WIDTH)
    whole = tl.where(start % WIDTH == 0, V // WIDTH * WIDTH, 0)
    tl.store((pointer + start // WIDTH * WIDTH) + column, value, mask=column < whole)
    if whole < tl.minimum(V, i + LANES * WIDTH):
        tl.store((pointer + start) + column, value, mask=(column >= whole) & (column < V))
