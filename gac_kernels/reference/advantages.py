"""Group-relative advantages in eager PyTorch: A = (R - baseline) / scale inside each group (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

import torch
from torch import Tensor

BASELINES = ("mean", "leave_one_out")
SCALES = ("group", "batch", "none")


def group_advantages(
    rewards: Tensor, groups: Tensor | None, group_size: int, adjacent: bool, baseline: int, scale: int, eps: float
) -> Tensor:
    """Advantages of S sequences, (S,), as the schema of this name in ``schemas.py`` says; computed in float64."""
    scored_S = rewards.isfinite()
    x_S = torch.where(scored_S, rewards, 0).double()
    order_S, group_S, sizes_S = _layout(rewards, groups, group_size)

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
    advantage_S = deviation_S * (count_S / others_S) if BASELINES[baseline] == "leave_one_out" else deviation_S
    if SCALES[scale] == "group":
        advantage_S = advantage_S / ((reduce(deviation_S.square(), "sum") / others_S).sqrt() + eps)
    elif SCALES[scale] == "batch":
        total = scored_S.sum()
        deviation_S = torch.where(scored_S, x_S - x_S.sum() / total, 0.0)
        advantage_S = advantage_S / ((deviation_S.square().sum() / (total - 1).clamp(min=1)).sqrt() + eps)
    return torch.where(scored_S & (highest_S > lowest_S), advantage_S, 0.0).to(rewards.dtype)


def _layout(rewards_S: Tensor, groups_S: Tensor | None, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Order that brings each group together, each sequence's group 0, 1, ..., and the groups' sizes padded to S."""
    place_S = torch.arange(len(rewards_S), device=rewards_S.device)
    if groups_S is None:
        order_S, group_S = place_S, place_S // group_size
    else:
        ids_S, order_S = groups_S.sort(stable=True)
        starts_S = torch.zeros_like(order_S)
        starts_S[1:] = ids_S[1:] != ids_S[:-1]
        group_S = torch.empty_like(order_S).scatter_(0, order_S, starts_S.cumsum(0))
    sizes_S = torch.zeros_like(group_S).scatter_add_(0, group_S, torch.ones_like(group_S))
    return order_S, group_S, sizes_S
