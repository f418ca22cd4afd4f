"""The losses behind Liger's names: which of them is one of our objectives, and the arithmetic of those that are not.

Sources: GRPO arXiv 2402.03300, DAPO 2503.14476, Dr. GRPO 2503.20783, CISPO 2506.13585, SAPO 2511.20347,
GSPO 2507.18071, two-sided clipping 2505.07291; luspo, vespo and what is divided by: liger-kernel 0.8.5 and TRL 1.16.

Shapes: B sequences of T completion tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..distributed import world_size
from ..objectives import CISPO, GRPO, SAPO, HybridObjective
from ..reference.terms import LOG_RATIO_BOUND, gate, log_ratio

_CLIPPING = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_OTHERS = ("cispo", "sapo", "vespo")
_AGGREGATIONS = {  # of the loss types that are an objective of ours
    "grpo": "seq-mean-token-mean",
    "sapo": "seq-mean-token-mean",
    "dr_grpo": "seq-mean-token-sum-norm",
    "bnpo": "token-mean",
    "dapo": "token-mean",
    "cispo": "token-mean",
}
_SMALLEST_LOG = math.log(1e-8)  # of vespo's weights


class Terms(NamedTuple):
    """Of each token, ``(B, T)``, 0 where not scored: the loss, and detached the KL (None without) and 1 if clipped."""

    loss: Tensor
    kl: Tensor | None
    clipped: Tensor


@dataclass(frozen=True)
class Rollouts:
    """What a loss knows of its tokens, ``(B, T)`` where nothing else is said."""

    mask: Tensor  # what counts
    scored: Tensor  # what has a loss
    advantages: Tensor  # (B, 1)
    old: Tensor | None
    ref: Tensor | None
    weights: Tensor | None  # or (B, 1)

    @classmethod
    def of(
        cls, mask: tuple[str, Tensor], advantages: Tensor, old: tuple[str, Tensor | None],
        ref: tuple[str, Tensor | None], weights: Tensor | None, shape: torch.Size, everywhere: bool = False,
    ) -> Rollouts:  # fmt: skip
        """From the arguments, with their names; ``everywhere``: masked places are scored too.

        Raises:
            ValueError: for an argument of another shape, or for what the sampler could not score.
        """
        B, T = shape
        for name, value in (mask, old, ref):
            if value is not None and value.shape != shape:
                raise ValueError(f"{name} must have shape {(B, T)}, got {tuple(value.shape)}")
        if advantages.shape != (B,):
            raise ValueError(f"advantages must have shape {(B,)}, one a sequence, got {tuple(advantages.shape)}")
        if weights is not None:
            if weights.shape not in ((B,), (B, 1), (B, T)):
                raise ValueError(
                    f"vllm_is_ratio must have shape {(B,)}, {(B, 1)} or {(B, T)}, got {tuple(weights.shape)}"
                )
            weights = weights.detach().reshape(B, -1)
        live = mask[1].bool()
        scored = torch.ones_like(live) if everywhere else live
        _check_finite(*old, scored)
        if weights is not None:
            places = scored if weights.shape[1] == T else scored.any(1, keepdim=True)
            _check_finite("vllm_is_ratio", weights, places)
            weights = torch.where(places | weights.isfinite(), weights, 1.0)  # vespo reads masked places
        return cls(
            live, scored, advantages.detach()[:, None], _selected(old[1], scored), _selected(ref[1], scored), weights
        )


def _check_finite(name: str, value: Tensor | None, where: Tensor) -> None:
    """Looked at where that costs no device sync."""
    if value is None or value.device.type != "cpu" or torch.compiler.is_compiling():
        return
    odd = value[where & ~value.isfinite()]
    if odd.numel():
        raise ValueError(f"{name} must be finite at every token that counts, got {odd[0].item()}")


def _selected(value: Tensor | None, where: Tensor) -> Tensor | None:
    """Detached, with 0 elsewhere: selected before any arithmetic."""
    return None if value is None else torch.where(where, value.detach(), 0.0)


def check_temperatures(sapo: tuple[float, float]) -> None:
    for sign, temperature in zip(("pos", "neg"), sapo, strict=True):
        if temperature <= 0:
            raise ValueError(f"sapo_temperature_{sign} must be positive, got {temperature!r}")


def check_delta(delta: float | None) -> None:
    if delta is not None and delta <= 0:
        raise ValueError(f"delta must be positive, got {delta!r}")


@dataclass(frozen=True)
class Options:
    """A loss type and its options, named as in Liger's class; checked when made, with Liger's own sentences first."""

    loss_type: str
    level: str
    beta: float
    low: float
    high: float
    delta: float | None
    sapo: tuple[float, float]  # temperature for positive advantages, for others
    vespo: tuple[float, float, float, float]  # k and lambda for advantages >= 0, for others
    ratio_weighted_kl: bool
    length: float | None  # of dr_grpo

    def __post_init__(self) -> None:
        if self.loss_type not in (*_CLIPPING, *_OTHERS):
            kinds = ", ".join((*_CLIPPING, *_OTHERS))
            raise ValueError(
                f"Unknown loss type: {self.loss_type}. loss_type must be one of {kinds}; got {self.loss_type!r}"
            )
        if self.level not in ("token", "sequence"):
            raise ValueError(
                f"Unknown importance sampling level: {self.level}. importance_sampling_level must be 'token' or "
                f"'sequence', got {self.level!r}"
            )
        clips = self.loss_type in _CLIPPING
        if self.level == "sequence" and not clips:
            raise ValueError(
                f"Sequence-level importance sampling is not supported for loss_type='{self.loss_type}'. Use "
                f"importance_sampling_level='token' instead. Got 'sequence' with {self.loss_type!r}"
            )
        check_delta(self.delta)
        if self.delta is not None and not clips:
            raise ValueError(
                f"delta (two-sided clipping) is not supported for loss_type='{self.loss_type}'. delta must be None "
                f"there, got {self.delta!r} with {self.loss_type!r}"
            )
        if self.loss_type == "sapo":
            check_temperatures(self.sapo)

    def objective(self, has_reference: bool) -> HybridObjective | None:
        """Ours that gives the same loss, or None."""
        in_range = 0 <= self.low <= 1 and self.high > 0 and self.beta >= 0
        if self.loss_type not in _AGGREGATIONS or self.level != "token" or self.delta is not None or not in_range:
            return None
        policy: SAPO | CISPO | GRPO
        if self.loss_type == "sapo":
            policy = SAPO("sigmoid", *self.sapo)
        elif self.loss_type == "cispo":
            policy = CISPO(self.high)
        else:
            policy = GRPO(self.low, self.high)
        return HybridObjective(
            policy,
            kl_coef=self.beta if has_reference else 0.0,
            kl_ratio_weighted=self.ratio_weighted_kl,
            aggregation=_AGGREGATIONS[self.loss_type],
            norm_length=self.length if self.loss_type == "dr_grpo" else None,
        )

    def terms(self, logprobs: Tensor, rollouts: Rollouts) -> Terms:
        """Of each token; differentiable in ``logprobs`` ``(B, T)``. On-policy where there are no old log-probs."""
        dtype = logprobs.dtype
        adv = rollouts.advantages.to(dtype)
        log, _ = log_ratio(logprobs, None if rollouts.old is None else rollouts.old.to(dtype))
        if self.level == "sequence":
            count = rollouts.mask.sum(-1, keepdim=True).clamp(min=1)
            log = torch.where(rollouts.mask, log, 0.0).sum(-1, keepdim=True) / count
        ratio = log.exp()
        loss = self._policy(logprobs, log, ratio, adv, rollouts)
        if rollouts.weights is not None and self.loss_type != "vespo":
            loss = loss * torch.where(rollouts.scored, rollouts.weights.to(dtype), 0.0)
        kl = None
        if self.beta != 0.0:
            kl = torch.zeros_like(logprobs)
            if rollouts.ref is not None:
                # http://joschu.net/blog/kl-approx.html, k3
                d = (rollouts.ref.to(dtype) - logprobs).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
                kl = d.exp() - d - 1.0
                if self.ratio_weighted_kl:
                    kl = kl * ratio
                loss = loss + self.beta * kl
            kl = torch.where(rollouts.scored, kl.detach(), 0.0)
        clipped = torch.where(rollouts.scored, self._clipped(ratio.detach(), adv), False).to(dtype)
        return Terms(torch.where(rollouts.scored, loss, 0.0), kl, clipped)

    def _policy(self, logprobs: Tensor, log: Tensor, ratio: Tensor, adv: Tensor, rollouts: Rollouts) -> Tensor:
        if self.loss_type == "sapo":
            positive, other = (gate("sigmoid", ratio - 1.0, tau)[0] for tau in self.sapo)
            return -adv * torch.where(adv > 0, positive, other)
        if self.loss_type == "cispo":
            return -ratio.detach().clamp(max=self.high) * adv * logprobs
        if self.loss_type == "vespo":
            return -self._vespo_weight(log.detach(), adv, rollouts) * adv * logprobs
        bounded = ratio if self.delta is None else ratio.clamp(max=self.delta)
        return -torch.minimum(bounded * adv, ratio.clamp(1.0 - self.low, 1.0 + self.high) * adv)

    def _vespo_weight(self, log: Tensor, adv: Tensor, rollouts: Rollouts) -> Tensor:
        """``w^k exp(lambda (1 - w))`` of a sequence's ratio ``w``, rollout weights included, ``(B, 1)``."""
        k_pos, lambda_pos, k_neg, lambda_neg = self.vespo
        total = torch.where(rollouts.mask, log, 0.0).sum(-1, keepdim=True)
        if rollouts.weights is not None:  # of a (B, T) one every place counts, as in Liger and TRL
            total = total + rollouts.weights.to(log.dtype).log().clamp(_SMALLEST_LOG, LOG_RATIO_BOUND).sum(
                -1, keepdim=True
            )
        total = total.clamp(_SMALLEST_LOG, LOG_RATIO_BOUND)
        k = torch.where(adv >= 0, k_pos, k_neg)
        rate = torch.where(adv >= 0, lambda_pos, lambda_neg).clamp(min=1e-4)
        return (rate + k * total - rate * total.exp()).exp().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)

    def _clipped(self, ratio: Tensor, adv: Tensor) -> Tensor:
        if self.loss_type == "cispo":
            return (ratio > self.high) & (adv > 0)
        if self.loss_type in _OTHERS:
            return torch.zeros_like(ratio, dtype=torch.bool)
        return ((ratio < 1.0 - self.low) & (adv < 0)) | ((ratio > 1.0 + self.high) & (adv > 0))

    def denominator(self, mask: Tensor, num_items: float | Tensor | None) -> float | Tensor:
        """What sums over sequences are divided by; ``num_items``: tokens of the generation batch over all ranks."""
        if self.loss_type in ("grpo", "sapo", "dr_grpo"):
            return float(mask.shape[0])
        if self.loss_type == "luspo":
            return float(mask.numel())
        if self.loss_type == "bnpo":
            return mask.sum().clamp(min=1)
        ranks = world_size()
        if num_items is None:
            count = mask.sum(dtype=torch.float32)
            if ranks > 1:
                torch.distributed.all_reduce(count)
        else:
            count = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
        return (count / ranks).clamp(min=1.0)  # gradients are averaged over ranks afterwards

    def reduced(self, loss: Tensor, mask: Tensor, denominator: float | Tensor) -> Tensor:
        """The loss of the batch, 0-d, from that of its tokens."""
        per_sequence, count = loss.sum(-1), mask.sum(-1)
        if self.loss_type in ("grpo", "sapo"):
            per_sequence = per_sequence / count.clamp(min=1)
        elif self.loss_type == "luspo":
            per_sequence = per_sequence * count
        elif self.loss_type == "dr_grpo":
            assert self.length is not None  # checked where the option's name is known
            per_sequence = per_sequence / self.length
        return per_sequence.sum() / denominator

    def metrics(self, terms: Terms, mask: Tensor) -> tuple[Tensor, ...]:
        """Mean KL, where there is one, and clip fraction over the tokens that count."""
        values = [terms.clipped] if terms.kl is None else [terms.kl, terms.clipped]
        return tuple(torch.where(mask, value, 0.0).sum() / mask.sum().clamp(min=1) for value in values)
