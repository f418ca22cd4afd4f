"""``gac_kernels::token_loss`` on Triton: three launches, four for DFPO, and the allocation of buffers.

    look       tokens of each sequence; for GSPO and DFPO the sequence ratios too
    transform  DFPO alone: the group transform of the ratios
    token      everything that is one a token or one a sequence; one program a sequence
    finish     one program: loss and scalars

Nothing here reads the device. Lengths, counts and parameters are run-time arguments; compiled anew is only for another
objective, another choice of optional inputs, another dtype, or a tensor that begins off a 16-byte boundary.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import codes
from .first_look import LOOKERS, look, transform
from .token_pass import finish, token

INTERPRETED = not isinstance(token, triton.JITFunction)  # decided by TRITON_INTERPRET when triton was imported

# Contraction of a * b + c is off: the formulas of math.py are made for that, and the default of this switch, with it
# the machine code, differs between versions of Triton.
LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
if torch.version.hip is None:
    LAUNCH["maxnreg"] = 255  # left alone, ptxas spills some bytes of `token` to fit a third block on a multiprocessor
THREADS = 32 * LAUNCH["num_warps"]
CLIPPING = (codes.GRPO.value, codes.CISPO.value, codes.GSPO.value)


class Batch(NamedTuple):
    """Inputs of ``schemas.py's token_loss``; a kernel is compiled without those that are None."""

    mask: Tensor
    cu_seqlens: Tensor | None
    is_expert: Tensor
    logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    advantages: Tensor | None = None
    rollout_weights: Tensor | None = None
    ref_logprobs: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None
    supervised: Tensor | None = None


class Looked(NamedTuple):
    """What the first look leaves behind."""

    count: Tensor  # (S,) int64, live tokens
    total: Tensor  # (LOOKERS, 2) int64 in the unit of the aggregation, tokens or sequences; policy and supervised
    ratio: Tensor | None = None  # (S,) float64, the sequence ratio of GSPO and DFPO
    coupled: Tensor | None = None  # (S,) float64, GSPO: slope of each token; DFPO: mean advantage, then weight
    offsets: Tensor | None = None  # (S + 1,) int64, those of a packed batch, in [0, N] and never falling


class Out(NamedTuple):
    """Outputs of ``schemas.py's token_loss`` that `token` writes."""

    rows: Tensor
    logprobs: Tensor
    slope: Tensor
    entropy_slope: Tensor | None
    part: Tensor  # (S, 8) float64: loss, kl, entropy, ratio, k3 of the ratio, update: sums; largest ratio; unused


def token_loss(
    logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor,
    advantages: Tensor | None, token_advantages: bool, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, entropy: Tensor | None, sum_sq: Tensor | None, supervised: Tensor | None,
    groups: Tensor | None, mu: Tensor,
    policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    policy: int, p0: float, p1: float, p2: float, phi: bool, kl_coef: float, kl_estimator: int, kl_ratio_weighted: bool,
    entropy_coef: float, aggregation: int, supervised_aggregation: int, norm_length: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results as the schema in ``schemas.py`` says.

    Raises:
        RuntimeError: for tensors on a CPU, unless the process runs Triton's interpreter.
        TypeError: for a dtype other than float32 and float64.
    """
    _check(logprobs)
    S, N, width = is_expert.shape[0], logprobs.numel(), 16 // logprobs.element_size()
    tensors = (
        mask, cu_seqlens, is_expert, logprobs, old_logprobs, advantages, rollout_weights, ref_logprobs, entropy, sum_sq,
        supervised,
    )  # fmt: skip
    batch = Batch(*(None if x is None else x.contiguous() for x in tensors))
    loss, scalars, out = _outputs(batch, S)
    entropy_slope = logprobs.new_empty(0) if entropy is None else out.entropy_slope
    results = loss, scalars, out.rows, out.logprobs, out.slope, entropy_slope
    if S == 0:
        for result in results:
            result.zero_()
        return results

    coupled, dfpo = policy >= codes.GSPO.value, policy == codes.DFPO.value
    looked, seen = _looked(batch, S, coupled, kl_coef != 0)
    residual = None
    with _device(logprobs):
        look[(min(S, LOOKERS.value),)](
            seen, looked, S, seq_len, N, p0, p1,
            POLICY=policy if coupled else 0, PRODUCT=dfpo and p1 == codes.PRODUCT.value,
            AGGREGATION=aggregation, SUPERVISED_AGGREGATION=supervised_aggregation, PER_TOKEN=token_advantages,
            BLOCK=THREADS * (width if coupled else 16), **LAUNCH,
        )  # fmt: skip
        batch = batch._replace(cu_seqlens=looked.offsets)
        if dfpo:
            weight, residual = torch.empty_like(looked.coupled), looked.coupled.new_empty((S, 2))
            transform[(S,)](
                groups.contiguous(), batch.is_expert, looked, weight, residual, S,
                ORTHOGONAL=p0 == codes.ADV_ORTHOGONAL.value, BLOCK=256, **LAUNCH,
            )  # fmt: skip
            looked = looked._replace(coupled=weight)
        token[(S,)](
            batch, looked, out, mu, policy_denominator, supervised_denominator, S, seq_len, N,
            p0, p1, p2, kl_coef, entropy_coef, norm_length,
            POLICY=policy, PHI=phi, KL=kl_estimator, KL_RATIO=kl_ratio_weighted, AGGREGATION=aggregation,
            SUPERVISED_AGGREGATION=supervised_aggregation, PER_TOKEN=token_advantages, BOTH=mu.numel() == 2,
            BLOCK=THREADS * width, **LAUNCH,
        )  # fmt: skip
        finish[(1,)](
            batch.is_expert, looked.count, residual, out.part, mu, loss, scalars, S, kl_coef, entropy_coef,
            CLIPS=policy in CLIPPING, BOTH=mu.numel() == 2, BLOCK=256, **LAUNCH,
        )  # fmt: skip
    return results


def _outputs(batch: Batch, S: int) -> tuple[Tensor, Tensor, Out]:
    new = batch.logprobs.new_empty
    slope = torch.empty_like(batch.logprobs)
    entropy_slope = None if batch.entropy is None else torch.empty_like(slope)
    part = new((S, 8), dtype=torch.float64)
    return new(()), new(10), Out(new((S, 12)), torch.empty_like(slope), slope, entropy_slope, part)


def _looked(batch: Batch, S: int, coupled: bool, penalty: bool) -> tuple[Looked, Batch]:
    """Buffers of the first look, and the inputs it sees: what it has no use for would only have it compiled again."""
    new = batch.is_expert.new_empty
    offsets = None if batch.cu_seqlens is None else torch.empty_like(batch.cu_seqlens, dtype=torch.int64)
    looked = Looked(new(S, dtype=torch.int64), new((LOOKERS.value, 2), dtype=torch.int64), offsets=offsets)
    if not coupled:
        return looked, Batch(batch.mask, batch.cu_seqlens, batch.is_expert)
    looked = looked._replace(ratio=new(S, dtype=torch.float64), coupled=new(S, dtype=torch.float64))
    reference = batch.ref_logprobs if penalty else None  # a token that it does not know has no part
    return looked, batch._replace(ref_logprobs=reference, entropy=None, sum_sq=None, supervised=None)


def _check(logprobs: Tensor) -> None:
    if logprobs.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend 'triton' needs tensors on a GPU, got logprobs on the CPU; to run the kernels in Triton's "
            "interpreter set TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    if logprobs.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logprobs must be float32 or float64, got {str(logprobs.dtype).removeprefix('torch.')}")


def _device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
