"""The passes over one row of logits: its statistics, GIFT's cross entropy with a base row, its gradient.

With ``x`` the raw logit, or the capped one, ``z = k x``: exponentials are of ``k (x - top)``, so that large logits lose
nothing. ``exp2`` is the hardware's (two units in the last place): an error of that size in single terms of a sum is
below 3e-7 in its logarithm. Sums are of the logits' accuracy (float32 or float64) in a lane and float64 over lanes; a
lane keeps a maximum of its own, so that no tile waits for all threads. Float64 does little else: GPUs for games and
inference have a unit of it for 64 threads.

Whole tiles of an aligned row are fetched one ahead and without a mask; what is left goes through ``read_tile``.
"""

import triton
import triton.language as tl

from .math import divide, exp_expm1, log
from .row_memory import columns, read_tile, read_whole, whole_tiles, write_tile, write_whole

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e30)  # stands for -inf where 0 is multiplied with it


@triton.jit
def base_2(k, dtype: tl.constexpr):
    """The factor of an exponent for :func:`power`, from a float64 scalar."""
    if dtype == tl.float64:
        return k
    else:
        return (k * LOG2E).to(dtype)


@triton.jit
def power(x):
    """``e^x``, or ``2^x`` in float32."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x)


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
def add_tile(x, m, s, s2, sd, by):
    """Each lane's maximum ``m``, and its sums of ``e``, ``e^2`` and ``e d`` of ``d = x - m``, ``e = e^(k d)``."""
    higher = tl.maximum(m, tl.max(x, axis=1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    # What was summed so far moves to the new origin; nothing was if the old one is -inf.
    fall = tl.where(m == float("-inf"), 0.0, m - origin)
    shrink = power(fall * by)
    d = x - origin[:, None]
    d = tl.where(d < LOWEST, LOWEST, d)  # keeps nan
    e = power(d * by)
    sd = shrink * (sd + s * fall) + tl.sum(e * d, axis=1)
    s = shrink * s + tl.sum(e, axis=1)
    s2 = shrink * shrink * s2 + tl.sum(e * e, axis=1)
    return higher, s, s2, sd


@triton.jit
def moments(
    pointer, start, V, inner, cap, k, dtype: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``top`` (of x), ``log sum e^(k (x - top))``, entropy and sum of p squared; float64 but ``top`` and the last."""
    by = base_2(k, dtype)
    m = tl.full([LANES], float("-inf"), dtype)
    s = tl.zeros([LANES], dtype)
    s2 = tl.zeros([LANES], dtype)
    sd = tl.zeros([LANES], dtype)
    whole = whole_tiles(start, V, LANES, WIDTH)
    ahead = read_whole(pointer, start, 0, whole, "", LANES, WIDTH)
    for i in range(0, whole, LANES * WIDTH):
        raw = ahead
        ahead = read_whole(pointer, start, i + LANES * WIDTH, whole, "", LANES, WIDTH)
        x, _ = capped(raw.to(dtype), inner, cap, CAPPED)
        m, s, s2, sd = add_tile(x, m, s, s2, sd, by)
    for i in range(whole, V, LANES * WIDTH):
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
        x, _ = capped(raw, inner, cap, CAPPED)
        if CAPPED:
            x = tl.where(columns(i, LANES, WIDTH) < V, x, float("-inf"))
        m, s, s2, sd = add_tile(x, m, s, s2, sd, by)

    top = tl.max(m)
    fall = tl.where(m == float("-inf"), 0.0, m - top)
    shrink = power(fall * by)
    total = tl.sum((shrink * s).to(tl.float64))  # at least 1: the top itself
    moment = tl.sum((shrink * (sd + s * fall)).to(tl.float64))
    squares = tl.sum(shrink * shrink * s2)
    high = total.to(dtype)
    low = divide((total - high.to(tl.float64)).to(dtype), high)
    log_sum = tl.where(top > float("-inf"), log(high).to(tl.float64) + low.to(tl.float64), float("nan"))
    entropy = log_sum - divide(moment.to(dtype), high).to(tl.float64) * k
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    return top, log_sum, entropy, divide(divide(squares, high), high)


@triton.jit
def base_probability(
    base, start, i, V, top, log_sum, keep, uniform, dtype: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr
):
    """``keep softmax(base) + uniform`` of a tile, 0 beyond the row."""
    x = read_tile(base, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
    p = power(((x - top) - log_sum.to(dtype)) * base_2(tl.full((), 1.0, tl.float64), dtype))
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
def gradient_tile(
    raw, base, base_start, i, V, inner, cap, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
    base_log_sum, keep, uniform, dtype: tl.constexpr, CAPPED: tl.constexpr, BONUS: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``slope (t - p) - bonus p (log p + H)`` at column ``i`` on as if the target were none of its columns."""
    x, flat = capped(raw.to(dtype), inner, cap, CAPPED)
    d = x - top
    p = power(tl.fma(d, base_2(k, dtype), -base_2(log_sum, dtype)))
    if gift is None:
        dz = p * -slope
    else:
        t = tl.zeros_like(p)
        if gift:  # the base row of a rollout is not read
            t = inverse * base_probability(
                base, base_start, i, V, base_top, base_log_sum, keep, uniform, dtype, LANES, WIDTH
            )
        dz = (t - p) * slope
    if BONUS:
        log_p = d * k.to(dtype) - log_sum.to(dtype)
        dz -= bonus * (p * (tl.where(p > 0.0, log_p, 0.0) + entropy))
    if CAPPED:
        dz *= 1.0 - flat * flat
    return dz


@triton.jit
def write_gradient(
    out, out_start, pointer, start, base, base_start, V, inner, cap, k, slope, top, log_sum, entropy, bonus, gift,
    inverse, base_top, base_log_sum, keep, uniform, dtype: tl.constexpr, CAPPED: tl.constexpr, BONUS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """:func:`gradient_tile` over the row, last tiles first: they are in the cache still. ``out`` may be ``pointer``."""
    kind: tl.constexpr = out.dtype.element_ty
    whole = tl.minimum(whole_tiles(start, V, LANES, WIDTH), whole_tiles(out_start, V, LANES, WIDTH))
    rest = (V - whole + LANES * WIDTH - 1) // (LANES * WIDTH)
    for j in range(rest):
        i = whole + (rest - 1 - j) * (LANES * WIDTH)
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH)
        dz = gradient_tile(
            raw, base, base_start, i, V, inner, cap, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
            base_log_sum, keep, uniform, dtype, CAPPED, BONUS, LANES, WIDTH,
        )  # fmt: skip
        write_tile(out, out_start, i, V, dz.to(kind), LANES, WIDTH)
    ahead = read_whole(pointer, start, whole - LANES * WIDTH, whole, "evict_first", LANES, WIDTH)
    for j in range(0, whole, LANES * WIDTH):
        i = whole - LANES * WIDTH - j
        raw = ahead
        ahead = read_whole(pointer, start, i - LANES * WIDTH, whole, "evict_first", LANES, WIDTH)
        dz = gradient_tile(
            raw, base, base_start, i, V, inner, cap, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
            base_log_sum, keep, uniform, dtype, CAPPED, BONUS, LANES, WIDTH,
        )  # fmt: skip
        write_whole(out, out_start, i, dz.to(kind), LANES, WIDTH)


@triton.jit
def fill_row(out, start, V, value, LANES: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.full([LANES, WIDTH], 0.0, out.dtype.element_ty) + value.to(out.dtype.element_ty)
    for i in range(0, V, LANES * WIDTH):
        write_tile(out, start, i, V, tile, LANES, WIDTH)
