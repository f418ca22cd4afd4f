"""How a kernel reads and writes one sequence.

A lane's place in the block depends only on the token's place in its sequence, never on where the sequence lies, so that
sums do not change when rows are reordered. Groups of four go through 16-byte instructions where the sequence begins on
such a boundary, which is decided at run time: a hint to the compiler would mean a compile for every kind of length.
Nothing outside the sequence is touched.
"""

import triton
import triton.language as tl


@triton.jit
def span(cu_seqlens, s, T, N):
    """First token and number of tokens of sequence ``s``, int64; offsets as `look` has left them, in ``[0, N]`` and
    never falling."""
    if cu_seqlens is None:
        return s * T.to(tl.int64), T.to(tl.int64)
    else:
        start = tl.load(cu_seqlens + s)
        return start, tl.load(cu_seqlens + s + 1) - start


@triton.jit
def highest(cu_seqlens, begin, end, least, N, BLOCK: tl.constexpr):
    """The largest of ``least`` and of the offsets ``[begin, end)``, clamped to ``[0, N]``."""
    top = tl.zeros([BLOCK], tl.int64) + least
    for i in range(begin, end, BLOCK):
        place = i + tl.arange(0, BLOCK)
        top = tl.maximum(top, tl.load(cu_seqlens + place, mask=place < end, other=0).to(tl.int64))
    return tl.minimum(tl.maximum(tl.max(top), 0), N)


@triton.jit
def read(pointer, start, i, length, BLOCK: tl.constexpr):
    """Tokens ``i`` to ``i + BLOCK`` of the sequence of ``length`` tokens that begins at ``start``; 0 beyond its end."""
    rel = i + tl.arange(0, BLOCK)
    whole = tl.where(start % 4 == 0, length // 4 * 4, 0)
    fours = tl.load(pointer + (start // 4 * 4 + rel), mask=rel < whole, other=0)
    single = tl.load(pointer + (start + rel), mask=(rel >= whole) & (rel < length), other=0)
    return tl.where(rel < whole, fours, single)


@triton.jit
def write(pointer, start, i, length, value, BLOCK: tl.constexpr):
    """The counterpart of :func:`read`."""
    rel = i + tl.arange(0, BLOCK)
    whole = tl.where(start % 4 == 0, length // 4 * 4, 0)
    tl.store(pointer + (start // 4 * 4 + rel), value, mask=rel < whole)
    if whole < tl.minimum(length, i + BLOCK):  # seldom so, and threads have to exchange values for it
        tl.store(pointer + (start + rel), value, mask=(rel >= whole) & (rel < length))


@triton.jit
def clear(pointer, head, tail, N, part, parts, BLOCK: tl.constexpr):
    """Zeros in ``[0, head)`` and ``[tail, N)``, of which this program does every ``parts``-th block."""
    zero = tl.zeros([BLOCK], pointer.dtype.element_ty)
    for i in range(part * BLOCK, head, parts * BLOCK):
        place = i + tl.arange(0, BLOCK)
        tl.store(pointer + place, zero, mask=place < head)
    for i in range(tail + part * BLOCK, N, parts * BLOCK):
        place = i + tl.arange(0, BLOCK)
        tl.store(pointer + place, zero, mask=place < N)
