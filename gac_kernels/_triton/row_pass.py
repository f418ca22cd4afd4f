"""The passes over one row of logits: its statistics, GIFT's cross entropy with a base row, its gradient.

With ``x`` the raw logit, or ``tanh`` of it with a soft cap, ``z = k x``: exponentials are of ``k (x - x(top))``, top
the largest raw logit, so that large logits lose nothing and no exponent is above 0. ``exp2`` is the hardware's (two
units in the last place): an error of that size in single terms of a sum is below 3e-7 in its logarithm. Sums are of
the logits' accuracy (float32 or float64) in a lane and float64 over lanes; a lane keeps a maximum of its own, so that
no tile waits for all threads. Float64 does little else: GPUs for games and inference have a unit of it for 64 threads.

Whole tiles of an aligned row are fetched one ahead and without a mask; what is left goes through ``read_tile``.
"""

import triton
import triton.language as tl

from .math import divide, exp_expm1, log
from .row_memory import columns, read_tile, read_whole, whole_tiles, write_tile, write_whole

LOG2E = tl.constexpr(1.4426950408889634)
MOST_FLOAT = tl.constexpr(3.4028234663852886e38)
MOST_DOUBLE = tl.constexpr(1.7976931348623157e308)
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
def finite(raw, CAPPED: tl.constexpr):
    """A raw logit as it may become a row's top: a cap makes infinities finite."""
    if CAPPED:
        most: tl.constexpr = MOST_DOUBLE if raw.dtype == tl.float64 else MOST_FLOAT
        return tl.where(raw < -most, -most, tl.where(raw > most, most, raw))
    else:
        return raw


@triton.jit
def exp_bounded(x):
    """``e^x`` of ``x`` moved into [-80, 80]; keeps nan."""
    x = tl.where(x < -80.0, -80.0, tl.where(x > 80.0, 80.0, x))
    return power(x if x.dtype == tl.float64 else x * LOG2E)


@triton.jit
def gain_of(top, doubled, CAPPED: tl.constexpr):
    """What :func:`fall` needs of the logit that it measures from."""
    if CAPPED:
        return divide(2.0 + tl.zeros_like(top), 1.0 + exp_bounded(-doubled * top))
    else:
        return top


@triton.jit
def fall(raw, top, gain, doubled, CAPPED: tl.constexpr):
    """``x - x(top)``, at most 0 and 0 at ``raw = top``, and ``tanh'``; ``doubled`` is twice the factor inside of tanh.

    tanh a - tanh b = gain (e^(2a - 2b) - 1) / (e^2a + 1) with gain = 2 / (1 + e^-2b) has no rounding of a tanh in it,
    which a cap of 30 and a temperature below 1 would multiply.
    """
    if CAPPED:
        below = doubled * (raw - top)
        _, m = exp_expm1(tl.where(below < -80.0, -80.0, below), 0.0)
        e = exp_bounded(doubled * raw)
        r = divide(tl.full((), 1.0, e.dtype), e + 1.0)
        return gain * (m * r), 4.0 * e * r * r
    else:
        d = raw - top
        return d, d


@triton.jit
def target_fall(raw, top, doubled, dtype: tl.constexpr, CAPPED: tl.constexpr):
    """:func:`fall` of the one logit whose log-prob is asked for: exponents with what their rounding leaves."""
    if CAPPED:
        high = raw.to(tl.float64), top.to(tl.float64)
        _, m = _exp_of(doubled * (high[0] - high[1]), dtype)
        e, _ = _exp_of(doubled * high[0], dtype)
        g, _ = _exp_of(-doubled * high[1], dtype)
        r = divide(tl.full((), 1.0, dtype), e + 1.0)
        by = (1.0 + g.to(tl.float64)) * (1.0 + e.to(tl.float64))
        return 2.0 * m.to(tl.float64) / by, 4.0 * e * r * r
    else:
        d = raw - top
        return d.to(tl.float64), d


@triton.jit
def _exp_of(x, dtype: tl.constexpr):
    """``e^x`` and ``e^x - 1`` of a float64, in ``dtype``."""
    x = tl.where(x < -80.0, -80.0, tl.where(x > 80.0, 80.0, x))
    high = x.to(dtype)
    return exp_expm1(high, (x - high.to(tl.float64)).to(dtype))


@triton.jit
def fall_of_top(m, origin, gain, doubled, CAPPED: tl.constexpr):
    """:func:`fall` of a lane's old top to a higher one, finite; 0 where it is -inf, so that nothing was summed."""
    down, _ = fall(m, origin, gain, doubled, CAPPED)
    down = tl.where(down < LOWEST, LOWEST, down)
    return tl.where(m == float("-inf"), 0.0, down)


