"""The pass over the tokens, and the reduction of what it leaves for each sequence to the scalars of the loss.

Sums are float64, in a fixed order, without atomics. Buffers: S sequences, N tokens, see ``token_loss``.
"""

import triton
import triton.language as tl

from .codes import GSPO, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM_NORM
from .first_look import LOOKERS, advantage_of
from .math import exp_expm1
from .memory import clear, read, span, write
from .sums import accumulator, add, maximum, total8
from .terms import kl_term, log_ratio, policy_term, scored, squared_norm, supervised_term


@triton.jit
def divisor(count, total, denominator, norm_length, AGGREGATION: tl.constexpr):
    """What the aggregation of a branch divides a token of a sequence of ``count`` tokens by, float64."""
    by = total.to(tl.float64)
    if denominator is not None:
        by = tl.load(denominator).to(tl.float64)
    if AGGREGATION == SEQ_MEAN_TOKEN_MEAN:
        by *= count.to(tl.float64)
    elif AGGREGATION == SEQ_MEAN_TOKEN_SUM_NORM:
        by *= norm_length
    return by


@triton.jit
def shares(mu, BOTH: tl.constexpr):
    """What the supervised and the policy's branch count for in the loss, float64. ``BOTH``: ``mu`` holds mu and 1 - mu,
    which then need not be made of what rounding has left of mu."""
    share = tl.load(mu).to(tl.float64)
    if BOTH:
        return share, tl.load(mu + 1).to(tl.float64)
    else:
        return share, 1.0 - share


