"""One kernel for the three row primitives: a persistent grid whose programs take rows in turn.

A row's statistics, its token's slope and its gradient depend on nothing but the row and its token.
"""

import triton
import triton.language as tl

from .math import exp_expm1
from .row_memory import start_of
from .row_pass import cross_entropy, fill_row, finite, gain_of, gift_target, moments, target_fall, write_gradient
from .terms import kl_term, log_ratio, policy_term, scored, supervised_term

STATISTICS = tl.constexpr(0)
GRADIENT = tl.constexpr(1)
FUSED = tl.constexpr(2)
DEMONSTRATION = tl.constexpr(2)
ELSEWHERE = tl.constexpr(-(2**31))  # as in schemas.py


@triton.jit
def token_slope(
    tokens, n, logp, expert, p0, p1, p2, kl_coef,
    POLICY: tl.constexpr, PHI: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr,
):  # fmt: skip
    """d loss / d logp of one token, by the terms that ``token_loss`` uses. Inputs of the policy are not read for
    demonstrations."""
    dtype: tl.constexpr = tokens.weight.dtype.element_ty
    weight = tl.load(tokens.weight + n)
    rollout = expert == 0
    logp_r = tl.where(rollout, logp, 0.0)
    if tokens.advantages is None:
        adv = tl.full((), float("nan"), dtype)
    else:
        adv = tl.load(tokens.advantages + n, mask=rollout, other=0.0)
    known = rollout | (expert != 0)  # and what the engines returned of the token is finite
    if tokens.old_logprobs is None:
        d, low, beyond = log_ratio(logp_r, None)
    else:
        old = tl.load(tokens.old_logprobs + n, mask=rollout, other=0.0)
        known = known & scored(old)
        d, low, beyond = log_ratio(logp_r, tl.where(known, old, 0.0))
    ratio, u = exp_expm1(d, low)
    _, slope, _ = policy_term(logp_r, adv, ratio, u, beyond, 1.0, 0.0, p0, p1, p2, POLICY)
    if tokens.rollout_weights is not None:
        correction = tl.load(tokens.rollout_weights + n, mask=rollout, other=0.0)
        known = known & scored(correction)
        slope *= tl.where(known, correction, 0.0)
    if tokens.ref_logprobs is not None:
        ref = tl.load(tokens.ref_logprobs + n, mask=rollout, other=0.0)
        _, kl_slope = kl_term(logp_r, ref, ratio, beyond, KL, KL_RATIO)
        penalty = kl_coef.to(dtype)
        known = tl.where(penalty == 0.0, known, known & scored(ref))
        slope += tl.where(penalty != 0.0, penalty * kl_slope, 0.0)
    _, cs, _ = supervised_term(logp, PHI)
    return weight * tl.where(rollout, tl.where(known, slope, 0.0), cs), tl.where(known, weight, 0.0)


@triton.jit
def bounded(factor, dtype: tl.constexpr):
    """At most what leaves 0 times it 0: beyond, no two probabilities but 1 and 0 are told apart anyway. Keeps nan."""
    most: tl.constexpr = 1e308 if dtype == tl.float64 else 2e38
    return tl.where(factor > most, most, factor)


