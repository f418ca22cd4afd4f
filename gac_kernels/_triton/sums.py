"""Sums over a sequence, in float64 and in an order that depends on nothing but the sequence."""

import triton
import triton.language as tl


@triton.jit
def accumulator(BLOCK: tl.constexpr, dtype: tl.constexpr):
    """Zeros to :func:`add` blocks of ``dtype`` to: one a thread, for what one 16-byte load brings it."""
    return tl.zeros([BLOCK * dtype.primitive_bitwidth // 128], tl.float64)


@triton.jit
def add(total, x):
    """``total + x``. Neighbours, which lie in one thread, are summed first, in the dtype of ``x``."""
    lanes: tl.constexpr = total.shape[0]
    return total + tl.sum(tl.reshape(x, [lanes, x.shape[0] // lanes]), axis=1).to(tl.float64)


@triton.jit
def maximum(largest, x):
    """As :func:`add`, but the larger of both, in the dtype of ``x``. nan is passed over."""
    lanes: tl.constexpr = largest.shape[0]
    return tl.maximum(largest, tl.max(tl.reshape(x, [lanes, x.shape[0] // lanes]), axis=1))


@triton.jit
def total8(a, b, c, d, e, f, g, h):
    """The sums of eight vectors as a vector of eight, in one reduction: eight would take eight times its barriers."""
    even = tl.join(tl.join(a, e), tl.join(c, g))
    odd = tl.join(tl.join(b, f), tl.join(d, h))
    return tl.sum(tl.reshape(tl.join(even, odd), [a.shape[0], 8]), axis=0)
