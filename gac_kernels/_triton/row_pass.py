"""The passes over one row of logits: its statistics, GIFT's cross entropy with a base row, its gradient.

With ``x`` the raw logit, or the capped one, ``z = k x``: exponentials are of ``k (x - top)``, so that large logits lose
nothing. ``exp2`` is the hardware's (two units in the last place): an error of that size in single terms of a sum is
below 3e-7 in its logarithm. Sums are float32 in a lane and float64 over lanes; a lane keeps a maximum of its own, so
that no tile waits for all threads.
"""

import triton
import triton.language as tl

from .math import divide, exp_expm1
from .row_memory import columns, read_tile, write_tile

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # stands for -inf where 0 is multiplied with it


@triton.jit
def power(d, k):
    """``e^(k d)`` for ``k d <= 0``; ``k`` is a float64 scalar."""
    if d.dtype == tl.float64:
        return tl.exp(d * k)
    else:
        return tl.exp2(d * (k * LOG2E).to(tl.float32))


@triton.jit
def tanh(x):
    _, t = exp_expm1(tl.where(tl.abs(x) > 20.0, 40.0, 2.0 * tl.abs(x)), 0.0)
    t = divide(t, t + 2.0)
    return tl.where(x < 0.0, -t, tl.where(x == x, t, x))


@triton.jit
def capped(raw, inner, cap, CAPPED: tl.constexpr):
    """``cap tanh(inner raw)`` and ``tanh``; without a cap the logit itself."""
    if CAPPED:
        t = tanh(raw * inner)
        return cap * t, t
    else:
        return raw, raw


@triton.jit
def moments(
    pointer, start, V, inner, cap, k, dtype: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``top`` (of x), ``log sum e^(k (x - top))``, entropy and sum of p squared, float64 scalars but ``top``."""
    m = tl.full([LANES], float("-inf"), dtype)
    s = tl.zeros([LANES], dtype)
    s2 = tl.zeros([LANES], dtype)
    sd = tl.zeros([LANES], dtype)
    for i in range(0, V, LANES * WIDTH):
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
        x, _ = capped(raw, inner, cap, CAPPED)
        if CAPPED:
            x = tl.where(columns(i, LANES, WIDTH) < V, x, float("-inf"))
        higher = tl.maximum(m, tl.max(x, axis=1))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        # What was summed so far moves to the new origin; nothing was if the old one is -inf.
        fall = tl.where(m == float("-inf"), 0.0, m - origin)
        shrink = power(fall, k)
        d = x - origin[:, None]
        d = tl.where(d < LOWEST, LOWEST, d)  # keeps nan
        e = power(d, k)
        sd = shrink * (sd + s * fall) + tl.sum(e * d, axis=1)
        s = shrink * s + tl.sum(e, axis=1)
        s2 = shrink * shrink * s2 + tl.sum(e * e, axis=1)
        m = higher
    top = tl.max(m)
    fall = tl.where(m == float("-inf"), 0.0, m - top).to(tl.float64)
    shrink = tl.exp(fall * k)
    total = tl.sum(shrink * s)
    moment = tl.sum(shrink * (sd.to(tl.float64) + s * fall))
    squares = tl.sum(shrink * shrink * s2)
    log_sum = tl.where(top > float("-inf"), tl.log(total), float("nan"))
    entropy = log_sum - k * moment / total
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return top, log_sum, entropy, squares / (total * total)


@triton.jit
def base_probability(
    base, start, i, V, top, log_sum, keep, uniform, dtype: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """``keep softmax(base) + uniform`` of a tile, 0 beyond the row."""
    x = read_tile(base, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
    one = tl.full((), 1.0, tl.float64)
    d = (x - top) - log_sum.to(dtype)
    p = power(tl.where(d < LOWEST, LOWEST, d), one)
    return tl.where(columns(i, LANES, WIDTH) < V, keep * p + uniform, 0.0)


@triton.jit
def gift_target(top, log_sum, base_y, beta, smooth, V):
    """``1 / D``, ``q_y`` and ``p0_y / D`` (arXiv 2601.09233), in log space: e^beta overflows and p0_y is minute."""
    log_p = (base_y.to(tl.float64) - top) - log_sum
    p = (1.0 - smooth) * tl.exp(log_p) + smooth / V
    log_p0 = tl.where(smooth > 0.0, tl.log(p), log_p)
    raised = log_p0 + beta
    rest = tl.log(1.0 - tl.where(p < 1.0, p, 1.0))
    high, low = tl.where(raised > rest, raised, rest), tl.where(raised > rest, rest, raised)
    log_d = high + tl.log(1.0 + tl.exp(low - high))
    inverse = tl.exp(-log_d)
    return inverse, tl.exp(raised - log_d), p * inverse


@triton.jit
def cross_entropy(
    pointer, start, base, base_start, V, inner, cap, k, top, log_sum, base_top, base_log_sum, keep, uniform,
    dtype: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``sum p0 log p`` over the row, float64."""
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, V, LANES * WIDTH):
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
        x, _ = capped(raw, inner, cap, CAPPED)
        q = base_probability(base, base_start, i, V, base_top, base_log_sum, keep, uniform, dtype, LANES, WIDTH)
        log_p = (x - top) * k.to(dtype) - log_sum.to(dtype)
        total += tl.sum(tl.where(q > 0.0, q * log_p, 0.0), axis=1).to(tl.float64)
    return tl.sum(total)


@triton.jit
def write_gradient(
    out, out_start, pointer, start, base, base_start, V, target, inner, cap, k, slope_k, top, log_sum, entropy, slope,
    bonus, own, gift, inverse, base_top, base_log_sum, keep, uniform, dtype: tl.constexpr, CAPPED: tl.constexpr,
    BONUS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``slope (t - p) - bonus p (log p + H)`` through the transform; last tiles first, which are still in the cache.

    ``own``: the value of ``t - p`` at the target, made where it loses no digits. ``out`` may be ``pointer``.
    """
    tiles = (V + LANES * WIDTH - 1) // (LANES * WIDTH)
    kk, shift = k.to(dtype), log_sum.to(dtype)
    for j in range(tiles):
        i = (tiles - 1 - j) * (LANES * WIDTH)
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
        x, t = capped(raw, inner, cap, CAPPED)
        d = x - top
        log_p = tl.where(d < LOWEST, LOWEST, d) * kk - shift
        one = tl.full((), 1.0, tl.float64)
        p = power(log_p, one)
        difference = -p
        if gift is not None:
            q = base_probability(base, base_start, i, V, base_top, base_log_sum, keep, uniform, dtype, LANES, WIDTH)
            difference = tl.where(gift, inverse * q - p, difference)
        difference = tl.where(columns(i, LANES, WIDTH) == target, own, difference)
        dz = slope * difference
        if BONUS:
            dz -= bonus * (p * (tl.where(p > 0.0, log_p, 0.0) + entropy))
        if CAPPED:
            dz *= 1.0 - t * t
        write_tile(out, out_start, i, V, (dz * slope_k).to(out.dtype.element_ty), LANES, WIDTH)


@triton.jit
def fill_row(out, start, V, value, LANES: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.full([LANES, WIDTH], 0.0, out.dtype.element_ty) + value.to(out.dtype.element_ty)
    for i in range(0, V, LANES * WIDTH):
        write_tile(out, start, i, V, tile, LANES, WIDTH)
