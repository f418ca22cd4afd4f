"""Sums over lists of gradients in plain torch, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_moments(supervised: Sequence[Tensor], policy: Sequence[Tensor]) -> Tensor:
    """The operator of this name, see gac_kernels/gradients.py."""
    _check(supervised, policy, "gradient_moments: supervised", "policy")
    for place, (a, b) in enumerate(zip(supervised, policy, strict=True)):
        if a.dtype != b.dtype:
            raise RuntimeError(f"gradient_moments: supervised[{place}] and policy[{place}] must be of one dtype")
    total = torch.zeros(3, dtype=torch.float64, device=supervised[0].device if supervised else None)
    for a, b in zip(supervised, policy, strict=True):
        x, y = a.reshape(-1).double(), b.reshape(-1).double()
        total = total + torch.stack((x.dot(x), y.dot(y), x.dot(y)))
    return total


def accumulate_moments_(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """The operator of this name, see gac_kernels/gradients.py."""
    _check(gradients, sums, "accumulate_moments_: gradients", "sums")
    total = torch.zeros((), dtype=torch.float64, device=sums[0].device if sums else None)
    for place, (running, gradient) in enumerate(zip(sums, gradients, strict=True)):
        wide = torch.promote_types(gradient.dtype, torch.float32)
        if running.dtype not in (torch.float64, wide):
            raise RuntimeError(
                f"accumulate_moments_: sums[{place}] must have dtype float64, or float32 for a gradient of no more "
                f"than float32, got {running.dtype} for {gradient.dtype}"
            )
        running += gradient.to(running.dtype)
        x = gradient.reshape(-1).double()
        total = total + x.dot(x)
    return total


def _check(first: Sequence[Tensor], second: Sequence[Tensor], one: str, other: str) -> None:
    if len(first) != len(second):
        raise RuntimeError(f"{one} and {other} must be of one length, got {len(first)} and {len(second)}")
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        if a.numel() != b.numel():
            raise RuntimeError(
                f"{one}[{place}] and {other}[{place}] must be of one size, got {a.numel()} and {b.numel()} elements"
            )
        for tensor, name in ((a, one), (b, other)):
            if not tensor.is_contiguous():
                raise RuntimeError(f"{name}[{place}] must be contiguous")
            if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
                raise RuntimeError(f"{name}[{place}] must have dtype float16, bfloat16, float32 or float64")
