"""Everything about a loss but where its logits come from: checked once, and handed to the operators as they take it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import eager, library
from ..objectives import DFPO, GIFT, GSPO, HybridObjective, LogitTransform
from ..schemas import DEAD, DEMONSTRATION, encode_rows, encode_term, encode_weights
from ..types import Denominators, TokenBatch
from . import inputs
from .rows import row_temperature


class LossPlan(NamedTuple):
    """The arguments of a loss, in the operators' terms."""

    targets: Tensor  # (N,)
    temperature: Tensor | None  # (N,), or None where one number holds for all
    static: tuple[float, ...]  # of the transform and of GIFT
    batch: tuple[Any, ...]  # inputs.batch_args
    groups: Tensor | None
    mu: Tensor
    counts: tuple[Tensor | None, Tensor | None]
    term: tuple[Any, ...]
    weights: tuple[int, int, float]
    custom: tuple[TokenBatch, HybridObjective] | None  # terms that are functions in Python
    two_looks: bool  # the slopes wait for all log-probs of a sequence
    has_bonus: bool  # of entropy
    norm_length: float | None
    own_weights: Tensor | None  # (N,), the batch's token_weights
    eager: tuple[TokenBatch, HybridObjective] | None  # where PyTorch evaluates the terms: functions, token_weights

    @classmethod
    def of(
        cls, like: Tensor, batch: TokenBatch, objective: HybridObjective, mu: float | Tensor, transform: LogitTransform,
        gift: GIFT | None, denominators: Denominators | None, columns: int,
    ) -> LossPlan:  # fmt: skip
        """For rows of ``columns`` logits of the dtype and on the device of ``like``. Raises as the losses say."""
        custom = inputs.functions_of(objective, library.forced_backend())
        dtype = torch.promote_types(like.dtype, torch.float32)
        mu = inputs.mixing(mu, like.new_empty((), dtype=dtype))
        norm_length = inputs.norm_length_of(objective, batch)
        return cls(
            targets=batch.targets.reshape(-1).contiguous(),
            temperature=row_temperature(transform, batch, dtype),
            static=encode_rows(transform, gift, columns),
            batch=inputs.batch_args(batch, dtype),
            groups=inputs.plain_or_none(batch.groups, torch.int64),
            mu=mu,
            counts=inputs.counts_of(denominators, mu),
            term=encode_term(objective) if custom is None else (),
            weights=encode_weights(objective, norm_length),
            custom=None if custom is None else (batch, objective),
            two_looks=isinstance(objective.policy, (GSPO, DFPO)) if custom is None else custom.coupled,
            has_bonus=objective.entropy_coef != 0,
            norm_length=norm_length,
            own_weights=None if batch.token_weights is None else inputs.plain(batch.token_weights, dtype).view(-1),
            eager=None if custom is None and batch.token_weights is None else (batch, objective),
        )

    def weighted(self, kind: Tensor, weight: Tensor) -> Tensor:
        """``weight`` with what the batch's own weights make of it: of every term token_weights, of demonstrations
        rollout_weights too, which the kernels know for rollouts."""
        rollout_N, own_N = self.tokens[2], self.own_weights
        if rollout_N is not None:
            weight = torch.where(kind == DEMONSTRATION, weight * rollout_N, weight)
        return weight if own_N is None else torch.where(kind == DEAD, 0.0, weight * own_N)

    def token_weights(self) -> tuple[Tensor, ...]:
        """``kind, weight, advantages`` of every token."""
        results: tuple[Tensor, ...] = library.call(
            "token_weights", *self.batch[:6], self.mu, *self.counts, *self.weights
        )
        return results

    @property
    def tokens(self) -> tuple[Tensor | None, ...]:
        """``old_logprobs, ref_logprobs, rollout_weights``, ``(N,)``."""
        return tuple(value if value is None else value.view(-1) for value in self.batch[6:])

    def token_loss(self, logprobs: Tensor, entropy: Tensor, sum_sq: Tensor, supervised: Tensor | None) -> Any:
        """The results of the operator of that name; ``supervised``: GIFT's losses."""
        if self.eager is not None:
            denominators = Denominators(*self.counts)
            return eager.token_loss_of_batch(logprobs, *self.eager, self.mu, entropy, sum_sq, supervised, denominators)
        return library.call(
            "token_loss", logprobs, *self.batch, entropy, sum_sq, supervised, self.groups, self.mu, *self.counts,
            *self.term, *self.weights,
        )  # fmt: skip
