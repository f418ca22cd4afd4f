"""TRL's SFTTrainer with our supervised losses: its own batches, counts, metrics and evaluation; no logits.

The loss goes where TRL's fused head stands, inside the model's forward: there the hidden states of the tokens that
count are at hand, under any packing or mask, and whatever the model is wrapped in.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..objectives import GIFT, NLL, HybridObjective, LogitTransform
from ..ops import hybrid_loss_from_hidden
from ..types import Denominators, TokenBatch
from . import _trl_head

_PHI = NLL("phi")
_OUTPUTS = ("log_probs", "entropy", "is_top1")  # what SFTTrainer asks its head for


def attach_sft(
    trainer: Any, *, objective: NLL | GIFT | None = _PHI, base_model: Any = None
) -> SFTAttachment:  # fmt: skip
    """Plug this package into a ``trl.SFTTrainer`` that exists and has not trained yet.

    Training's loss is ``sum of token terms / num_items_in_batch`` as TRL's, the terms by ``objective``, so that
    gradient accumulation is exact; masks, packing, the metrics ``entropy``, ``mean_token_accuracy`` and ``num_tokens``
    and the loss of evaluation stay TRL's. The loss comes from hidden states in three matrix products.

    Args:
        trainer: a ``trl.SFTTrainer``.
        objective: ``NLL("phi")`` (CHORD, arXiv 2508.11408), ``NLL("none")``, which is TRL's ``loss_type="nll"``, or a
            GIFT (arXiv 2601.09233). None keeps TRL's own ``loss_type``, its log-probs from our head.
        base_model: GIFT's base, a causal language model of the same vocabulary, which is frozen and moved to the
            trainer's device. None: the trainer's model as it is now, by a copy; with PEFT the model without adapter.

    Returns:
        The attachment.

    Raises:
        ImportError: TRL is missing or of a version whose hooks are not known.
        TypeError, ValueError: naming the argument or the trainer's option, what was expected and what came.
    """
    _trl_head.check_version()
    from trl import SFTTrainer

    if not isinstance(trainer, SFTTrainer):
        raise TypeError(f"trainer must be a trl.SFTTrainer, got {type(trainer).__name__}")
    if "_gac" in trainer.__dict__:
        raise ValueError("trainer is attached already: attach_sft() once, with all its arguments")
    _trl_head.check_head()
    check_trainer(trainer, objective)
    trainer._gac = SFTAttachment(trainer, objective, base_model_of(trainer, objective, base_model))
    attachment: SFTAttachment = trainer._gac
    return attachment


class SFTAttachment:
    """What :func:`attach_sft` put into a trainer.

    Attributes:
        objective: None where TRL's own loss is kept.
        base_model: GIFT's base model; None without GIFT, and where it is the trainer's model without its adapter.
    """

    def __init__(self, trainer: Any, objective: NLL | GIFT | None, base_model: Any) -> None:
        self.trainer, self.objective, self.base_model = trainer, objective, base_model
        self._loss = trainer.compute_loss
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's loss and metrics, with the objective's loss in place of its sum of log-probs; in evaluation TRL's."""
        head: Any = _trl_head.Head
        if self.objective is not None and self.trainer.model.training:
            base = self._base_rows(model, inputs) if isinstance(self.objective, GIFT) else None
            head = Supervised(self.objective, base)
        with _trl_head.our_head(head):
            return self._loss(model, inputs, *args, **kwargs)

    @torch.no_grad()
    def _base_rows(self, model: Any, inputs: dict[str, Any]) -> _Rows:
        """Hidden states of the base model at the tokens that count, and its head."""
        rows, adapter = _Rows(), nullcontext()
        base = self.base_model
        if base is None:  # an adapter's: the model without it
            base = self.trainer.accelerator.unwrap_model(model)
            adapter = base.disable_adapter()
        trained = base.training
        base.eval()
        try:
            with adapter, _trl_head.our_head(rows):
                base(**{**inputs, "use_cache": False}, fused_lm_head=True)
        finally:
            base.train(trained)
        return rows


class _Rows:
    """In the place of TRL's autograd function: keeps what comes, computes nothing."""

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        if not torch.is_autocast_enabled(hidden.device.type):
            weight, bias = weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        self.hidden, self.weight, self.bias = hidden, weight, bias
        return (hidden.new_zeros(targets.shape), None, None, None, None)


