"""What the public losses check and hand on: the batch as the operators take it, and errors that name the argument."""

from __future__ import annotations

import math
import numbers
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..objectives import DFPO, GSPO, SAPO, Gate, HybridObjective
from ..tensors import FLOATS, NUMBERS, plain_tensor
from ..types import Denominators, TokenBatch


def check_tokens(name: str, value: Tensor | None, batch: TokenBatch) -> None:
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating point tensor, got {kind}")
    plain_tensor(name, value, FLOATS)
    if value.shape != batch.targets.shape:
        raise ValueError(f"{name} must have the targets' shape {tuple(batch.targets.shape)}, got {tuple(value.shape)}")
    if value.device != batch.targets.device:
        raise ValueError(f"{name} must be on {batch.targets.device} like the batch, got {value.device}")


def scalar(name: str, value: float | Tensor, like: Tensor, high: float = math.inf) -> Tensor:
    """A 0-d detached tensor on the device. A tensor's value is not read; a number is checked."""
    if isinstance(value, Tensor):
        plain_tensor(name, value)
        if value.ndim == 0 and value.dtype is like.dtype and value.device == like.device and not value.requires_grad:
            return value  # as it is, which is the rule
        if value.is_complex():
            raise TypeError(f"{name} must be real, got {value.dtype}")
        plain_tensor(name, value, NUMBERS)
        if value.numel() != 1:
            raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
        if value.device != like.device:
            raise ValueError(f"{name} must be on {like.device} like logprobs, got {value.device}")
        return value.detach().reshape(()).to(like.dtype)
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):  # the last: numpy's
        raise TypeError(f"{name} must be a number or a 0-d tensor, got {type(value).__name__}")
    if not 0.0 <= value <= min(high, sys.float_info.max):
        raise ValueError(f"{name} must be finite and in [0, {high:g}], got {value!r}")
    return torch.full((), float(value), dtype=like.dtype, device=like.device)


def mixing(mu: float | Tensor, like: Tensor) -> Tensor:
    """mu as the operators take it, on the device and in the dtype of ``like``: 0-d, or mu and 1 - mu ``(2,)``, each
    rounded by itself, where mu is known in more digits than that dtype holds: 1 - mu of a rounded mu near 1 is wrong by
    as much as 6e-8 / (1 - mu) of itself."""
    wide = like.dtype if isinstance(mu, Tensor) and mu.dtype is not torch.float64 else torch.float64
    if wide is like.dtype:
        return scalar("mu", mu, like, 1.0)
    if isinstance(mu, Tensor):
        exact = scalar("mu", mu, like.new_empty((), dtype=wide), 1.0)
        return torch.stack((exact, 1.0 - exact)).to(like.dtype)
    both = scalar("mu", mu, like, 1.0).repeat(2)
    both[1] = 1.0 - float(mu)
    return both


def norm_length_of(objective: HybridObjective, batch: TokenBatch) -> float | None:
    """The constant length in force; None where no branch divides by one."""
    if "seq-mean-token-sum-norm" not in (objective.aggregation, objective.supervised_aggregation):
        return None
    length = objective.norm_length or batch.max_length
    if length is None:
        raise ValueError("objective.norm_length must be given for seq-mean-token-sum-norm on a packed batch")
    return float(length)


def check_batch(batch: TokenBatch) -> None:
    if not isinstance(batch, TokenBatch):
        raise TypeError(f"batch must be a TokenBatch, got {type(batch).__name__}")


def check_objective(objective: HybridObjective, batch: TokenBatch) -> None:
    if not isinstance(objective, HybridObjective):
        raise TypeError(f"objective must be a HybridObjective, got {type(objective).__name__}")
    check_batch(batch)
    if isinstance(objective.policy, DFPO) and batch.groups is None:
        raise ValueError("batch.groups must be given: DFPO transforms the sequence weights inside each group")
    if batch.ref_logprobs is None:
        if objective.kl_coef:
            raise ValueError(f"batch.ref_logprobs must be given: objective.kl_coef is {objective.kl_coef:g}")
        if any(t is not None and t.reads_reference for t in (objective.policy_term, objective.supervised_term)):
            raise ValueError("batch.ref_logprobs must be given: the objective reads t.ref_logp")


def plain(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as the operator takes it: contiguous and in ``dtype``. What is so already is handed on untouched, for a
    call of the dispatcher costs as much as some ten thousand tokens."""
    if value.dtype is not dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def plain_or_none(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if value is None else plain(value, dtype)


def batch_args(batch: TokenBatch, dtype: torch.dtype) -> tuple[Any, ...]:
    """The batch as the operators take it: ``mask, cu_seqlens, seq_len, is_expert, advantages, token_advantages`` and
    ``old_logprobs, ref_logprobs, rollout_weights``."""
    per_token = batch.advantages is not None and batch.advantages.shape != batch.is_expert.shape
    return (
        plain(batch.mask, torch.bool), plain_or_none(batch.cu_seqlens, torch.int64), batch.max_length or 0,
        plain(batch.is_expert, torch.bool),
        plain_or_none(batch.advantages, dtype), per_token, plain_or_none(batch.old_logprobs, dtype),
        plain_or_none(batch.ref_logprobs, dtype), plain_or_none(batch.rollout_weights, dtype),
    )  # fmt: skip


def counts_of(denominators: Denominators | None, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    def count(name: str, value: float | Tensor | None) -> Tensor | None:
        return None if value is None else scalar(f"denominators.{name}", value, like)

    if denominators is None:
        return None, None
    if not isinstance(denominators, Denominators):
        raise TypeError(f"denominators must be Denominators, got {type(denominators).__name__}")
    return count("policy", denominators.policy), count("supervised", denominators.supervised)


class Functions(NamedTuple):
    """What an objective has of Python functions, which are evaluated eagerly on every device."""

    coupled: bool  # a token waits for its sequence
    reads_entropy: bool


def functions_of(objective: HybridObjective, forced: str | None) -> Functions | None:
    """None where the kernels know both terms by name. No forced backend but the reference may claim a function."""
    gate = isinstance(objective.policy, SAPO) and isinstance(objective.policy.gate, Gate)
    terms = [term for term in (objective.policy_term, objective.supervised_term) if term is not None]
    if not gate and not terms:
        return None
    if forced not in (None, "reference"):
        what = "the custom gate of objective.policy" if gate else "objectives that are functions of a token"
        raise ValueError(f"backend {forced!r} does not support {what}, which PyTorch evaluates on every device")
    known = objective.policy_term is None and isinstance(objective.policy, (GSPO, DFPO))
    return Functions(known or any(one.coupled for one in terms), any(one.reads_entropy for one in terms))