@triton.jit(do_not_specialize=["S", "T", "N"])
def token(
    batch, looked, out, mu, policy_denominator, supervised_denominator, S: tl.int64, T: tl.int64, N: tl.int64,
    p0: tl.float64, p1: tl.float64, p2: tl.float64, kl_coef: tl.float64, entropy_coef: tl.float64,
    norm_length: tl.float64,
    POLICY: tl.constexpr, PHI: tl.constexpr, KL: tl.constexpr, KL_RATIO: tl.constexpr, AGGREGATION: tl.constexpr,
    SUPERVISED_AGGREGATION: tl.constexpr, PER_TOKEN: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One pass over the tokens of one sequence: slopes, the row of signals, and the sums that `finish` adds up."""
    s = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = batch.logprobs.dtype.element_ty
    p0, p1, p2 = tl.full((), p0, tl.float64), tl.full((), p1, tl.float64), tl.full((), p2, tl.float64)
    start, length = span(batch.cu_seqlens, s, T, N)
    count = tl.load(looked.count + s)
    rollout = tl.load(batch.is_expert + s) == 0
    policy_length = tl.where(rollout, length, 0)  # the inputs of the policy term are not even read for experts

    pair = 2 * tl.arange(0, LOOKERS)
    policy_total = tl.sum(tl.load(looked.total + pair, mask=pair < 2 * S, other=0))
    supervised_total = tl.sum(tl.load(looked.total + pair + 1, mask=pair < 2 * S, other=0))
    policy_by = divisor(count, policy_total, policy_denominator, norm_length, AGGREGATION)
    supervised_by = divisor(count, supervised_total, supervised_denominator, norm_length, SUPERVISED_AGGREGATION)
    by = tl.where(count > 0, tl.where(rollout, policy_by, supervised_by), 1.0)
    weight = tl.where(count > 0, 1.0 / by, 0.0)
    supervised_share, policy_share = shares(mu, BOTH)
    share = tl.where(rollout, policy_share, supervised_share)
    slope_weight = (share * weight).to(dtype)
    penalty = tl.full((), kl_coef, tl.float64).to(dtype)
    entropy_weight = (-(share * weight) * entropy_coef).to(dtype)
    if POLICY >= GSPO:
        shown = tl.load(looked.ratio + s)
        sequence_ratio, coupled = tl.full([BLOCK], shown, dtype), tl.load(looked.coupled + s).to(dtype)
    else:
        sequence_ratio, coupled = 1.0, 0.0

    zero = accumulator(BLOCK, dtype)
    nll, advs, diffs, cs1, cr1, cs2, cr2, cscr = zero, zero, zero, zero, zero, zero, zero, zero
    own_n, diff_n, losses, kls, entropies, ratios, divergences, updates = zero, zero, zero, zero, zero, zero, zero, zero
    largest = tl.zeros(zero.shape, dtype)
    for i in range(0, length, BLOCK):
        # 1. Select before any arithmetic: what a dead place or the other branch holds must not leak, nan included.
        live = read(batch.mask, start, i, length, BLOCK) != 0
        policy = live & rollout
        logp = tl.where(live, read(batch.logprobs, start, i, length, BLOCK), 0.0)
        logp_r = tl.where(policy, logp, 0.0)
        adv = tl.where(policy, advantage_of(batch, s, start, i, policy_length, PER_TOKEN, BLOCK), 0.0)

        # 2. The supervised term, whose slope the signals want on rollouts too.
        expert_loss, cs, _ = supervised_term(logp, PHI)
        if batch.supervised is not None:
            expert_loss = tl.where(live, read(batch.supervised, start, i, length, BLOCK), 0.0)
        cs = tl.where(live, cs, 0.0)
        known = policy  # and what the engines returned of the token is finite
        if batch.rollout_weights is not None:
            correction = tl.where(live, read(batch.rollout_weights, start, i, length, BLOCK), 0.0)
            own_cs = tl.where(live, cs * correction, 0.0)
            cs = tl.where(rollout, cs, own_cs)
            expert_loss = tl.where(correction == 0, 0.0, expert_loss * correction)
            known = known & scored(correction)
        if batch.old_logprobs is not None:
            known = known & scored(read(batch.old_logprobs, start, i, policy_length, BLOCK))
        if batch.ref_logprobs is not None:
            ref = tl.where(policy, read(batch.ref_logprobs, start, i, policy_length, BLOCK), 0.0)
            known = tl.where(penalty == 0.0, known, known & scored(ref))

        # 3. The policy term and its KL penalty.
        if batch.old_logprobs is None:
            d, low, beyond = log_ratio(logp_r, None)
        else:
            old = read(batch.old_logprobs, start, i, policy_length, BLOCK)
            d, low, beyond = log_ratio(logp_r, tl.where(known, old, 0.0))
            d, low = tl.where(known, d, 0.0), tl.where(known, low, 0.0)  # in its sequence's sums too
        ratio, u = exp_expm1(d, low)
        loss, cr, update = policy_term(logp_r, adv, ratio, u, beyond, sequence_ratio, coupled, p0, p1, p2, POLICY)
        if batch.rollout_weights is not None:
            correction = tl.where(known, correction, 0.0)
            loss *= correction
            if POLICY != GSPO:  # whose slope holds the corrections of the whole sequence already
                cr *= correction
        if batch.ref_logprobs is not None:
            kl, kl_slope = kl_term(logp_r, ref, ratio, beyond, KL, KL_RATIO)
            cr += tl.where(penalty != 0.0, penalty * kl_slope, 0.0)
            kls = add(kls, tl.where(known & scored(ref), kl, 0.0))
        cr = tl.where(known, cr, 0.0)
        loss = tl.where(rollout, tl.where(known, loss, 0.0), expert_loss)
        own, diff = tl.where(rollout, cr, cs), cs - cr

        # 4. Sums. All reads come before the first write, past which the compiler may move none.
        if batch.sum_sq is not None:
            norm = squared_norm(logp, tl.where(live, read(batch.sum_sq, start, i, length, BLOCK), 0.0))
            own_n = add(own_n, own * own * norm)
            diff_n = add(diff_n, diff * diff * norm)
        if batch.entropy is not None:
            entropies = add(entropies, tl.where(known, read(batch.entropy, start, i, policy_length, BLOCK), 0.0))
        nll = add(nll, -logp)
        advs = add(advs, adv)
        diffs = add(diffs, diff * diff)
        cs1 = add(cs1, cs)
        cr1 = add(cr1, cr)
        cs2 = add(cs2, cs * cs)
        cr2 = add(cr2, cr * cr)
        cscr = add(cscr, cs * cr)
        losses = add(losses, tl.where(live, loss, 0.0))
        divergences = add(divergences, tl.where(policy, (u - d) - low, 0.0))
        updates = add(updates, tl.where(policy, update, 0.0))
        if POLICY < GSPO:
            ratios = add(ratios, tl.where(policy, ratio, 0.0))
            largest = maximum(largest, tl.where(policy, ratio, 0.0))

        # 5. What is one a token.
        write(out.slope, start, i, length, tl.where(live, own * slope_weight, 0.0), BLOCK)
        write(out.logprobs, start, i, length, logp, BLOCK)
        if batch.entropy is not None:
            write(out.entropy_slope, start, i, length, tl.where(known, entropy_weight, 0.0), BLOCK)

    lane = tl.arange(0, 8)
    row = out.rows + s * 12
    first = total8(nll, advs, diffs, cs1, cr1, cs2, cr2, cscr)
    second = total8(own_n, diff_n, losses, kls, entropies, ratios, divergences, updates)
    first /= tl.where(lane == 1, tl.maximum(count, 1), 1).to(tl.float64)  # the mean advantage
    second *= tl.where((lane >= 2) & (lane < 5), weight, 1.0)
    top = tl.max(largest)
    if POLICY >= GSPO:  # one ratio for all tokens of the sequence
        tokens = tl.where(rollout, count, 0)
        second = tl.where(lane == 5, shown * tokens, second)
        top = tl.where(tokens > 0, shown, 0.0)
    tl.store(row, tl.where((count > 0) & (rollout == 0), 1.0, 0.0))
    tl.store(row + 1, count)
    tl.store(row + 2 + lane, first)
    tl.store(row + 10 + lane, second, mask=lane < 2)
    tl.store(out.part + (s * 8 - 2) + lane, second, mask=lane >= 2)
    tl.store(out.part + s * 8 + 6, top)
    if batch.cu_seqlens is not None:
        clear_uncovered(batch, out, s, S, N, BLOCK)


@triton.jit
def clear_uncovered(batch, out, s, S, N, BLOCK: tl.constexpr):
    """Zeros before the first and after the last sequence of a packed batch, shared out among all programs."""
    head, tail = tl.load(batch.cu_seqlens), tl.load(batch.cu_seqlens + S)
    clear(out.slope, head, tail, N, s, S, BLOCK)
    clear(out.logprobs, head, tail, N, s, S, BLOCK)
    if batch.entropy is not None:
        clear(out.entropy_slope, head, tail, N, s, S, BLOCK)


@triton.jit(do_not_specialize=["S"])
def finish(
    is_expert, count, residual, part, mu, loss, scalars, S: tl.int64, kl_coef: tl.float64, entropy_coef: tl.float64,
    CLIPS: tl.constexpr, BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """``schemas.SCALARS`` and the loss from what `token` left for each sequence; a single program."""
    zero = tl.zeros([BLOCK], tl.float64)
    policy, supervised, kls, entropies = zero, zero, zero, zero
    ratios, divergences, updates, tokens = zero, zero, zero, zero
    largest, residuals, groups = zero, zero, zero
    for i in range(0, S, BLOCK):
        s = i + tl.arange(0, BLOCK)
        inside = s < S
        rollout = tl.load(is_expert + s, mask=inside, other=1) == 0
        own = tl.load(part + 8 * s, mask=inside, other=0.0)
        policy += tl.where(rollout, own, 0.0)
        supervised += tl.where(rollout, 0.0, own)
        kls += tl.load(part + 8 * s + 1, mask=rollout, other=0.0)
        entropies += tl.load(part + 8 * s + 2, mask=rollout, other=0.0)
        ratios += tl.load(part + 8 * s + 3, mask=inside, other=0.0)
        divergences += tl.load(part + 8 * s + 4, mask=inside, other=0.0)
        updates += tl.load(part + 8 * s + 5, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(part + 8 * s + 6, mask=inside, other=0.0))
        tokens += tl.load(count + s, mask=rollout, other=0).to(tl.float64)
        if residual is not None:
            residuals += tl.load(residual + 2 * s, mask=inside, other=0.0)
            groups += tl.load(residual + 2 * s + 1, mask=inside, other=0.0)

    # The lanes are the scalars in their order, but for lane 5, where ratio_max belongs.
    lane = tl.arange(0, 8)
    token_count, ratio_sum = tl.sum(tokens), tl.sum(ratios)
    sums = total8(policy, supervised, kls, entropies, ratios, zero, divergences, updates)
    sums /= tl.where(lane < 4, 1.0, tl.maximum(token_count, 1.0))
    tl.store(scalars + lane, sums, mask=lane != 5)
    tl.store(scalars + 5, tl.where(ratio_sum == ratio_sum, tl.max(largest), ratio_sum))  # a maximum does not keep nan
    if CLIPS:
        unclipped = tl.sum(updates) / tl.maximum(token_count, 1.0)
        tl.store(scalars + 8, tl.where(token_count > 0, 1.0 - unclipped, 0.0))
    else:
        tl.store(scalars + 8, 0.0)
    tl.store(scalars + 9, tl.sum(residuals) / tl.maximum(tl.sum(groups), 1.0))

    kl_coef, entropy_coef = tl.full((), kl_coef, tl.float64), tl.full((), entropy_coef, tl.float64)
    supervised_share, policy_share = shares(mu, BOTH)
    coefficient = tl.where(lane == 0, 1.0, tl.where(lane == 2, kl_coef, -entropy_coef)) * policy_share
    coefficient = tl.where(lane == 1, supervised_share, coefficient)
    tl.store(loss, tl.sum(tl.where(lane < 4, sums * coefficient, 0.0)))