class Supervised:
    """In the place of TRL's autograd function: the whole loss and its gradients in one pass, three products.

    SFTTrainer does nothing with its head's log-probs but sum them over all tokens and divide, so that any values will
    do whose sum is minus the loss's: every token gets its mean.
    """

    def __init__(self, objective: NLL | GIFT, base: _Rows | None) -> None:
        self.objective, self.base = HybridObjective(supervised=objective), base

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float,
        chunk_size: int, final_logit_softcapping: float | None = None, logit_scale: float = 1.0,
        outputs: tuple[str, ...] = _OUTPUTS,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        """As :meth:`_trl_head.Head.apply`, with ``log_probs`` as said above."""
        _trl_head.check_outputs(outputs, _OUTPUTS)
        weight, bias = _trl_head.checked_head(hidden, weight, bias)
        transform = LogitTransform(temperature, final_logit_softcapping, logit_scale)
        count, base = targets.numel(), self.base
        # One sequence: every token weighs the same, and TRL divides by the count of the whole step.
        ends = torch.tensor([0, count], device=targets.device)
        expert = torch.ones(1, dtype=torch.bool, device=targets.device)
        result = hybrid_loss_from_hidden(
            hidden,
            weight,
            TokenBatch.from_packed(targets, ends, is_expert_S=expert),
            self.objective,
            1.0,
            bias=bias,
            transform=transform,
            denominators=Denominators(policy=1.0, supervised=1.0),
            base_hidden=None if base is None else base.hidden,
            base_weight=None if base is None else base.weight,
            base_bias=None if base is None else base.bias,
        )
        assert result.token_entropy is not None
        top1 = None
        if "is_top1" in outputs:
            top1 = _trl_head.is_top1(hidden, weight, bias, targets, result.logprobs, result.token_entropy)
        return (-result.loss / max(count, 1)).expand(count), result.token_entropy, None, None, top1


def check_trainer(trainer: Any, objective: NLL | GIFT | None) -> None:
    """ValueError for options of the trainer that would have no effect, or another one than they say."""
    args = trainer.args
    if objective is not None:
        if not isinstance(objective, (NLL, GIFT)):
            raise TypeError(f"objective must be an NLL, a GIFT or None, got {type(objective).__name__}")
        if args.loss_type != "nll":
            raise ValueError(
                f"loss_type must be 'nll' with an objective, which takes its place; got {args.loss_type!r}"
            )
    for name, found in (
        ("compute_loss_func", trainer.compute_loss_func),
        ("label_smoothing_factor", args.label_smoothing_factor or None),
    ):
        if found is not None:
            raise ValueError(f"{name} is not supported: TRL computes its loss from logits; got {found!r}")


def base_model_of(trainer: Any, objective: NLL | GIFT | None, given: Any) -> Any:
    """GIFT's base model, ready to run; None without GIFT, and for a PEFT model, which has it inside."""
    if not isinstance(objective, GIFT):
        if given is not None:
            raise ValueError(f"base_model goes with objective = GIFT, got objective = {objective!r}")
        return None
    from trl.trainer.utils import add_fused_lm_head

    if getattr(trainer.accelerator, "parallelism_config", None) is not None:
        raise ValueError("objective = GIFT is not supported with context, sequence or tensor parallelism")
    if given is None:
        if hasattr(trainer.model, "disable_adapter"):
            return None
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError("base_model must be given with GIFT under FSDP or DeepSpeed, which shard the trainer's")
        given = copy.deepcopy(trainer.model)
        given.__dict__.pop("forward", None)  # TRL's patch of the original, which a copy still calls
    elif not hasattr(given, "get_output_embeddings"):
        raise TypeError(f"base_model must be a causal language model of transformers, got {type(given).__name__}")
    elif given is trainer.model:
        raise ValueError("base_model must not be the model in training: leave it None for a frozen copy")
    theirs, ours = (model.get_output_embeddings().weight.shape[0] for model in (given, trainer.model))
    if theirs != ours:
        raise ValueError(f"base_model must have the trainer's vocabulary of {ours} tokens, got {theirs}")
    add_fused_lm_head(given)
    return given.requires_grad_(False).eval().to(trainer.accelerator.device)
