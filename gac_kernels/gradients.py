"""Sums over whole gradients, one tensor a parameter: what tells how far apart two of them are, and how noisy one is.

One pass over the memory for all three sums or for a running sum and its norm, in float64 and in an order that depends
on nothing but the tensors' sizes: two runs give the same bits, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .library import call
from .overlap import first_shared

__all__ = ["accumulate_moments_", "gradient_moments"]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def gradient_moments(supervised: Sequence[Tensor], policy: Sequence[Tensor]) -> Tensor:
    """``||g_s||^2``, ``||g_r||^2`` and ``<g_s, g_r>`` over all tensors of two lists, float64 (3,) on their device.

    Args:
        supervised, policy: of one length; the tensors of a place have one shape, one dtype (float16, bfloat16, float32
            or float64) and all lie on one device. One that is not contiguous is copied. Without any: zeros on the CPU.

    Raises:
        ValueError, TypeError: naming the tensor that does not fit.
    """
    _check("supervised", supervised, "policy", policy)
    for place, (a, b) in enumerate(zip(supervised, policy, strict=True)):
        if a.dtype != b.dtype:
            raise TypeError(f"policy[{place}] must have the dtype of supervised[{place}], {a.dtype}, got {b.dtype}")
    if not supervised:
        return torch.zeros(3, dtype=torch.float64)
    moments: Tensor = call("gradient_moments", _dense(supervised), _dense(policy))
    return moments


def accumulate_moments_(sums: Sequence[Tensor], gradients: Sequence[Tensor]) -> Tensor:
    """``sums[i] += gradients[i]`` for all i, and ``||g||^2`` over all gradients, float64 0-d on their device.

    Args:
        sums: written in place, contiguous; float64, or float32 where the gradient is no wider.
        gradients: as many, of the same shapes and on the same device: float16, bfloat16, float32 or float64. One that
            is not contiguous is copied. Without any: zero on the CPU.

    Raises:
        ValueError, TypeError: naming the tensor that does not fit; nothing has then been added.
    """
    _check("sums", sums, "gradients", gradients)
    for place, (running, gradient) in enumerate(zip(sums, gradients, strict=True)):
        if running.dtype not in (torch.float64, torch.promote_types(gradient.dtype, torch.float32)):
            raise TypeError(
                f"sums[{place}] must be float64, or float32 for gradients of no more than float32, got {running.dtype} "
                f"for {gradient.dtype}"
            )
        if not running.is_contiguous():
            raise ValueError(f"sums[{place}] must be contiguous, got strides {running.stride()}")
    if not sums:
        return torch.zeros((), dtype=torch.float64)
    dense = _dense(gradients)
    if shared := first_shared(list(sums), dense):
        place, other, at = shared
        raise ValueError(
            f"sums must be memory of their own, got sums[{place}] overlapping "
            f"{'sums' if other == 'written' else 'gradients'}[{at}]"
        )
    norm2: Tensor = call("accumulate_moments_", list(sums), dense)
    return norm2


def _check(one: str, first: Sequence[Tensor], other: str, second: Sequence[Tensor]) -> None:
    if len(first) != len(second):
        raise ValueError(f"{other} must have as many tensors as {one}, {len(first)}, got {len(second)}")
    for place, (a, b) in enumerate(zip(first, second, strict=True)):
        for name, tensor in ((one, a), (other, b)):
            if tensor.dtype not in _DTYPES:
                raise TypeError(f"{name}[{place}] must be float16, bfloat16, float32 or float64, got {tensor.dtype}")
            if tensor.device != first[0].device:
                raise ValueError(f"{name}[{place}] must lie on {first[0].device}, got {tensor.device}")
        if a.shape != b.shape:
            raise ValueError(f"{other}[{place}] must have shape {tuple(a.shape)}, got {tuple(b.shape)}")


def _dense(gradients: Sequence[Tensor]) -> list[Tensor]:
    return [gradient.detach().contiguous() for gradient in gradients]
