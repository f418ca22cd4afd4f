"""Group-relative advantages: A = (R - baseline) / scale inside each group (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from . import library
from .reference.advantages import BASELINES, SCALES
from .tensors import INTS, NUMBERS, plain_tensor

__all__ = ["group_advantages"]

# Kernels look for the members of a group among all sequences, S^2 comparisons, unless equal ids stand side by side.
SORTED_BEYOND = 16384


@torch.no_grad()
def group_advantages(
    rewards_S: Tensor, groups: int | Tensor, *, baseline: str = "mean", scale: str = "group", eps: float = 1e-6
) -> Tensor:
    """Advantages of S sequences against the others of their group, (S,).

    rewards_S: (S,) numbers; the result has their dtype if it is floating, else float32. Computed in float64.
    groups: how many consecutive sequences form a group (must divide S), or (S,) integer ids: any values in any order,
        groups of any sizes.
    baseline: "mean" of the group, or "leave_one_out": the mean of the others (RLOO, arXiv 2402.14740).
    scale: divide by eps plus the standard deviation (n - 1, as in verl and TRL) of the "group" or of all rewards of the
        "batch"; "none" does not divide (Dr. GRPO, arXiv 2503.20783).

    A reward that is nan or infinite is a sequence without a score: it is left out of every statistic and its advantage
    is 0. So is that of a group of one, and of a group whose rewards are all equal: exactly 0, not what rounding leaves.
    Nothing is read by the host, and sums run in a fixed order, so that the same rewards give the same bits.
    """
    groups = _check(rewards_S, groups, baseline, scale, eps)
    dtype = rewards_S.dtype if rewards_S.dtype.is_floating_point else torch.float32
    if rewards_S.numel() == 0:
        return rewards_S.to(dtype)
    x_S = rewards_S if rewards_S.dtype in (torch.float32, torch.float64) else rewards_S.double()
    size, ids_S = (groups, None) if isinstance(groups, int) else (0, groups.long())
    order_S: Tensor | None = None
    if ids_S is not None and len(ids_S) > SORTED_BEYOND:
        ids_S, order_S = ids_S.sort(stable=True)
        x_S = x_S[order_S]
    advantage_S = library.call(
        "group_advantages", x_S.contiguous(), None if ids_S is None else ids_S.contiguous(), size, order_S is not None,
        BASELINES.index(baseline), SCALES.index(scale), float(eps),
    )  # fmt: skip
    if order_S is not None:
        advantage_S = torch.empty_like(advantage_S).scatter_(0, order_S, advantage_S)
    result: Tensor = advantage_S.to(dtype)
    return result


def _check(rewards_S: Tensor, groups: int | Tensor, baseline: str, scale: str, eps: float) -> int | Tensor:
    plain_tensor("rewards_S", rewards_S, (torch.bool, *NUMBERS))
    if rewards_S.dim() != 1:
        raise ValueError(f"rewards_S must have shape (S,), got {tuple(rewards_S.shape)}")
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps must be a number, got {type(eps).__name__}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}")
    if isinstance(groups, numbers.Integral) and not isinstance(groups, bool):
        if groups < 1 or len(rewards_S) % groups:
            raise ValueError(f"groups must be at least 1 and divide the {len(rewards_S)} rewards, got {groups}")
        return int(groups)
    if isinstance(groups, (list, tuple)):
        if not all(isinstance(group, numbers.Integral) and not isinstance(group, bool) for group in groups):
            raise TypeError(f"groups must be an int or integer ids, got {groups!r}")
        groups = torch.tensor(groups, dtype=torch.int64, device=rewards_S.device)
    if not isinstance(groups, Tensor) or groups.dtype not in (torch.uint8, torch.int8, torch.int16, *INTS):
        raise TypeError(f"groups must be an int or integer ids, got {getattr(groups, 'dtype', type(groups).__name__)}")
    plain_tensor("groups", groups)
    if groups.shape != rewards_S.shape:
        raise ValueError(f"groups must have shape {tuple(rewards_S.shape)} as the rewards, got {tuple(groups.shape)}")
    if groups.device != rewards_S.device:
        raise ValueError(f"groups must lie on {rewards_S.device} as the rewards, got {groups.device}")
    return groups
