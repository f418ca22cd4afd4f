"""The row primitives on Triton: one launch each, whatever the lengths.

Nothing here reads the device. Compiled anew is only for another task, objective, dtype or choice of optional inputs,
for a tensor that begins off a 16-byte boundary, and for each of three ranges of row lengths, which differ in the warps
at work on a row.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .row_kernel import FUSED, GRADIENT, STATISTICS, row_kernel
from .token_loss import LAUNCH

INTERPRETED = not isinstance(row_kernel, triton.JITFunction)
SHORT, MEDIUM = 2048, 1 << 17  # columns that four warps hold; bytes of a row of which two fit into a level-1 cache
MOST_COLUMNS = 2**31 - 2**16  # a tile beyond the last column still has a 32-bit number


class Rows(NamedTuple):
    """Inputs of every row operator; a kernel is compiled without those that are None."""

    logits: Tensor
    targets: Tensor
    kind: Tensor
    temperature: Tensor | None
    base_logits: Tensor | None


class Tokens(NamedTuple):
    """What a token's slope is made of."""

    weight: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    rollout_weights: Tensor | None = None


class Given(NamedTuple):
    """What the statistics gave, and the slopes."""

    normalizer: Tensor | None = None
    entropy: Tensor | None = None
    slope: Tensor | None = None
    entropy_slope: Tensor | None = None


class Out(NamedTuple):
    """Results; ``gradient`` may be the logits."""

    logprobs: Tensor | None = None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None
    normalizer: Tensor | None = None
    supervised: Tensor | None = None
    gradient: Tensor | None = None


_NO_TERM = (0, 1.0, 1.0, 0.0, False, 0.0, 3, False, 0.0)


def row_statistics(
    logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    *static: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """As the schema in ``schemas.py`` says."""
    rows = Rows(logits, targets, kind, temperature, base_logits)
    out, results = _results(rows)
    columns = 2 if base_logits is None else 4
    out = out._replace(normalizer=out.logprobs.new_empty((out.logprobs.shape[0], columns)))
    _launch(STATISTICS.value, rows, Tokens(), Given(), out, static, _NO_TERM, False)
    return *results[:3], out.normalizer, results[3]


def row_gradient(logits: Tensor, *rest: Any) -> Tensor:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _differentiate(gradient, logits, *rest)
    return gradient


def row_gradient_(logits: Tensor, *rest: Any) -> None:
    _differentiate(logits, logits, *rest)


def _differentiate(
    gradient: Tensor, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None,
    *static: float,
) -> None:  # fmt: skip
    rows = Rows(logits, targets, kind, temperature, base_logits)
    given = Given(normalizer, entropy, slope, entropy_slope)
    bonus = entropy_slope is not None
    _launch(GRADIENT.value, rows, Tokens(), given, Out(gradient=gradient), static, _NO_TERM, bonus)


def fused_rows(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gradient = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    return *_fuse(gradient, logits, *rest), gradient


def fused_rows_(logits: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return _fuse(logits, logits, *rest)


def _fuse(
    gradient: Tensor, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None,
    base_logits: Tensor | None, weight: Tensor, advantages: Tensor | None, old_logprobs: Tensor | None,
    ref_logprobs: Tensor | None, rollout_weights: Tensor | None, scale: float, softcap: float,
    temperature_value: float, beta: float, smooth: float, *term: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows = Rows(logits, targets, kind, temperature, base_logits)
    tokens = Tokens(weight, advantages, old_logprobs, ref_logprobs, rollout_weights)
    out, results = _results(rows)
    static = scale, softcap, temperature_value, beta, smooth
    _launch(FUSED.value, rows, tokens, Given(), out._replace(gradient=gradient), static, term, term[-1] != 0)
    return results


def _results(rows: Rows) -> tuple[Out, tuple[Tensor, ...]]:
    """Per-row buffers, and what the operator returns of them: absent is (0,), not None."""
    count = rows.logits.shape[0] * rows.logits.shape[1]
    dtype = torch.promote_types(rows.logits.dtype, torch.float32)
    sizes = count, count, count, 0 if rows.base_logits is None else count
    results = tuple(torch.empty(size, dtype=dtype, device=rows.logits.device) for size in sizes)
    return Out(*results[:3], supervised=None if rows.base_logits is None else results[3]), results


def _launch(
    task: int, rows: Rows, tokens: Tokens, given: Given, out: Out, static: tuple[float, ...], term: tuple[Any, ...],
    bonus: bool,
) -> None:  # fmt: skip
    logits = rows.logits
    check_device(logits)
    A, B, V = logits.shape
    if A * B == 0:
        return
    if V > MOST_COLUMNS:
        raise ValueError(f"logits must have at most {MOST_COLUMNS} columns, got {V}")
    policy, p0, p1, p2, phi, kl_coef, kl_estimator, kl_ratio_weighted, entropy_coef = term
    warps = 4 if V <= SHORT else 8 if V * logits.element_size() <= MEDIUM else 16
    width = 16 // logits.element_size()
    lanes = (64 if rows.base_logits is None else 32) * warps  # GIFT holds two rows' tiles at once
    with on_device(logits):
        row_kernel[(min(A * B, programs(logits.device, 16 // warps)),)](
            rows, tokens, given, out, A * B, B, V, *_strides(logits), *_strides(rows.base_logits),
            *_strides(out.gradient), *static, p0, p1, p2, kl_coef, entropy_coef,
            TASK=task, POLICY=policy, PHI=phi, KL=kl_estimator, KL_RATIO=kl_ratio_weighted, CAPPED=static[1] != 0,
            BONUS=bonus, LANES=lanes, WIDTH=width, **(LAUNCH | _limits(warps)),
        )  # fmt: skip


def _limits(warps: int) -> dict[str, int]:
    """A multiprocessor's 65536 registers are for 16 warps, of however many rows."""
    return {"num_warps": warps} | ({"maxnreg": 128} if "maxnreg" in LAUNCH else {})


def _strides(tensor: Tensor | None) -> tuple[int, int]:
    return (0, 0) if tensor is None else (tensor.stride(0), tensor.stride(1))


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def programs(device: torch.device, each: int) -> int:
    """Programs of a persistent grid: ``each`` on every multiprocessor, and a few in the interpreter. One row a
    multiprocessor at a time is what the second-level cache still holds when the gradient reads it again."""
    return each * _multiprocessors(device) if device.type == "cuda" else 3


def check_device(tensor: Tensor) -> None:
    if tensor.device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            f"backend 'triton' needs tensors on a GPU, got {tuple(tensor.shape)} on the CPU; to run the kernels in "
            "Triton's interpreter set TRITON_INTERPRET=1 in the environment before triton is imported"
        )


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()