@triton.jit
def add_tile(x, m, s, s2, sd, by, doubled, CAPPED: tl.constexpr):
    """Each lane's maximum ``m``, and its sums of ``e``, ``e^2`` and ``e d`` of ``d = fall(x, m)``, ``e = e^(k d)``."""
    higher = tl.maximum(m, tl.max(x, axis=1))
    origin = tl.where(higher == float("-inf"), 0.0, higher)
    gain = gain_of(origin, doubled, CAPPED)
    # What was summed so far moves to the new origin.
    down = fall_of_top(m, origin, gain, doubled, CAPPED)
    shrink = power(down * by)
    d, _ = fall(x, origin[:, None], gain[:, None], doubled, CAPPED)
    d = tl.where(d < LOWEST, LOWEST, d)  # keeps nan
    e = power(d * by)
    if CAPPED:  # -inf stands for no column
        e = tl.where(x == float("-inf"), 0.0, e)
    sd = shrink * (sd + s * down) + tl.sum(e * d, axis=1)
    s = shrink * s + tl.sum(e, axis=1)
    s2 = shrink * shrink * s2 + tl.sum(e * e, axis=1)
    return higher, s, s2, sd


@triton.jit
def moments(
    pointer, start, V, doubled, k, dtype: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``top`` (raw), ``log sum e^(z - z(top))``, entropy and sum of p squared; float64 but ``top`` and the last."""
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
        m, s, s2, sd = add_tile(finite(raw.to(dtype), CAPPED), m, s, s2, sd, by, doubled, CAPPED)
    for i in range(whole, V, LANES * WIDTH):
        raw = read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype)
        x = finite(raw, CAPPED)
        if CAPPED:
            x = tl.where(columns(i, LANES, WIDTH) < V, x, float("-inf"))
        m, s, s2, sd = add_tile(x, m, s, s2, sd, by, doubled, CAPPED)

    top = tl.max(m)
    origin = tl.where(top == float("-inf"), 0.0, top)
    down = fall_of_top(m, origin, gain_of(origin, doubled, CAPPED), doubled, CAPPED)
    shrink = power(down * by)
    total = tl.sum((shrink * s).to(tl.float64))  # at least 1: the top itself
    moment = tl.sum((shrink * (sd + s * down)).to(tl.float64))
    squares = tl.sum(shrink * shrink * s2)
    high = total.to(dtype)
    low = divide((total - high.to(tl.float64)).to(dtype), high)
    log_sum = tl.where(top > float("-inf"), log(high).to(tl.float64) + low.to(tl.float64), float("nan"))
    entropy = log_sum - divide(moment.to(dtype), high).to(tl.float64) * k
    entropy = tl.where(entropy < 0.0, 0.0, entropy)
    sum_sq = divide(divide(squares, high), high)
    return top, log_sum, entropy, tl.where(sum_sq > 1.0, 1.0, sum_sq)


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
    pointer, start, base, base_start, V, doubled, gain, k, top, log_sum, base_top, base_log_sum, keep, uniform,
    dtype: tl.constexpr, CAPPED: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``sum p0 log p`` over the row, float64."""
    total = tl.zeros([LANES], tl.float64)
    for i in range(0, V, LANES * WIDTH):
        raw = finite(read_tile(pointer, start, i, V, float("-inf"), LANES, WIDTH).to(dtype), CAPPED)
        d, _ = fall(raw, top, gain, doubled, CAPPED)
        q = base_probability(base, base_start, i, V, base_top, base_log_sum, keep, uniform, dtype, LANES, WIDTH)
        log_p = d * k.to(dtype) - log_sum.to(dtype)
        total += tl.sum(tl.where(q > 0.0, q * log_p, 0.0), axis=1).to(tl.float64)
    return tl.sum(total)


@triton.jit
def gradient_tile(
    raw, base, base_start, i, V, doubled, gain, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
    base_log_sum, keep, uniform, dtype: tl.constexpr, CAPPED: tl.constexpr, BONUS: tl.constexpr, LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):  # fmt: skip
    """``slope (t - p) - bonus p (log p + H)`` at column ``i`` on as if the target were none of its columns."""
    d, flat = fall(finite(raw.to(dtype), CAPPED), top, gain, doubled, CAPPED)
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
        dz *= flat
    return dz


@triton.jit
def write_gradient(
    out, out_start, pointer, start, base, base_start, V, doubled, gain, k, slope, top, log_sum, entropy, bonus, gift,
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
            raw, base, base_start, i, V, doubled, gain, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
            base_log_sum, keep, uniform, dtype, CAPPED, BONUS, LANES, WIDTH,
        )  # fmt: skip
        write_tile(out, out_start, i, V, dz.to(kind), LANES, WIDTH)
    ahead = read_whole(pointer, start, whole - LANES * WIDTH, whole, "evict_first", LANES, WIDTH)
    for j in range(0, whole, LANES * WIDTH):
        i = whole - LANES * WIDTH - j
        raw = ahead
        ahead = read_whole(pointer, start, i - LANES * WIDTH, whole, "evict_first", LANES, WIDTH)
        dz = gradient_tile(
            raw, base, base_start, i, V, doubled, gain, k, slope, top, log_sum, entropy, bonus, gift, inverse, base_top,
            base_log_sum, keep, uniform, dtype, CAPPED, BONUS, LANES, WIDTH,
        )  # fmt: skip
        write_whole(out, out_start, i, dz.to(kind), LANES, WIDTH)


@triton.jit
def fill_row(out, start, V, value, LANES: tl.constexpr, WIDTH: tl.constexpr):
    tile = tl.full([LANES, WIDTH], 0.0, out.dtype.element_ty) + value.to(out.dtype.element_ty)
    for i in range(0, V, LANES * WIDTH):
        write_tile(out, start, i, V, tile, LANES, WIDTH)
