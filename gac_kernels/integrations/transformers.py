"""Our losses in transformers: a ``model.loss_function``, called by the models themselves with their logits.

    model.loss_function = CausalLMLoss()                     # demonstrations, NLL weighted by phi
    model.loss_function = CausalLMLoss(mu=0.5)               # and rollouts, where a call brings advantages
    Trainer(model, ...).train()

Works with models that hand their logits and keyword arguments to ``self.loss_function``, which causal language models
of transformers 4.56 and newer do.

Shapes: B sequences of T tokens, V columns of logits.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..controller import GuidedAdaptiveController
from ..objectives import GIFT, HybridObjective
from ..ops import hybrid_loss_from_logits
from ..types import IGNORE_INDEX, Denominators, HybridLoss, TokenBatch
from .checks import Check, check_host

OLDEST, BEFORE = "4.56", "6"


class CausalLMLoss:
    """The hybrid loss with the signature of transformers' ``ForCausalLMLoss``, labels shifted here.

    Without advantages every sequence is a demonstration, and with ``mu`` 1 this is the plain supervised loss: divided
    by ``num_items_in_batch``, as a ``Trainer`` that accumulates gradients wants it. With ``NLL("none")`` it equals
    transformers' own. The rest of a hybrid batch comes through the model's call, as keyword arguments that models hand
    on to their loss: ``model(input_ids=..., labels=..., advantages=..., is_expert=..., old_logprobs=...)``.

    Args:
        objective: what to compute; not GIFT, for which a base model's logits are needed.
        mu: weight of the demonstrations, a number or a 0-d tensor. None: they are all there is, and a call that
            brings advantages raises.
        controller: sets mu in place of ``mu``, and observes every loss that is computed with gradient. Call its
            ``step()`` after each optimizer step (a ``TrainerCallback``'s ``on_step_end``).
        inplace: write the gradient over the logits, which the model also returns: no extra memory, and what is
            returned are logits no more.

    Attributes:
        result: HybridLoss of the last call, all of it detached; None before.
    """

    def __init__(
        self,
        objective: HybridObjective | None = None,
        mu: float | Tensor | None = None,
        *,
        controller: GuidedAdaptiveController | None = None,
        inplace: bool = False,
    ) -> None:
        objective = HybridObjective() if objective is None else objective
        if not isinstance(objective, HybridObjective):
            raise TypeError(f"objective must be a HybridObjective, got {type(objective).__name__}")
        if isinstance(objective.supervised, GIFT):
            raise ValueError(
                "objective.supervised = GIFT needs a base model's logits, which no model hands to its loss"
            )
        if controller is not None and controller.config.estimator == "hidden":
            raise ValueError(
                "controller's estimator must be 'coefficient' or 'logit' for a loss from logits, got 'hidden'"
            )
        self.objective, self.controller, self.inplace = objective, controller, inplace
        self._mu = mu
        self.result: HybridLoss | None = None

    @property
    def mu(self) -> float | Tensor:
        """Weight of the demonstrations in the next call."""
        if self.controller is not None:
            return self.controller.mu
        return 1.0 if self._mu is None else self._mu

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: float | Tensor | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        *,
        advantages: Tensor | None = None,
        is_expert: Tensor | None = None,
        old_logprobs: Tensor | None = None,
        ref_logprobs: Tensor | None = None,
        rollout_weights: Tensor | None = None,
        policy_items: float | Tensor | None = None,
        supervised_items: float | Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The 0-d loss.

        Args:
            logits: ``(B, T, V)``; row ``t`` predicts token ``t + 1``.
            labels: ``(B, T)`` token ids, ``ignore_index`` where a token does not count.
            vocab_size: V, as the model knows it.
            num_items_in_batch: tokens that count in the whole optimizer step; None: of this batch.
            shift_labels: ``(B, T)`` in place of ``labels``: shifted already, for rows of logits as they are.
            advantages: ``(B,)`` or ``(B, T)``. None: all are demonstrations.
            is_expert: ``(B,)`` bool, True for demonstrations. None with advantages: all are rollouts.
            old_logprobs, ref_logprobs, rollout_weights: ``(B, T)``, of token ``t`` where its label stands (and so are
                advantages a token).
            policy_items, supervised_items: what the branches divide by in place of this batch's counts (tokens or
                sequences, as the objective aggregates); needed with advantages where ``num_items_in_batch`` is given,
                which counts both.
            kwargs: what else the model passes on. Not read; but a name that is almost one of these raises, since a
                misspelt one would change the loss in silence.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        _check_names(kwargs)
        if advantages is not None and self._mu is None and self.controller is None:
            raise ValueError("mu or controller must be given to CausalLMLoss where advantages are: without, mu is 1")
        shifted = shift_labels is not None
        targets = shift_labels if shift_labels is not None else labels
        if targets is None:
            raise ValueError("labels or shift_labels must be given, got None for both")
        if vocab_size is not None and vocab_size != logits.shape[-1]:
            raise ValueError(f"vocab_size must be the number of logits, {logits.shape[-1]}, got {vocab_size}")
        targets = targets.to(logits.device)

        def along(value: Tensor | None, fill: float = 0.0) -> Tensor | None:
            """Of tokens where their labels stand, one place to the left: where they are predicted."""
            if value is None or shifted or value.ndim < 2:
                return value
            return pad(value, (0, 1), value=fill)[:, 1:]

        targets = along(targets, ignore_index)
        assert targets is not None
        live = targets.ne(ignore_index)
        if advantages is None and is_expert is None:
            is_expert = torch.ones(targets.shape[0], dtype=torch.bool, device=targets.device)
        batch = TokenBatch.from_padded(
            targets.masked_fill(~live, IGNORE_INDEX),
            live,
            is_expert_S=is_expert,
            advantages=along(advantages),
            old_logprobs=along(old_logprobs),
            ref_logprobs=along(ref_logprobs),
            rollout_weights=along(rollout_weights),
        )
        denominators = self._denominators(num_items_in_batch, policy_items, supervised_items, advantages is not None)
        result = hybrid_loss_from_logits(
            logits, batch, self.objective, self.mu, inplace=self.inplace, denominators=denominators
        )
        self.result = replace(result, loss=result.loss.detach())
        if self.controller is not None and result.loss.requires_grad:
            self.controller.observe(result.signals)
        return result.loss

    def _denominators(
        self,
        items: float | Tensor | None,
        policy: float | Tensor | None,
        supervised: float | Tensor | None,
        mixed: bool,
    ) -> Denominators:
        if items is None or (policy is not None and supervised is not None):
            return Denominators(policy, supervised)
        if mixed:
            raise ValueError(
                "policy_items and supervised_items must be given with advantages and num_items_in_batch, which counts "
                "rollouts and demonstrations together"
            )
        if self.objective.supervised_aggregation != "token-mean":
            raise ValueError(
                "objective.supervised_aggregation must be 'token-mean' with num_items_in_batch, which counts tokens; "
                f"got {self.objective.supervised_aggregation!r}"
            )
        if isinstance(items, Tensor):
            items = items.reshape(())  # a replica of nn.DataParallel gets one of its own, with a dimension
        return Denominators(policy, items)


_NAMES = ("advantages", "is_expert", "old_logprobs", "ref_logprobs", "rollout_weights", "policy_items",
          "supervised_items", "num_items_in_batch", "shift_labels", "ignore_index")  # fmt: skip
_ELSEWHERE = ("mu", "objective", "controller", "inplace")  # of the loss itself


def _check_names(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name in _ELSEWHERE:
            raise TypeError(f"{name!r} is an argument of CausalLMLoss itself, not of the model's call")
        if close := get_close_matches(name, _NAMES, 1, cutoff=0.85):
            raise TypeError(f"{name!r} is not an argument of this loss: {close[0]!r} is")


def check() -> Check:
    """Whether transformers is here, supported, and calls a model's loss as we expect."""
    return check_host(
        "transformers",
        OLDEST,
        BEFORE,
        {
            "transformers.modeling_utils:PreTrainedModel.loss_function": (),
            "transformers.loss.loss_utils:ForCausalLMLoss": (
                "logits", "labels", "vocab_size", "num_items_in_batch", "ignore_index", "shift_labels",
            ),
        },
    )  # fmt: skip
