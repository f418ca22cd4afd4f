"""Our losses in transformers: a ``model.loss_function``, called by the models themselves with their logits.

    model.loss_function = CausalLMLoss()                     # demonstrations, NLL weighted by phi
    model.loss_function = CausalLMLoss(mu=0.5)               # and rollouts, where a call brings advantages
    attach(model, CausalLMLoss())                            # the same, or an error where a model would not call it
    Trainer(model, ...).train()

Works with models that hand their logits and keyword arguments to ``self.loss_function``, which most causal language
models of transformers 4.56 and newer do.

Shapes: B rows of T tokens, S sequences (as many as rows, unless rows are packed), V columns of logits.
"""

from __future__ import annotations

import warnings
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..controller import GuidedAdaptiveController
from ..objectives import GIFT, HybridObjective
from ..ops import hybrid_loss_from_logits
from ..tensors import INTS, plain_tensor
from ..types import IGNORE_INDEX, Denominators, HybridLoss, TokenBatch
from . import _packed_rows
from ._calling_model import calling_forward, check_calls, owner_of
from .checks import Check, check_host

OLDEST, BEFORE = "4.56", "6"


class CausalLMLoss:
    """The hybrid loss with the signature of transformers' ``ForCausalLMLoss``, labels shifted here.

    Without advantages every sequence is a demonstration, and with ``mu`` 1 this is the plain supervised loss: divided
    by ``num_items_in_batch``, as a ``Trainer`` that accumulates gradients wants it. With ``NLL("none")`` it equals
    transformers' own. The rest of a hybrid batch comes through the model's call, as keyword arguments that models hand
    on to their loss: ``model(input_ids=..., labels=..., advantages=..., is_expert=..., old_logprobs=...)``.

    **Padding-free rows.** Where ``cu_seq_lens_q`` or ``seq_idx`` comes along, or ``position_ids`` that restart within a
    row, the rows hold S sequences end to end, and all that is one a sequence has S values. Under ``torch.compile``
    position_ids are not seen: give ``cu_seq_lens_q``.

    **Evaluation.** Without gradient, and in ``model.eval()``, mu takes no part: the loss is ``policy + supervised``,
    each branch unscaled, so that two checkpoints compare; of demonstrations alone it is their own loss. The controller
    sees nothing and the logits are left as they are. A backward from a loss that lacks mu for the mode of the model
    alone raises. ``evaluation`` overrides: False trains in ``model.eval()``. Under ``torch.compile`` the mode of the
    model is not seen, only whether gradients are.

    Args:
        objective: what to compute; not GIFT, for which a base model's logits are needed.
        mu: weight of the demonstrations, a number or a 0-d tensor. None: they are all there is, and a call that
            brings advantages raises.
        controller: sets mu in place of ``mu``, and observes every loss that is computed with gradient. Call its
            ``step()`` after each optimizer step (a ``TrainerCallback``'s ``on_step_end``).
        inplace: write the gradient over the logits, which the model also returns: no extra memory, and what is
            returned are logits no more.
        evaluation: True or False where every call is one or is none; None: as said above.

    Attributes:
        result: HybridLoss of the last call, all of it detached; None before, with a warning.
    """

    def __init__(
        self,
        objective: HybridObjective | None = None,
        mu: float | Tensor | None = None,
        *,
        controller: GuidedAdaptiveController | None = None,
        inplace: bool = False,
        evaluation: bool | None = None,
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
        self.evaluation = _checked_evaluation(evaluation)
        self._mu = mu
        self._result: HybridLoss | None = None

    @property
    def mu(self) -> float | Tensor:
        """Weight of the demonstrations in the next call of training."""
        if self.controller is not None:
            return self.controller.mu
        return 1.0 if self._mu is None else self._mu

    @property
    def result(self) -> HybridLoss | None:
        """HybridLoss of the last call; None before any, which a model that computes its own loss never makes."""
        if self._result is None:
            warnings.warn(_NEVER_CALLED, stacklevel=2)
        return self._result

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
        token_weights: Tensor | None = None,
        policy_items: float | Tensor | None = None,
        supervised_items: float | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        seq_idx: Tensor | None = None,
        position_ids: Tensor | None = None,
        evaluation: bool | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The 0-d loss.

        Args:
            logits: ``(B, T, V)``; row ``t`` predicts token ``t + 1``.
            labels: ``(B, T)`` token ids, ``ignore_index`` where a token does not count. The first of a sequence never
                counts, whatever its label: nothing of its own predicts it.
            vocab_size: V, as the model knows it.
            num_items_in_batch: tokens that count in the whole optimizer step; None: of this batch.
            shift_labels: ``(B, T)`` in place of ``labels``: shifted already, for rows of logits as they are, and
                ``ignore_index`` where the next token is another sequence's.
            advantages: ``(S,)`` or ``(B, T)``; S = B but for padding-free rows. None: all are demonstrations.
            is_expert: ``(S,)`` bool, True for demonstrations; ``(B, T)`` too in padding-free rows. None with
                advantages: all are rollouts.
            old_logprobs, ref_logprobs: ``(B, T)``, of token ``t`` where its label stands (and so are advantages and
                weights of tokens).
            rollout_weights, token_weights: ``(B, T)``, or one a sequence, ``(S,)`` or ``(S, 1)``; of demonstrations as
                of rollouts. As in TokenBatch.
            policy_items, supervised_items: what the branches divide by in place of this batch's counts (tokens or
                sequences, as the objective aggregates); needed with advantages where ``num_items_in_batch`` is given,
                which counts both.
            cu_seq_lens_q: ``(S + 1,)`` integers from 0 to B T: where the sequences of padding-free rows begin and end
                (``cu_seqlens`` too). It is believed before the two below, and needs no host sync.
            seq_idx: ``(B, T)``: of each token the number of its sequence. One host sync.
            position_ids: ``(B, T)``, by default those of the model's call: where they restart, a sequence begins. One
                host sync.
            evaluation: in place of the loss's own ``evaluation``.
            kwargs: what else the model passes on. Not read; but a name that is almost one of these raises, since a
                misspelt one would change the loss in silence.

        Raises:
            TypeError, ValueError: naming the argument, what was expected and what came.
        """
        _check_names(kwargs)
        tokens = {
            "advantages": advantages, "old_logprobs": old_logprobs, "ref_logprobs": ref_logprobs,
            "rollout_weights": rollout_weights, "token_weights": token_weights,
        }  # fmt: skip
        own = {"cu_seq_lens_q": cu_seq_lens_q, "seq_idx": seq_idx, "position_ids": position_ids}
        counts = {
            "num_items_in_batch": num_items_in_batch, "policy_items": policy_items, "supervised_items": supervised_items
        }  # fmt: skip
        _check_tensors(logits, labels=labels, shift_labels=shift_labels, is_expert=is_expert, **tokens, **own, **counts)
        if advantages is not None and self._mu is None and self.controller is None:
            raise ValueError("mu or controller must be given to CausalLMLoss where advantages are: without, mu is 1")
        targets = labels if shift_labels is None else shift_labels
        if targets is None:
            raise ValueError("labels or shift_labels must be given, got None for both")
        if vocab_size is not None and vocab_size != logits.shape[-1]:
            raise ValueError(f"vocab_size must be the number of logits, {logits.shape[-1]}, got {vocab_size}")
        call = calling_forward()
        targets = targets.to(logits.device)
        targets = targets.masked_fill(targets.eq(ignore_index), IGNORE_INDEX)
        layout = {name: call.layout.get(name) if value is None else value for name, value in own.items()}
        if layout["cu_seq_lens_q"] is None:
            layout["cu_seq_lens_q"] = kwargs.get("cu_seqlens")
        sizes = tuple(len(value) for value in (advantages, is_expert) if value is not None and value.ndim == 1)
        offsets = _packed_rows.boundaries(targets, **layout, sizes=sizes) if targets.ndim == 2 else None
        batch = _batch(targets, offsets, shift_labels is not None, is_expert, tokens)
        if offsets is not None:
            logits = logits[0] if logits.shape[0] == 1 else logits.flatten(0, 1)
        mode = self.evaluation if evaluation is None else _checked_evaluation(evaluation)
        tests = not (torch.is_grad_enabled() and call.in_training) if mode is None else mode
        # A half of each branch, doubled, is exactly the branch; demonstrations alone are one.
        mu = (1.0 if advantages is None else 0.5) if tests else self.mu
        denominators = self._denominators(num_items_in_batch, policy_items, supervised_items, advantages is not None)
        result = hybrid_loss_from_logits(
            logits, batch, self.objective, mu, inplace=self.inplace and not tests, denominators=denominators
        )
        # What is returned is its own memory: models of mixtures of experts add to it in place.
        loss = 2.0 * result.loss if tests and advantages is not None else result.loss.clone()
        self._result = replace(result, loss=loss.detach().clone())
        if loss.requires_grad and not tests and self.controller is not None:
            self.controller.observe(result.signals)
        if loss.requires_grad and tests and mode is None and (self.controller is not None or self._mu is not None):
            loss.register_hook(_refuse_backward)
        return loss

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


def _check_tensors(logits: Tensor, **given: object) -> None:
    for name, value in {"logits": logits, **given}.items():
        if isinstance(value, Tensor):
            plain_tensor(name, value, INTS if "labels" in name else None)
            if value.is_meta != logits.is_meta:
                raise ValueError(f"{name} must be on {logits.device} like logits, got {value.device}")


def _batch(
    targets: Tensor, offsets: Tensor | None, shifted: bool, is_expert: Tensor | None, tokens: dict[str, Tensor | None]
) -> TokenBatch:  # fmt: skip
    """The batch, each token where it is predicted: one place to the left of its label, unless shifted already."""
    shape = tuple(targets.shape)

    def along(value: Tensor, fill: float = 0.0) -> Tensor:
        if shifted or tuple(value.shape) != shape or len(shape) < 2:
            return value
        return pad(value, (0, 1), value=fill)[:, 1:]

    places = along(targets, IGNORE_INDEX)
    moved = {name: along(value) for name, value in tokens.items() if value is not None}
    if is_expert is None and tokens["advantages"] is None:
        sequences = shape[0] if offsets is None else len(offsets) - 1
        is_expert = torch.ones(sequences, dtype=torch.bool, device=targets.device)
    if offsets is None:
        return TokenBatch.from_padded(places, places.ne(IGNORE_INDEX), is_expert_S=is_expert, **moved)
    sequences = len(offsets) - 1
    for name in ("advantages", "rollout_weights", "token_weights"):
        _packed_rows.check_per_sequence(name, tokens[name], shape, sequences)
    _packed_rows.check_per_sequence("is_expert", is_expert, shape, sequences)
    places = places.reshape(-1)
    if is_expert is not None and tuple(is_expert.shape) == shape:
        is_expert = is_expert.reshape(-1)[offsets[:-1].clamp(max=len(places) - 1)]
    live = places.ne(IGNORE_INDEX)
    if not shifted:  # the next label is another sequence's
        live &= ~_packed_rows.last_places(offsets, len(places))
    flat = {name: _packed_rows.flat(value, shape) for name, value in moved.items()}
    return TokenBatch.from_packed(places, offsets, mask_N=live, is_expert_S=is_expert, **flat)


def _checked_evaluation(value: bool | None) -> bool | None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"evaluation must be True, False or None, got {type(value).__name__}")
    return value


def _refuse_backward(_: Tensor) -> None:
    raise RuntimeError(
        "backward from a loss of evaluation, which leaves mu out: the model is in eval mode. Call model.train() "
        "before; or give CausalLMLoss evaluation=False to train in eval mode, True for the gradient without mu"
    )


_NEVER_CALLED = (
    "CausalLMLoss has not been called. Models that compute a loss by themselves (XLNet, Whisper, Bart and others) "
    "never call their loss_function: attach(model, loss) refuses these. Nor does a Trainer with label_smoothing_factor"
)
_NAMES = ("advantages", "is_expert", "old_logprobs", "ref_logprobs", "rollout_weights", "token_weights", "policy_items",
          "supervised_items", "num_items_in_batch", "shift_labels", "ignore_index", "evaluation", "cu_seq_lens_q",
          "seq_idx", "position_ids")  # fmt: skip
_HOSTS = ("cu_seq_lens_k", "cu_seqlens")  # of transformers, and close to one of these
_ELSEWHERE = ("mu", "objective", "controller", "inplace")  # of the loss itself


def _check_names(kwargs: dict[str, Any]) -> None:
    for name in kwargs:
        if name in _ELSEWHERE:
            raise TypeError(f"{name!r} is an argument of CausalLMLoss itself, not of the model's call")
        if name not in _HOSTS and (close := get_close_matches(name, _NAMES, 1, cutoff=0.85)):
            raise TypeError(f"{name!r} is not an argument of this loss: {close[0]!r} is")


def attach(model: Any, loss: CausalLMLoss) -> CausalLMLoss:
    """Make ``loss`` the model's loss function, once it is sure that the model would call it.

    Args:
        model: a causal language model of transformers, or what wraps one (PEFT, DistributedDataParallel).
        loss: returned as it is.

    Raises:
        TypeError: ``model`` holds no model of transformers, ``loss`` is no CausalLMLoss.
        ValueError: the model computes a loss by itself, or one of another kind.
    """
    if not isinstance(loss, CausalLMLoss):
        raise TypeError(f"loss must be a CausalLMLoss, got {type(loss).__name__}")
    owner = owner_of(model)
    check_calls(owner)
    owner.loss_function = loss
    return loss


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
