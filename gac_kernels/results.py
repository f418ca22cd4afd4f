"""What the losses and the building blocks return."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .signals import Signals
    from .types import TokenBatch

METRICS = ("ratio_mean", "ratio_max", "approx_kl", "effective_update_ratio", "clip_fraction", "cancellation_residual")
SCALARS = ("policy_loss", "supervised_loss", "kl", "entropy", *METRICS)  # of HybridLoss.scalars


@dataclass(frozen=True, eq=False)
class TokenLogprobs:
    """Per-token statistics of the logits, shaped as the targets; masked places hold 0.

    ``logprobs`` and ``entropy`` (nats) carry gradient; ``sum_sq`` (sum over the vocabulary of p squared) does not.
    An output that was not asked for is None.
    """

    logprobs: Tensor | None
    entropy: Tensor | None = None
    sum_sq: Tensor | None = None


@dataclass(frozen=True, eq=False)
class HybridLoss:
    """What every hybrid loss returns. Nothing in it has been read by the host.

    With the branch means aggregated as the objective says,
    ``loss = (1 - mu) * (policy_loss + kl_coef * kl - entropy_coef * entropy) + mu * supervised_loss``.

    The numbers for a log are 0-d tensors, taken out of one when they are asked for.

    Attributes:
        loss: 0-d, differentiable; float32 (float64 for float64 input).
        logprobs: shaped as the targets, detached; 0 at masked places.
        token_entropy: shaped as the targets, detached, or None where no entropy was given.
        signals: what the controller observes.
        scalars: ``(10,)`` detached, as in ``SCALARS``; 0 for what does not apply.
        applicable: names of the metrics that apply to the objective.
        batch: whose unscored tokens ``metrics`` counts, or None where it holds nothing that engines return.
    """

    loss: Tensor
    logprobs: Tensor
    token_entropy: Tensor | None
    signals: Signals
    scalars: Tensor
    applicable: tuple[str, ...]
    batch: TokenBatch | None = None

    @property
    def policy_loss(self) -> Tensor:
        """0-d, detached; 0 without a rollout token."""
        return self.scalars[0]

    @property
    def supervised_loss(self) -> Tensor:
        """0-d, detached; 0 without a demonstration's token."""
        return self.scalars[1]

    @property
    def kl(self) -> Tensor:
        """0-d, detached, the chosen estimator's mean over rollout tokens in nats; 0 without reference log-probs."""
        return self.scalars[2]

    @property
    def entropy(self) -> Tensor:
        """0-d, detached, mean over rollout tokens in nats; 0 where no entropy was given."""
        return self.scalars[3]

    @property
    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors over the live rollout tokens: ``ratio_mean``, ``ratio_max``, ``approx_kl`` (k3 of the importance
        ratio, nats) and, where they apply, ``effective_update_ratio``, ``clip_fraction``, ``cancellation_residual``.
        0 without a rollout token. ``rollout_unscored``, where old_logprobs, rollout_weights or a KL penalty are:
        how many tokens of rollouts have no RL term because one of these is nan or infinite there."""
        named = {name: self.scalars[SCALARS.index(name)] for name in self.applicable}
        return (
            named if self.batch is None else named | {"rollout_unscored": self.batch.unscored().to(self.scalars.dtype)}
        )
