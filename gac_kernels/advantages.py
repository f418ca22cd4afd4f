"""Group-relative advantages: A = (R - baseline) / scale inside each group (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

__all__ = ["group_advantages"]

BASELINES = ("mean", "leave_one_out")
SCALES = ("group", "batch", "none")


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
    scored_S = rewards_S.isfinite()
    x_S = torch.where(scored_S, rewards_S, 0).double()
    order_S, group_S, sizes_S = _layout(rewards_S, groups)

    def reduce(values_S: Tensor, how: str) -> Tensor:
        """Reduce over each group, and give every sequence the result of its own."""
        # Not a scatter: a scatter adds floats in whatever order the GPU's atomics happen to come.
        per_group = torch.segment_reduce(values_S[order_S], how, lengths=sizes_S, axis=0, unsafe=True)
        return per_group[group_S]

    count_S = reduce(scored_S.double(), "sum")
    deviation_S = torch.where(scored_S, x_S - reduce(x_S, "sum") / count_S, 0.0)
    others_S = (count_S - 1.0).clamp(min=1.0)
    highest_S = reduce(torch.where(scored_S, x_S, -torch.inf), "max")
    lowest_S = reduce(torch.where(scored_S, x_S, torch.inf), "min")
    # R_i - (sum - R_i) / (n - 1) = (R_i - mean) n / (n - 1)
    advantage_S = deviation_S * (count_S / others_S) if baseline == "leave_one_out" else deviation_S
    if scale == "group":
        advantage_S = advantage_S / ((reduce(deviation_S.square(), "sum") / others_S).sqrt() + eps)
    elif scale == "batch":
        total = scored_S.sum()
        deviation_S = torch.where(scored_S, x_S - x_S.sum() / total, 0.0)
        advantage_S = advantage_S / ((deviation_S.square().sum() / (total - 1).clamp(min=1)).sqrt() + eps)
    return torch.where(scored_S & (highest_S > lowest_S), advantage_S, 0.0).to(dtype)


def _layout(rewards_S: Tensor, groups: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Order that brings each group together, each sequence's group 0, 1, ..., and the groups' sizes padded to S."""
    place_S = torch.arange(len(rewards_S), device=rewards_S.device)
    if isinstance(groups, int):
        order_S, group_S = place_S, place_S // groups
    else:
        ids_S, order_S = groups.sort(stable=True)
        starts_S = torch.zeros_like(order_S)
        starts_S[1:] = ids_S[1:] != ids_S[:-1]
        group_S = torch.empty_like(order_S).scatter_(0, order_S, starts_S.cumsum(0))
    sizes_S = torch.zeros_like(group_S).scatter_add_(0, group_S, torch.ones_like(group_S))
    return order_S, group_S, sizes_S


def _check(rewards_S: Tensor, groups: int | Tensor, baseline: str, scale: str, eps: float) -> int | Tensor:
    if not isinstance(rewards_S, Tensor) or rewards_S.is_complex():
        raise TypeError(f"rewards_S must be a real tensor, got {getattr(rewards_S, 'dtype', type(rewards_S).__name__)}")
    if rewards_S.dim() != 1:
        raise ValueError(f"rewards_S must have shape (S,), got {tuple(rewards_S.shape)}")
    if baseline not in BASELINES:
        raise ValueError(f"baseline must be one of {BASELINES}, got {baseline!r}")
    if scale not in SCALES:
        raise ValueError(f"scale must be one of {SCALES}, got {scale!r}")
    if not 0.0 <= eps < float("inf"):
        raise ValueError(f"eps must be finite and at least 0, got {eps!r}")
    if isinstance(groups, numbers.Integral) and not isinstance(groups, bool):
        if groups < 1 or len(rewards_S) % groups:
            raise ValueError(f"groups must be at least 1 and divide the {len(rewards_S)} rewards, got {groups}")
        return int(groups)
    if isinstance(groups, (list, tuple)):
        groups = torch.tensor(groups, device=rewards_S.device)
    if (
        not isinstance(groups, Tensor)
        or groups.dtype.is_floating_point
        or groups.is_complex()
        or groups.dtype == torch.bool
    ):
        raise TypeError(f"groups must be an int or integer ids, got {getattr(groups, 'dtype', type(groups).__name__)}")
    if groups.shape != rewards_S.shape:
        raise ValueError(f"groups must have shape {tuple(rewards_S.shape)} as the rewards, got {tuple(groups.shape)}")
    if groups.device != rewards_S.device:
        raise ValueError(f"groups must lie on {rewards_S.device} as the rewards, got {groups.device}")
    return groups
