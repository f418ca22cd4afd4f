"""Elementary functions that are the same on every target, to about one unit in the last place.

``tl.exp`` is a hardware approximation in float32 (tens of ulp at exp(20)) and arctan has no name that all targets
know, so both are polynomials here. They use correctly rounded operations alone, and the launcher switches contraction
off, so that the interpreter in a test and a GPU go through the same steps. Float64 takes the library's exp.
"""

import triton
import triton.language as tl

from .codes import ARCTAN, ERF, SIGMOID

LOG2E = tl.constexpr(1.4426950408889634)
LN2_HIGH = tl.constexpr(0.693359375)  # ten bits, so that n * LN2_HIGH is exact
LN2_LOW = tl.constexpr(-2.1219444005469058e-4)
EXP_LOW = tl.constexpr(-86.9)  # below, exp is 0 in float32 (subnormals are not worth their instructions)
EXP_HIGH = tl.constexpr(88.3)  # above, inf
TAN_PI_8 = tl.constexpr(0.41421356237309503)
TAN_3PI_8 = tl.constexpr(2.414213562373095)


@triton.jit
def divide(a, b):
    """Correctly rounded ``a / b``; Triton's ``/`` is approximate in float32."""
    if a.dtype == tl.float32:
        return tl.div_rn(a, b)
    else:
        return a / b


@triton.jit
def square_root(x):
    if x.dtype == tl.float32:
        return tl.sqrt_rn(x)
    else:
        return tl.sqrt(x)


@triton.jit
def exp_expm1(x, low):
    """``exp(x + low)`` and ``exp(x + low) - 1`` without cancellation; ``low`` is a rounding error left of ``x``.

    x = n ln2 + r with |r| <= ln2 / 2 and exp(r) - 1 = r + r^2 P(r), P minimax of degree 5 (error 1.7e-10).
    """
    if x.dtype == tl.float64:
        value = tl.exp(x)
        return value, value - 1.0
    else:
        inside = (x > EXP_LOW) & (x < EXP_HIGH)  # false for nan
        safe = tl.where(inside, x, 0.0)
        n = tl.floor(safe * LOG2E + 0.5)
        r = ((safe - n * LN2_HIGH) - n * LN2_LOW) + tl.where(inside, low, 0.0)
        p = 0.00019891080464 * r + 0.00139337307158
        p = p * r + 0.00833331084465
        p = p * r + 0.0416664641974
        p = p * r + 0.166666666817
        p = p * r + 0.500000001354
        q = r + r * r * p
        power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)  # 2^n, n in [-125, 127]
        value = power + power * q
        outside = tl.where(x >= EXP_HIGH, float("inf"), tl.where(x <= EXP_LOW, 0.0, x))
        value = tl.where(inside, value, outside)
        return value, tl.where(inside, (power - 1.0) + power * q, value - 1.0)


@triton.jit
def log(x):
    """``log(x)`` of a positive normal number or nan.

    x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)), and log(1 + f) = f - f^2 / 2 + s (f^2 / 2 + s^2 P(s^2)) with
    s = f / (2 + f): P as in FreeBSD's e_logf.c.
    """
    if x.dtype == tl.float64:
        return tl.log(x)
    else:
        bits = x.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
        n = ((bits >> 23) - 127).to(tl.float32)
        f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
        s = divide(f, 2.0 + f)
        z = s * s
        p = 0.24279078841 * z + 0.28498786688
        p = p * z + 0.40000972152
        p = p * z + 0.66666662693
        half = 0.5 * f * f
        value = n * LN2_HIGH - ((half - (s * (half + z * p) + n * LN2_LOW)) - f)
        return tl.where(x == x, value, x)


@triton.jit
def arctan(x):
    """Reduced to |t| <= tan(pi / 8), then t + t^3 Q(t^2), Q minimax: error 3e-9 in float32, 2e-19 in float64."""
    size = tl.abs(x)
    far = size > TAN_3PI_8
    near = size <= TAN_PI_8
    above = tl.where(far, -1.0, tl.where(near, size, size - 1.0))
    below = tl.where(far, size, tl.where(near, 1.0, size + 1.0))
    t = divide(above, below)
    z = t * t
    if x.dtype == tl.float64:
        q = 0.0162843750500433944 * z - 0.0345693150633260898
        q = q * z + 0.0455154473402216165
        q = q * z - 0.0523044364068694771
        q = q * z + 0.0587892755447380676
        q = q * z - 0.0666642476020052014
        q = q * z + 0.0769229636804229712
        q = q * z - 0.0909090875325911294
        q = q * z + 0.111111111051505879
        q = q * z - 0.142857142856597778
        q = q * z + 0.199999999999998043
        q = q * z - 0.333333333333333332
    else:
        q = -0.0645171886935895807 * z + 0.107436683248300981
        q = q * z - 0.14263949753605724
        q = q * z + 0.199995403149579694
        q = q * z - 0.333333317604345559
    start = tl.where(near, 0.0, tl.full(x.shape, 0.7853981633974483, x.dtype))
    start = tl.where(far, 1.5707963267948966, start)
    angle = start + (t + t * z * q)
    return tl.where(x < 0.0, -angle, angle)


@triton.jit
def gate_term(u, tau, GATE: tl.constexpr):
    """``f(u)`` and ``f'(u)`` of a SAPO gate (arXiv 2511.20347 Eq. 4; arXiv 2602.19345v2), ``u = r - 1``."""
    one = tl.full((), 1.0, u.dtype)
    x = tau * u
    if GATE == SIGMOID:
        e, _ = exp_expm1(-tl.abs(x), 0.0)
        inverse = divide(one, 1.0 + e)
        f = divide(4.0 * one, tau) * tl.where(x < 0.0, e * inverse, inverse)
        slope = 4.0 * e * inverse * inverse
    elif GATE == ERF:
        f = 1.0 + divide(1.2533141373155003 * one, tau) * tl.erf(x * 0.7071067811865476)
        slope, _ = exp_expm1(-0.5 * x * x, 0.0)
    elif GATE == ARCTAN:
        f = 1.0 + divide(arctan(x), tau)
        slope = divide(one, 1.0 + x * x)
    else:
        inverse = divide(one, square_root(1.0 + x * x))
        f = 1.0 + u * inverse
        slope = inverse * inverse * inverse
    return f, slope