@triton.jit(do_not_specialize=["N", "B", "V", "a", "b", "base_a", "base_b", "out_a", "out_b"])
def row_kernel(
    rows, tokens, given, out, N: tl.int64, B: tl.int64, V: tl.int64, a: tl.int64, b: tl.int64, base_a: tl.int64,
    base_b: tl.int64, out_a: tl.int64, out_b: tl.int64, scale: tl.float64, softcap: tl.float64, heat: tl.float64,
    beta: tl.float64, smooth: tl.float64, p0: tl.float64, p1: tl.float64, p2: tl.float64, kl_coef: tl.float64,
    entropy_coef: tl.float64,
    TASK: tl.constexpr, POLICY: tl.constexpr, PHI: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr,
    CAPPED: tl.constexpr, BONUS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """See ``schemas.py``; ``rows``, ``tokens``, ``given`` and ``out`` as in ``rows.py``."""
    wide: tl.constexpr = rows.logits.dtype.element_ty == tl.float64
    dtype: tl.constexpr = tl.float64 if wide else tl.float32
    scale, cool = tl.full((), scale, tl.float64), 1.0 / tl.full((), heat, tl.float64)
    softcap = tl.full((), softcap, tl.float64)
    if CAPPED:
        doubled = bounded(2.0 * scale / softcap, dtype)
    else:
        doubled = tl.full((), 1.0, tl.float64)
    beta, smooth = tl.full((), beta, tl.float64), tl.full((), smooth, tl.float64)
    p0, p1, p2 = tl.full((), p0, tl.float64), tl.full((), p1, tl.float64), tl.full((), p2, tl.float64)
    kl_coef, entropy_coef = tl.full((), kl_coef, tl.float64), tl.full((), entropy_coef, tl.float64)
    V = V.to(tl.int32)
    for n in range(tl.program_id(0).to(tl.int64), N, tl.num_programs(0)):
        kind = tl.load(rows.kind + n)
        target = tl.load(rows.targets + n).to(tl.int64)
        lost = ((target < 0) | (target >= V)) & ((TASK == FUSED) | (target != ELSEWHERE))
        start, out_start = start_of(n, B, a, b), start_of(n, B, out_a, out_b)
        if (kind == 0) | lost:
            nothing = tl.where(kind == 0, 0.0, float("nan"))
            expert = kind == DEMONSTRATION
            if TASK != GRADIENT:
                tl.store(out.logprobs + n, nothing)
                tl.store(out.entropy + n, nothing)
                tl.store(out.sum_sq + n, nothing)
                if TASK == STATISTICS:
                    parts: tl.constexpr = 2 if rows.base_logits is None else 4
                    tl.store(out.normalizer + n * parts + tl.arange(0, parts), tl.full([parts], 0.0, dtype) + nothing)
                if rows.base_logits is not None:
                    tl.store(out.supervised + n, tl.where(expert, nothing, 0.0))
            if TASK != STATISTICS:
                fill_row(out.gradient, out_start, V, nothing, LANES, WIDTH)
        else:
            one_row(
                rows, tokens, given, out, n, start, out_start, start_of(n, B, base_a, base_b), target,
                kind == DEMONSTRATION, V, scale, softcap, doubled, cool, beta, smooth, p0, p1, p2, kl_coef,
                entropy_coef, dtype, TASK, POLICY, PHI, KL, KL_RATIO, CAPPED, BONUS, LANES, WIDTH,
            )  # fmt: skip


@triton.jit
def one_row(
    rows, tokens, given, out, n, start, out_start, base_start, target, expert, V, scale, softcap, doubled, cool, beta,
    smooth, p0, p1, p2, kl_coef, entropy_coef, dtype: tl.constexpr, TASK: tl.constexpr, POLICY: tl.constexpr,
    PHI: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, CAPPED: tl.constexpr, BONUS: tl.constexpr,
    LANES: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A live row with a target inside it."""
    # 1. The transform: z = k x, x = raw or tanh(doubled raw / 2).
    if rows.temperature is not None:
        cool = 1.0 / tl.load(rows.temperature + n).to(tl.float64)
    slope_k = bounded(scale * cool, dtype)
    k = bounded(softcap * cool, dtype) if CAPPED else slope_k
    exact_doubled, doubled = doubled, doubled.to(dtype)
    here = (target >= 0) | (TASK == FUSED)
    raw = finite(tl.load(rows.logits + start + target, mask=here, other=0.0).to(dtype), CAPPED)

    # 2. Statistics, or what they were.
    if TASK == GRADIENT:
        parts: tl.constexpr = 2 if rows.base_logits is None else 4
        top = tl.load(given.normalizer + n * parts)
        log_sum = tl.load(given.normalizer + n * parts + 1).to(tl.float64)
        entropy = tl.load(given.entropy + n).to(tl.float64)
    else:
        top, log_sum, entropy, sum_sq = moments(rows.logits, start, V, doubled, k, dtype, CAPPED, LANES, WIDTH)
    gain = gain_of(top, doubled, CAPPED)
    below, target_flat = target_fall(raw, top, exact_doubled, dtype, CAPPED)
    logp = tl.where(here, below * k - log_sum, 0.0).to(dtype)
    p, expm1 = exp_expm1(logp, 0.0)

    # 3. GIFT's target.
    keep, uniform = (1.0 - smooth).to(dtype), (smooth / V).to(dtype)
    gift, inverse, base_top, base_log_sum = None, p, top, log_sum
    own = -expm1
    if rows.base_logits is not None:
        gift = expert & here
        base_top, inverse = tl.zeros((), dtype), tl.zeros((), dtype)
        base_log_sum, supervised = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
        if gift:
            one = tl.full((), 1.0, tl.float64)
            if TASK == GRADIENT:
                base_top = tl.load(given.normalizer + n * 4 + 2)
                base_log_sum = tl.load(given.normalizer + n * 4 + 3).to(tl.float64)
            else:
                base_top, base_log_sum, _, _ = moments(
                    rows.base_logits, base_start, V, doubled, one, dtype, False, LANES, WIDTH
                )
            base_y = tl.load(rows.base_logits + base_start + target).to(dtype)
            share, q_y, p0_y = gift_target(base_top, base_log_sum, base_y, beta, smooth, V)
            inverse = share.to(dtype)
            own = q_y.to(dtype) - p
            if TASK != GRADIENT:
                crossed = cross_entropy(
                    rows.logits, start, rows.base_logits, base_start, V, doubled, gain, k, top, log_sum,
                    base_top, base_log_sum, keep, uniform, dtype, CAPPED, LANES, WIDTH,
                )  # fmt: skip
                excess = q_y - p0_y
                crossed = tl.where(share == 0.0, 0.0, share * crossed)  # D may be infinite, and a cross entropy too
                supervised = -(crossed + tl.where(excess == 0.0, 0.0, excess * logp))
        if TASK != GRADIENT:
            tl.store(out.supervised + n, supervised)

    # 4. What is one a row.
    if TASK != GRADIENT:
        tl.store(out.logprobs + n, logp)
        tl.store(out.entropy + n, entropy)
        tl.store(out.sum_sq + n, sum_sq)
    if TASK == STATISTICS:
        parts: tl.constexpr = 2 if rows.base_logits is None else 4
        tl.store(out.normalizer + n * parts, top)
        tl.store(out.normalizer + n * parts + 1, log_sum)
        if rows.base_logits is not None:
            tl.store(out.normalizer + n * 4 + 2, base_top)
            tl.store(out.normalizer + n * 4 + 3, base_log_sum)

    # 5. The gradient.
    if TASK != STATISTICS:
        if TASK == FUSED:
            slope, weight = token_slope(tokens, n, logp, expert, p0, p1, p2, kl_coef, POLICY, PHI, KL, KL_RATIO)
            bonus = tl.where(expert, 0.0, -(weight * entropy_coef.to(dtype)))
        else:
            slope = tl.load(given.slope + n)
            bonus = tl.zeros((), dtype)
            if BONUS:
                bonus = tl.load(given.entropy_slope + n)
        slope, bonus, h = slope * slope_k.to(dtype), bonus * slope_k.to(dtype), entropy.to(dtype)
        tl.debug_barrier()  # in place: every thread has read the target's logit before one writes over it
        write_gradient(
            out.gradient, out_start, rows.logits, start, rows.base_logits, base_start, V, doubled, gain, k, slope,
            top, log_sum, h, bonus, gift, inverse, base_top, base_log_sum, keep, uniform, dtype, CAPPED, BONUS, LANES,
            WIDTH,
        )  # fmt: skip
        # The target's gradient, from where 1 - p loses no digits; after the one that took it for any column.
        dz = slope * own
        if BONUS:
            dz -= bonus * (p * (tl.where(p > 0.0, logp, 0.0) + h))
        if CAPPED:
            dz *= target_flat
        tl.debug_barrier()
        tl.store(out.gradient + out_start + target, dz.to(out.gradient.dtype.element_ty), mask=here)
