"""``gac_kernels::token_weights`` on Triton: the counting launch of ``token_loss``, and one that spreads the weights."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .first_look import LOOKERS, look
from .memory import clear, read, span, write
from .rows import check_device, on_device
from .token_loss import LAUNCH, THREADS, Batch, Looked
from .token_pass import divisor, shares

BLOCK = THREADS * 16  # a thread's 16-byte load of the mask


class Spread(NamedTuple):
    """Results, one a token."""

    kind: Tensor
    weight: Tensor
    advantages: Tensor


@triton.jit(do_not_specialize=["S", "T", "N"])
def spread(
    batch, looked, out, mu, policy_denominator, supervised_denominator, S: tl.int64, T: tl.int64, N: tl.int64,
    norm_length: tl.float64, AGGREGATION: tl.constexpr, SUPERVISED_AGGREGATION: tl.constexpr, PER_TOKEN: tl.constexpr,
    BOTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a sequence; the weight is made as `token` makes it."""
    s = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out.weight.dtype.element_ty
    start, length = span(batch.cu_seqlens, s, T, N)
    count = tl.load(looked.count + s)
    rollout = tl.load(batch.is_expert + s) == 0
    pair = 2 * tl.arange(0, LOOKERS)
    policy_total = tl.sum(tl.load(looked.total + pair, mask=pair < 2 * S, other=0))
    supervised_total = tl.sum(tl.load(looked.total + pair + 1, mask=pair < 2 * S, other=0))
    policy_by = divisor(count, policy_total, policy_denominator, norm_length, AGGREGATION)
    supervised_by = divisor(count, supervised_total, supervised_denominator, norm_length, SUPERVISED_AGGREGATION)
    by = tl.where(count > 0, tl.where(rollout, policy_by, supervised_by), 1.0)
    supervised_share, policy_share = shares(mu, BOTH)
    weight = tl.where(rollout, policy_share, supervised_share) * tl.where(count > 0, 1.0 / by, 0.0)
    for i in range(0, length, BLOCK):
        live = read(batch.mask, start, i, length, BLOCK) != 0
        kind = tl.where(live, tl.where(rollout, 1, 2), 0)
        write(out.kind, start, i, length, kind.to(tl.uint8), BLOCK)
        write(out.weight, start, i, length, tl.where(live, weight.to(dtype), 0.0), BLOCK)
        if batch.advantages is None:
            advantage = tl.full([BLOCK], float("nan"), dtype)
        elif PER_TOKEN:
            advantage = read(batch.advantages, start, i, tl.where(rollout, length, 0), BLOCK)
        else:
            advantage = tl.full([BLOCK], 0.0, dtype) + tl.load(batch.advantages + s, mask=rollout, other=0.0)
        write(out.advantages, start, i, length, tl.where(live & rollout, advantage, 0.0), BLOCK)
    if batch.cu_seqlens is not None:  # tokens of no sequence
        head, tail = tl.load(batch.cu_seqlens), tl.load(batch.cu_seqlens + S)
        clear(out.kind, head, tail, N, s, S, BLOCK)
        clear(out.weight, head, tail, N, s, S, BLOCK)
        clear(out.advantages, head, tail, N, s, S, BLOCK)


def token_weights(
    mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, advantages: Tensor | None,
    token_advantages: bool, mu: Tensor, policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    aggregation: int, supervised_aggregation: int, norm_length: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As the schema in ``schemas.py`` says."""
    check_device(mask)
    S, N = is_expert.shape[0], mask.numel()
    kind = torch.empty(N, dtype=torch.uint8, device=mask.device)
    out = Spread(kind, mu.new_empty(N), mu.new_empty(N))
    if S == 0:
        return tuple(value.zero_() for value in out)
    new = is_expert.new_empty
    offsets = None if cu_seqlens is None else torch.empty_like(cu_seqlens, dtype=torch.int64)
    looked = Looked(new(S, dtype=torch.int64), new((LOOKERS.value, 2), dtype=torch.int64), offsets=offsets)
    batch = Batch(mask, cu_seqlens, is_expert)
    branches = {"AGGREGATION": aggregation, "SUPERVISED_AGGREGATION": supervised_aggregation}
    with on_device(mask):
        look[(min(S, LOOKERS.value),)](
            batch, looked, S, seq_len, N, 0.0, 0.0, POLICY=0, PRODUCT=False, PER_TOKEN=False, BLOCK=BLOCK,
            **branches, **LAUNCH,
        )  # fmt: skip
        spread[(S,)](
            batch._replace(cu_seqlens=offsets, advantages=advantages), looked, out, mu, policy_denominator,
            supervised_denominator, S, seq_len, N, norm_length, PER_TOKEN=token_advantages, BOTH=mu.numel() == 2,
            BLOCK=BLOCK // 4, **branches, **LAUNCH,
        )  # fmt: skip
    return tuple(out)
