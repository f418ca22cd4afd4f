"""The first look at a batch, before a token can be weighed: how many there are; for GSPO and DFPO the sequence ratios.

Sums are float64, in a fixed order, without atomics. Buffers: S sequences, see ``token_loss.Looked``.
"""

import triton
import triton.language as tl

from .codes import GSPO, TOKEN_MEAN
from .memory import highest, read
from .sums import accumulator, add
from .terms import BOUND, log_ratio, scored

LOOKERS = tl.constexpr(256)  # most programs of `look`, each of which leaves one pair of counts to be added up


@triton.jit
def advantage_of(batch, s, start, i, length, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr):
    """Advantages of a block of tokens, whether given by token or by sequence."""
    dtype: tl.constexpr = batch.logprobs.dtype.element_ty
    if batch.advantages is None:  # demonstrations only; a rollout row, were there one, must not pass for a zero
        return tl.full([BLOCK], float("nan"), dtype)
    elif PER_TOKEN:
        return read(batch.advantages, start, i, length, BLOCK)
    else:
        return tl.full([BLOCK], 0.0, dtype) + tl.load(batch.advantages + s)


@triton.jit(do_not_specialize=["S", "T", "N"])
def look(
    batch, looked, S: tl.int64, T: tl.int64, N: tl.int64, p0: tl.float64, p1: tl.float64,
    POLICY: tl.constexpr, PRODUCT: tl.constexpr, AGGREGATION: tl.constexpr, SUPERVISED_AGGREGATION: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Count the tokens of each sequence and, in the unit of each branch's aggregation, of this program's sequences.

    Of a sequence-coupled objective the sequence ratios too; otherwise nothing but the mask is read. Offsets that fall
    are raised to the largest before them, for all that comes after too: no token is in two sequences.
    """
    p0, p1 = tl.full((), p0, tl.float64), tl.full((), p1, tl.float64)
    first = tl.program_id(0).to(tl.int64)
    policy_total = tl.zeros((), tl.int64)
    supervised_total = tl.zeros((), tl.int64)
    top = tl.zeros((), tl.int64)  # of the offsets up to the one that the last round ended with
    seen = tl.zeros((), tl.int64)
    for s in range(first, S, tl.num_programs(0)):
        if batch.cu_seqlens is None:
            start, length = s * T.to(tl.int64), T.to(tl.int64)
        else:
            start = highest(batch.cu_seqlens, seen, s + 1, top, N, 128)
            top = tl.minimum(tl.maximum(tl.load(batch.cu_seqlens + s + 1).to(tl.int64), start), N)
            seen = s + 2
            length = top - start
            tl.store(looked.offsets + s, start)
            if s == S - 1:
                tl.store(looked.offsets + S, top)
        lanes = tl.zeros([BLOCK], tl.int32)
        for i in range(0, length, BLOCK):
            lanes += read(batch.mask, start, i, length, BLOCK).to(tl.int32)
        count = tl.sum(lanes.to(tl.int64))
        tl.store(looked.count + s, count)
        expert = tl.load(batch.is_expert + s)
        present = (count > 0).to(tl.int64)
        policy_total += tl.where(expert, 0, count if AGGREGATION == TOKEN_MEAN else present)
        supervised_total += tl.where(expert, count if SUPERVISED_AGGREGATION == TOKEN_MEAN else present, 0)
        if POLICY >= GSPO:
            length = tl.where(expert, 0, length)
            look_at_sequence(batch, looked, s, start, length, count, p0, p1, POLICY, PRODUCT, PER_TOKEN, BLOCK)
    tl.store(looked.total + 2 * first, policy_total)
    tl.store(looked.total + 2 * first + 1, supervised_total)


@triton.jit
def look_at_sequence(
    batch, looked, s, start, length, count, p0, p1,
    POLICY: tl.constexpr, PRODUCT: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sequence ratio and slope (GSPO) or mean advantage (DFPO) of one rollout sequence; ``length`` is 0 for experts.

    Where GSPO clips depends on the sequence's ratio and the sign of a token's advantage alone, so the upstream weights
    are summed by sign, and one look is enough.
    """
    dtype: tl.constexpr = batch.logprobs.dtype.element_ty
    log_ratios = accumulator(BLOCK, dtype)
    positive = accumulator(BLOCK, dtype)
    negative = accumulator(BLOCK, dtype)
    neither = accumulator(BLOCK, dtype)  # 0, or nan
    for i in range(0, length, BLOCK):
        live = read(batch.mask, start, i, length, BLOCK) != 0
        logp = tl.where(live, read(batch.logprobs, start, i, length, BLOCK), 0.0)
        known = live  # and what the engines returned of the token is finite
        if batch.rollout_weights is not None:
            known = known & scored(read(batch.rollout_weights, start, i, length, BLOCK))
        if batch.ref_logprobs is not None:
            known = known & scored(read(batch.ref_logprobs, start, i, length, BLOCK))
        if batch.old_logprobs is None:
            d, low, _ = log_ratio(logp, None)
        else:
            old = read(batch.old_logprobs, start, i, length, BLOCK)
            known = known & scored(old)
            d, low, _ = log_ratio(logp, tl.where(known, old, 0.0))
        d, low = tl.where(known, d, 0.0), tl.where(known, low, 0.0)
        log_ratios = add(log_ratios, d.to(tl.float64) + low.to(tl.float64))  # exp makes more of an error here
        adv = tl.where(live, advantage_of(batch, s, start, i, length, PER_TOKEN, BLOCK), 0.0)
        force = adv
        if POLICY == GSPO:
            force = tl.where(known, adv, 0.0)
            if batch.rollout_weights is not None:
                force = tl.where(known, adv * read(batch.rollout_weights, start, i, length, BLOCK), 0.0)
        positive = add(positive, tl.where(adv > 0, force, 0.0))
        negative = add(negative, tl.where(adv < 0, force, 0.0))
        neither = add(neither, tl.where((adv > 0) | (adv < 0), 0.0, force))
    share = 1.0 / tl.maximum(count, 1).to(tl.float64)
    total = tl.sum(log_ratios)
    if PRODUCT:  # bounded like a single ratio, so that the group algebra can use it
        ratio = tl.exp(tl.where(total > BOUND, BOUND, tl.where(total < -BOUND, -BOUND, total)))
    else:
        ratio = tl.exp(total * share)
    up, down, rest = tl.sum(positive), tl.sum(negative), tl.sum(neither)
    if POLICY == GSPO:
        rounded = ratio.to(dtype)  # as the token kernel compares it
        up = tl.where(rounded > (1.0 + p1).to(dtype), 0.0, up)
        down = tl.where(rounded < (1.0 - p0).to(dtype), 0.0, down)
        coupled = -(up + down + rest) * ratio * share
    else:
        coupled = (up + down + rest) * share
    tl.store(looked.ratio + s, ratio)
    tl.store(looked.coupled + s, coupled)


@triton.jit(do_not_specialize=["S"])
def transform(groups, is_expert, looked, weight, residual, S: tl.int64, ORTHOGONAL: tl.constexpr, BLOCK: tl.constexpr):
    """DFPO's transform of the sequence ratios (arXiv 2604.13088v1, Eq. 17 and 18); a program a sequence looks at all.

    Only rollouts with tokens take part. ``residual`` receives each sequence's share of the cancellation residual
    ``|sum A w~| / sum |A w~|`` of its group, and the share's weight; every group that has a denominator weighs 1.
    """
    s = tl.program_id(0).to(tl.int64)
    group = tl.load(groups + s)
    smallest = tl.full([BLOCK], float("inf"), tl.float64)
    ratios = tl.zeros([BLOCK], tl.float64)
    dot = tl.zeros([BLOCK], tl.float64)
    square = tl.zeros([BLOCK], tl.float64)
    before = tl.zeros([BLOCK], tl.float64)
    for i in range(0, S, BLOCK):
        same, ratio, adv = members(groups, is_expert, looked, group, i + tl.arange(0, BLOCK), S)
        smallest = tl.where(same & (ratio < smallest), ratio, smallest)
        ratios += ratio
        dot += adv * ratio
        before += tl.abs(adv * ratio)
        square += adv * adv
    least, total, square_sum = tl.min(smallest), tl.sum(ratios), tl.sum(square)
    least = tl.where(total == total, tl.where(total > 0, least, 0.0), total)  # a minimum does not keep nan, a sum does
    along = tl.where(square_sum > 0, tl.sum(dot) / tl.where(square_sum > 0, square_sum, 1.0), 0.0)

    net = tl.zeros([BLOCK], tl.float64)
    gross = tl.zeros([BLOCK], tl.float64)
    count = tl.zeros([BLOCK], tl.int32)
    for i in range(0, S, BLOCK):
        same, ratio, adv = members(groups, is_expert, looked, group, i + tl.arange(0, BLOCK), S)
        force = adv * ((ratio - along * adv) if ORTHOGONAL else least)
        net += force
        gross += tl.abs(force)
        count += same.to(tl.int32)
    own = (tl.load(looked.ratio + s) - along * tl.load(looked.coupled + s)) if ORTHOGONAL else least
    rollout = (tl.load(looked.count + s) > 0) & (tl.load(is_expert + s) == 0)
    tl.store(weight + s, tl.where(rollout, own, 0.0))
    gross_sum = tl.sum(gross)
    # What is left of a group whose ratios lie along its advantages (a group of one) is rounding, not a direction.
    rounding = 1e-12 * tl.sum(before) if ORTHOGONAL else 0.0
    counted = rollout & (gross_sum > rounding)
    share = tl.where(counted, 1.0 / tl.maximum(tl.sum(count), 1).to(tl.float64), 0.0)
    left = tl.abs(tl.sum(net)) / tl.where(counted, gross_sum, 1.0)
    tl.store(residual + 2 * s, tl.where(counted, share * left, 0.0))
    tl.store(residual + 2 * s + 1, share)


@triton.jit
def members(groups, is_expert, looked, group, j, S):
    """Which of the sequences ``j`` are rollouts of ``group``, their ratios and mean advantages; 0 for all others."""
    inside = j < S
    rollout = tl.load(is_expert + j, mask=inside, other=1) == 0
    same = rollout & (tl.load(looked.count + j, mask=inside, other=0) > 0)
    same = same & (tl.load(groups + j, mask=inside, other=0) == group)
    return same, tl.load(looked.ratio + j, mask=same, other=0.0), tl.load(looked.coupled + j, mask=same, other=0.0)
