"""The token terms, each returning value and slope by logp: what ``reference.py`` gets by autograd, in closed form.

nan travels through comparisons as it does there: every test is written so that nan takes the branch that keeps it.
"""

import triton
import triton.language as tl

from .codes import CISPO, DFPO, GRPO, GSPO, K1, K2, SOFTSIGN
from .math import exp_expm1, gate_term

BOUND = tl.constexpr(20.0)  # of every log-ratio


@triton.jit
def bounded_difference(a, b):
    """``clamp(a - b, -20, 20)``, the rounding error of the difference, and where the clamp is active.

    exp multiplies an error of half an ulp of 20 into 8 ulp of the ratio, so the error is kept and handed to it.
    """
    d = a - b
    back = d - a
    low = (a - (d - back)) - (b + back)
    beyond = tl.abs(d) > BOUND
    return tl.where(d > BOUND, BOUND, tl.where(d < -BOUND, -BOUND, d)), tl.where(beyond, 0.0, low), beyond


@triton.jit
def log_ratio(logp, old):
    """On-policy (``old`` is None) the log-ratio is 0 and its slope alive, but for an infinite logp."""
    if old is None:
        return bounded_difference(logp, tl.where(tl.abs(logp) == float("inf"), 0.0, logp))
    else:
        return bounded_difference(logp, old)


@triton.jit
def scored(x):
    """Of what engines return: nan or infinite at a token means that it was not scored, and its RL term is nothing."""
    return x - x == 0.0


@triton.jit
def surrogate(ratio, adv, low, high):
    """``-min(ratio A, clip(ratio) A)`` and where the clip has taken the gradient away."""
    clip = tl.where(ratio > high, high, tl.where(ratio < low, low, ratio))
    free, bound = ratio * adv, clip * adv
    clipped = ((adv > 0) & (ratio > high)) | ((adv < 0) & (ratio < low))
    return -tl.where(free < bound, free, bound), clipped


@triton.jit
def policy_term(logp, adv, ratio, u, beyond, sequence_ratio, coupled, p0, p1, p2, POLICY: tl.constexpr):
    """Loss, slope and update (``f'`` of a gate, 1 where no clip acts) of a token.

    ``p0``, ``p1``, ``p2`` are float64. ``beyond``: the log-ratio is clamped. ``coupled`` is what the first look found
    for the sequence: of GSPO the slope that each of its tokens receives, of DFPO its transformed weight.
    """
    dtype = logp.dtype
    if POLICY <= SOFTSIGN:
        f, update = gate_term(u, tl.where(adv > 0, p0.to(dtype), p1.to(dtype)), POLICY)
        loss = -adv * f
        slope = tl.where(beyond, 0.0, -adv * update * ratio)
    elif POLICY == GRPO:
        delta = tl.where(p2 > 0, p2, float("inf")).to(dtype)  # 0 stands for none; delta > high
        bounded = tl.where(ratio > delta, delta, ratio)
        loss, clipped = surrogate(bounded, adv, (1.0 - p0).to(dtype), (1.0 + p1).to(dtype))
        clipped = clipped | ((adv < 0) & (ratio > delta))
        slope = tl.where(clipped | beyond, 0.0, -adv * ratio)
        update = tl.where(clipped, 0.0, tl.full(logp.shape, 1.0, dtype))
    elif POLICY == CISPO:
        bound = p0.to(dtype)
        clipped = ratio > bound
        slope = -tl.where(clipped, bound, ratio) * adv
        loss = slope * logp
        update = tl.where(clipped, 0.0, tl.full(logp.shape, 1.0, dtype))
    elif POLICY == GSPO:
        loss, clipped = surrogate(sequence_ratio, adv, (1.0 - p0).to(dtype), (1.0 + p1).to(dtype))
        slope = tl.where(beyond, 0.0, coupled)
        update = tl.where(clipped, 0.0, tl.full(logp.shape, 1.0, dtype))
    else:
        tl.static_assert(POLICY == DFPO)
        slope = -coupled * adv
        loss = slope * logp
        update = tl.zeros(logp.shape, dtype)
    return loss, slope, update


@triton.jit
def kl_term(logp, ref, ratio, ratio_beyond, ESTIMATOR: tl.constexpr, RATIO_WEIGHTED: tl.constexpr):
    """KL estimate of a token and its slope (http://joschu.net/blog/kl-approx.html), ``d = ref - logp``."""
    d, low, beyond = bounded_difference(ref, logp)
    if ESTIMATOR == K1:
        value = -d
        slope = tl.full(d.shape, 1.0, d.dtype)
    elif ESTIMATOR == K2:
        value = d * d * 0.5
        slope = -d
    else:
        _, expm1 = exp_expm1(d, low)
        value = (expm1 - d) - low
        slope = -expm1
    slope = tl.where(beyond, 0.0, slope)
    if RATIO_WEIGHTED:
        slope = ratio * (slope + tl.where(ratio_beyond, 0.0, value))
        value = value * ratio
    return value, slope


@triton.jit
def supervised_term(logp, PHI: tl.constexpr):
    """Loss and slope of ``-phi logp``, phi detached, and p; phi = p (1 - p) (CHORD, arXiv 2508.11408) or 1."""
    p, expm1 = exp_expm1(logp, 0.0)
    if PHI:
        slope = p * expm1
    else:
        slope = tl.full(logp.shape, -1.0, logp.dtype)
    return slope * tl.where(slope == 0, 0.0, logp), slope, p


@triton.jit
def squared_norm(logp, sum_sq):
    """``||1_y - p||^2``: ``(1 - p_y)^2`` and the others' part of ``sum p^2``, in [0, (1 - p_y)^2] whatever rounds."""
    p, expm1 = exp_expm1(tl.where(logp > 0.0, 0.0, logp), 0.0)  # keeps nan
    away, others = expm1 * expm1, sum_sq - p * p
    size = tl.abs(others)
    others = tl.where(others < 0.0, 0.0, tl.where(others > away, away, others))
    norm = away + tl.where(size < float("inf"), others, size)
    return tl.where(sum_sq < 0.0, float("nan"), norm)  # which no sum of squares can be
