"""What the operators in Python check before they touch memory: the eager reference and the launchers of Triton.

A raw operator (``torch.ops.gac_kernels``) is called with anything. A Triton kernel handed a tensor that is too short
reads beyond it, so sizes, dtypes, devices, codes and memory are compared with the schema (``schemas.py``) first.
The compiled modules do the same in ``csrc/tensors.h``. Nothing here reads a value.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WIDE = (torch.float32, torch.float64)
BYTES = (torch.bool, torch.uint8)
DFPO = 7  # schemas.POLICY_CODES


class Arguments:
    """The arguments of one operator; errors name both. All tensors lie on the device of ``like``."""

    def __init__(self, op: str, like: Tensor) -> None:
        self.op, self.device, self.index = op, like.device, like.get_device()

    def flat(self, name: str, value: Tensor | None, size: int, *dtypes: torch.dtype) -> None:
        """A contiguous tensor of ``size`` elements, or None. Sparse tensors are not contiguous by torch's own error."""
        if value is None or (
            value.numel() == size and value.dtype in dtypes and value.get_device() == self.index
            and value.is_contiguous() and (value.data_ptr() or not size)
        ):  # fmt: skip
            return
        raise self.misfit(name, value, size, dtypes)

    def misfit(self, name: str, value: Tensor, size: int, dtypes: tuple[torch.dtype, ...]) -> Exception:
        where, expected = f"{self.op}: {name}", " or ".join(str(d).removeprefix("torch.") for d in dtypes)
        if value.dtype not in dtypes:
            return TypeError(f"{where} must have dtype {expected}, got {str(value.dtype).removeprefix('torch.')}")
        if value.device != self.device:
            return ValueError(f"{where} must be on {self.device} like the operator's first tensor, got {value.device}")
        if value.numel() != size:
            return ValueError(f"{where} must have {size} elements, got {value.numel()}")
        if not value.is_contiguous():
            return ValueError(f"{where} must be contiguous, got strides {tuple(value.stride())}")
        return ValueError(f"{where} must hold memory, got a tensor whose storage was freed")

    def grid(self, name: str, value: Tensor) -> None:
        """``(A, B, V)`` with stride 1 in V."""
        if value.dtype not in FLOATS:
            raise TypeError(
                f"{self.op}: {name} must have dtype float16, bfloat16, float32 or float64, got {value.dtype}"
            )
        if value.ndim != 3 or not _plain(value):
            raise ValueError(f"{self.op}: {name} must be strided, of shape (A, B, V), got shape {tuple(value.shape)}")
        if value.shape[2] > 1 and value.stride(2) != 1:
            raise ValueError(f"{self.op}: {name} must have stride 1 in V, got strides {tuple(value.stride())}")
        if value.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device}, got {value.device}")
        if value.numel() and value.data_ptr() == 0:
            raise ValueError(f"{self.op}: {name} must hold memory, got a tensor whose storage was freed")

    def targets(
        self, rows: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None
    ) -> tuple[int, torch.dtype]:
        """What every row operator is given of each row: ``N``, and what sums are made in."""
        N, acc = rows.shape[0] * rows.shape[1], torch.promote_types(rows.dtype, torch.float32)
        self.flat("targets", targets, N, torch.int64, torch.int32)
        self.flat("kind", kind, N, *BYTES)
        self.flat("temperature", temperature, N, acc)
        return N, acc

    def matrix(self, name: str, value: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
        """A tensor of any strides, or None; a size of -1 is free."""
        if value is None:
            return
        if value.ndim != len(shape) or any(
            size not in (-1, held) for size, held in zip(shape, value.shape, strict=True)
        ):
            raise ValueError(f"{self.op}: {name} must have shape {shape}, got {tuple(value.shape)}")
        if value.dtype is not dtype or not _plain(value):
            raise TypeError(f"{self.op}: {name} must be a strided tensor of {dtype}, got {value.dtype}, {value.layout}")
        if value.device != self.device:
            raise ValueError(f"{self.op}: {name} must be on {self.device}, got {value.device}")
        if value.numel() and value.data_ptr() == 0:
            raise ValueError(f"{self.op}: {name} must hold memory, got a tensor whose storage was freed")

    def code(self, name: str, value: int, low: int, high: int) -> None:
        if not low <= value <= high:
            raise ValueError(f"{self.op}: {name} must be in [{low}, {high}], got {value}")

    def sequences(self, tokens: int, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor) -> int:
        """``S``; sequences lie inside the tokens."""
        S = is_expert.numel()
        self.flat("is_expert", is_expert, S, *BYTES)
        if is_expert.ndim != 1:
            raise ValueError(f"{self.op}: is_expert must have shape (S,), got {tuple(is_expert.shape)}")
        self.flat("cu_seqlens", cu_seqlens, S + 1, torch.int64)
        if cu_seqlens is None and (seq_len < 0 or S * seq_len != tokens or (seq_len == 0 and tokens)):
            raise ValueError(
                f"{self.op}: without cu_seqlens there must be S * seq_len tokens, got {tokens} for S = {S} and "
                f"seq_len = {seq_len}"
            )
        return S

    def branches(
        self, policy: Tensor | None, supervised: Tensor | None, dtype: torch.dtype, aggregation: int,
        supervised_aggregation: int,
    ) -> None:  # fmt: skip
        self.flat("policy_denominator", policy, 1, dtype)
        self.flat("supervised_denominator", supervised, 1, dtype)
        self.code("aggregation", aggregation, 0, 3)
        self.code("supervised_aggregation", supervised_aggregation, 0, 3)

    def term(self, policy: int, p0: float, p1: float, kl_estimator: int, last: int) -> None:
        self.code("policy", policy, 0, last)
        self.code("kl_estimator", kl_estimator, 1, 3)
        if policy == DFPO and not (p0 in (0.0, 1.0) and p1 in (0.0, 1.0)):
            raise ValueError(f"{self.op}: p0 and p1 must be 0 or 1 for DFPO, got {p0} and {p1}")


def _plain(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_nested


def _token_loss(
    op: str, logprobs: Tensor, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor,
    advantages: Tensor | None, token_advantages: bool, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, entropy: Tensor | None, sum_sq: Tensor | None, supervised: Tensor | None,
    groups: Tensor | None, mu: Tensor, policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    policy: int, p0: float, p1: float, kl_estimator: int, aggregation: int, supervised_aggregation: int, **rest: Any,
) -> None:  # fmt: skip
    of, N = Arguments(op, logprobs), logprobs.numel()
    of.flat("logprobs", logprobs, N, *WIDE)
    dtype = logprobs.dtype
    of.flat("mask", mask, N, *BYTES)
    S = of.sequences(N, cu_seqlens, seq_len, is_expert)
    of.flat("advantages", advantages, N if token_advantages else S, dtype)
    of.flat("old_logprobs", old_logprobs, N, dtype)
    of.flat("ref_logprobs", ref_logprobs, N, dtype)
    of.flat("rollout_weights", rollout_weights, N, dtype)
    of.flat("entropy", entropy, N, dtype)
    of.flat("sum_sq", sum_sq, N, dtype)
    of.flat("supervised", supervised, N, dtype)
    of.flat("mu", mu, 2 if mu.numel() == 2 else 1, dtype)  # mu, or mu and 1 - mu
    of.branches(policy_denominator, supervised_denominator, dtype, aggregation, supervised_aggregation)
    of.term(policy, p0, p1, kl_estimator, DFPO)
    if policy == DFPO:
        if groups is None:
            raise ValueError(f"{op}: groups must be given for DFPO")
        of.flat("groups", groups, S, torch.int64)


def _token_weights(
    op: str, mask: Tensor, cu_seqlens: Tensor | None, seq_len: int, is_expert: Tensor, advantages: Tensor | None,
    token_advantages: bool, mu: Tensor, policy_denominator: Tensor | None, supervised_denominator: Tensor | None,
    aggregation: int, supervised_aggregation: int, **rest: Any,
) -> None:  # fmt: skip
    of, N = Arguments(op, mask), mask.numel()
    of.flat("mask", mask, N, *BYTES)
    S = of.sequences(N, cu_seqlens, seq_len, is_expert)
    of.flat("mu", mu, 2 if mu.numel() == 2 else 1, *WIDE)  # mu, or mu and 1 - mu
    of.flat("advantages", advantages, N if token_advantages else S, mu.dtype)
    of.branches(policy_denominator, supervised_denominator, mu.dtype, aggregation, supervised_aggregation)


def _rows(
    op: str, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None
) -> tuple[Arguments, int, torch.dtype]:
    of = Arguments(op, logits)
    of.grid("logits", logits)
    if logits.shape[2] == 0:
        raise ValueError(f"{op}: logits must have at least one column, got shape {tuple(logits.shape)}")
    N, acc = of.targets(logits, targets, kind, temperature)
    if base_logits is not None:
        of.grid("base_logits", base_logits)
        if base_logits.shape != logits.shape:
            raise ValueError(f"{op}: base_logits must have the logits' shape, got {tuple(base_logits.shape)}")
        if (base_logits.dtype is torch.float64) != (logits.dtype is torch.float64):
            raise TypeError(f"{op}: base_logits must be float64 if and only if logits are, got {base_logits.dtype}")
    return of, N, acc


def _row_statistics(
    op: str, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    **static: float,
) -> None:  # fmt: skip
    _rows(op, logits, targets, kind, temperature, base_logits)


def _row_gradient(
    op: str, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None, **static: float,
) -> None:  # fmt: skip
    of, N, acc = _rows(op, logits, targets, kind, temperature, base_logits)
    of.flat("normalizer", normalizer, N * (2 if base_logits is None else 4), acc)
    of.flat("entropy", entropy, N, acc)
    of.flat("slope", slope, N, acc)
    of.flat("entropy_slope", entropy_slope, N, acc)


def _fused_rows(
    op: str, logits: Tensor, targets: Tensor, kind: Tensor, temperature: Tensor | None, base_logits: Tensor | None,
    weight: Tensor, advantages: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, policy: int, p0: float, p1: float, kl_estimator: int, **rest: Any,
) -> None:  # fmt: skip
    of, N, acc = _rows(op, logits, targets, kind, temperature, base_logits)
    of.flat("weight", weight, N, acc)
    of.flat("advantages", advantages, N, acc)
    of.flat("old_logprobs", old_logprobs, N, acc)
    of.flat("ref_logprobs", ref_logprobs, N, acc)
    of.flat("rollout_weights", rollout_weights, N, acc)
    of.term(policy, p0, p1, kl_estimator, 5)  # an objective of single tokens


def _head(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor,
    temperature: Tensor | None, base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None,
    base_bias: Tensor | None,
) -> tuple[Arguments, int, torch.dtype]:  # fmt: skip
    of = Arguments(op, hidden)
    of.grid("hidden", hidden)
    N, acc = of.targets(hidden, targets, kind, temperature)
    A, B, H = hidden.shape
    of.matrix("weight", weight, hidden.dtype, -1, H)
    V = weight.shape[0]
    of.matrix("bias", bias, hidden.dtype, V)
    if H == 0 or V == 0:
        raise ValueError(f"{op}: weight must have rows and columns, got shape {tuple(weight.shape)}")
    if (base_hidden is None) != (base_weight is None) or (base_bias is not None and base_weight is None):
        raise ValueError(f"{op}: base_hidden and base_weight go together, and base_bias with them")
    if base_logits is not None:
        of.grid("base_logits", base_logits)
        of.matrix("base_logits", base_logits, base_logits.dtype, A, B, V)
    if base_hidden is not None and base_weight is not None:
        of.grid("base_hidden", base_hidden)
        of.matrix("base_hidden", base_hidden, base_hidden.dtype, A, B, -1)
        of.matrix("base_weight", base_weight, base_hidden.dtype, V, base_hidden.shape[2])
        of.matrix("base_bias", base_bias, base_hidden.dtype, V)
    return of, N, acc


def _linear_statistics(
    op: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, kind: Tensor,
    temperature: Tensor | None, base_logits: Tensor | None, base_hidden: Tensor | None, base_weight: Tensor | None,
    base_bias: Tensor | None, chunk: int, **rest: Any,
) -> tuple[Arguments, int, torch.dtype]:  # fmt: skip
    base = base_logits, base_hidden, base_weight, base_bias
    of, N, acc = _head(op, hidden, weight, bias, targets, kind, temperature, *base)
    of.code("chunk", chunk, 1, 2**63 - 1)
    return of, N, acc


def _linear_loss(
    op: str, weight_N: Tensor, advantages: Tensor | None, old_logprobs: Tensor | None, ref_logprobs: Tensor | None,
    rollout_weights: Tensor | None, policy: int, p0: float, p1: float, kl_estimator: int, **head: Any,
) -> None:  # fmt: skip
    of, N, acc = _linear_statistics(op, **head)
    of.flat("weight_N", weight_N, N, acc)
    of.flat("advantages", advantages, N, acc)
    of.flat("old_logprobs", old_logprobs, N, acc)
    of.flat("ref_logprobs", ref_logprobs, N, acc)
    of.flat("rollout_weights", rollout_weights, N, acc)
    of.term(policy, p0, p1, kl_estimator, 5)


def _linear_gradient(
    op: str, normalizer: Tensor, entropy: Tensor, slope: Tensor, entropy_slope: Tensor | None, **head: Any
) -> None:
    of, N, acc = _linear_statistics(op, **head)
    base = head["base_logits"] is not None or head["base_hidden"] is not None
    of.flat("normalizer", normalizer, N * (4 if base else 2), acc)
    of.flat("entropy", entropy, N, acc)
    of.flat("slope", slope, N, acc)
    of.flat("entropy_slope", entropy_slope, N, acc)


def _scale(op: str, gradient: Tensor, factor: Tensor) -> None:
    of = Arguments(op, gradient)
    of.flat("factor", factor, 1, *WIDE)
    if not (gradient.dtype in FLOATS and _plain(gradient) and gradient.is_contiguous()):
        of.grid("gradient", gradient)
    elif gradient.numel() and gradient.data_ptr() == 0:
        raise ValueError(f"{op}: gradient must hold memory, got a tensor whose storage was freed")


def _memory(op: str, **given: Any) -> None:
    """For operators served in Python by torch operations alone: these check all but that memory is there."""
    for name, value in given.items():
        for one in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(one, Tensor) and one.numel() and _plain(one) and one.data_ptr() == 0:
                raise ValueError(f"{op}: {name} must hold memory, got a tensor whose storage was freed")


CHECKS: dict[str, Callable[..., object]] = {
    "token_loss": _token_loss,
    "token_weights": _token_weights,
    "row_statistics": _row_statistics,
    "row_gradient": _row_gradient,
    "row_gradient_": _row_gradient,
    "fused_rows": _fused_rows,
    "fused_rows_": _fused_rows,
    "scale_": _scale,
    "linear_loss": _linear_loss,
    "linear_statistics": _linear_statistics,
    "linear_gradient": _linear_gradient,
}


def checked(name: str, schema: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, which serves the operator ``name``, behind its checks."""
    check = CHECKS.get(name, _memory)
    names = tuple(re.findall(r"(\w+)\s*[,)]", schema.partition("->")[0]))

    @wraps(function)
    def serve(*args: Any) -> Any:
        check(name, **dict(zip(names, args, strict=True)))
        return function(*args)

    return serve
