"""The model that calls a loss function: which one it is, and whether it calls one at all."""

from __future__ import annotations

import inspect
import sys
from types import CodeType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_NAME = "loss_function"
LAYOUT = ("cu_seq_lens_q", "seq_idx", "position_ids")
_FRAMES = 4  # a wrapper or two may stand between


class Call(NamedTuple):
    """What the forward pass that called the loss knows."""

    model: nn.Module | None
    layout: dict[str, Tensor]  # which tokens are whose: those of LAYOUT that were given

    @property
    def in_training(self) -> bool:
        return self.model is None or self.model.training


def calling_forward() -> Call:
    """The module whose method called our caller, and what it was told of its rows.

    Models take ``position_ids`` by name and hand a loss function neither these nor their mode, so both are read where
    they are: in the frame of the forward pass. Nothing is found where torch.compile traces, or without a module.
    """
    if torch.compiler.is_compiling():
        return Call(None, {})
    frame = sys._getframe(2)
    for _ in range(_FRAMES):
        if "self" in frame.f_code.co_varnames:
            local = frame.f_locals
            if isinstance(local.get("self"), nn.Module):
                return Call(local["self"], {k: local[k] for k in LAYOUT if isinstance(local.get(k), Tensor)})
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Call(None, {})


def owner_of(model: nn.Module) -> Any:
    """The model of transformers inside whatever wraps it: PEFT, DistributedDataParallel, torch.compile."""
    from transformers import PreTrainedModel

    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a model of transformers, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            return module
    raise TypeError(f"model must hold a model of transformers, got {type(model).__name__} without one")


def calls_loss_function(kind: type) -> bool:
    """Whether a class of models has code that asks for ``self.loss_function``.

    Some compute a loss of their own: XLNet, Whisper, Bart and its relatives among them.
    """
    from transformers import PreTrainedModel

    ours = [base for base in kind.__mro__ if base is not PreTrainedModel and issubclass(base, PreTrainedModel)]
    functions = [inspect.unwrap(value) for base in ours for value in vars(base).values() if inspect.isfunction(value)]
    return any(_mentions(function.__code__) for function in functions if inspect.isfunction(function))


def _mentions(code: CodeType) -> bool:
    return _NAME in code.co_names or any(_mentions(part) for part in code.co_consts if isinstance(part, CodeType))


def check_calls(model: Any) -> None:
    """ValueError for a model that would not call a loss function, or one that is no causal language model's."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    name = type(model).__name__
    if not calls_loss_function(type(model)):
        raise ValueError(
            f"model must call its loss_function; {name} computes a loss by itself, so that no other would be used: "
            "hand its logits to gac_kernels.hybrid_loss_from_logits"
        )
    kind = getattr(model, "loss_type", None)
    if LOSS_MAPPING.get(kind, ForCausalLMLoss) is not ForCausalLMLoss:
        raise ValueError(
            f"model must be a causal language model, whose labels are shifted; {name} has loss_type {kind!r}"
        )
