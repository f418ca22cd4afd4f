"""The policy as the loop runs it: from a batch of rows to log-probs, or to the loss with all gradients."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..objectives import HybridObjective, LogitTransform
from ..ops import hybrid_loss_from_hidden, hybrid_loss_from_logits, token_logprobs, token_logprobs_from_hidden
from ..types import Denominators, HybridLoss, TokenBatch
from .rollouts import RolloutBatch, sampled_transform


@dataclass(frozen=True)
class Head:
    """A linear head and what the model does to its logits."""

    scale: float
    softcap: float | None


@torch.no_grad()
def head_of(model: PreTrainedModel) -> Head | None:
    """The model's head, if its logits are a linear layer of its backbone's last hidden state, scaled and soft capped as
    its config says. Believed only after both gave the same on a few tokens; None for any other model."""
    layer, backbone = model.get_output_embeddings(), model.base_model
    if type(layer) is not torch.nn.Linear or backbone is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(float(scale), getattr(config, "final_logit_softcapping", None) or None)
    ids = torch.arange(8, device=model.device)[None] % layer.weight.shape[0]
    hidden = getattr(backbone(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[:2] != ids.shape or hidden.shape[-1] != layer.weight.shape[1]:
        return None
    logits = layer(hidden).float() * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    want = model(input_ids=ids, use_cache=False).logits.float()
    error = 4 * torch.finfo(hidden.dtype).eps * float(want.abs().max())
    return head if logits.shape == want.shape and float((logits - want).abs().max()) <= error else None


class Policy(torch.nn.Module):
    """A causal language model whose forward pass is one of a step.

    The log-probs of old and reference policies come from the same pass as the loss, so that on-policy ratios are
    exactly 1.

    Attributes:
        model: what is trained. head: None where the loss is made of the model's own logits.
        autocast_dtype: what products are computed in where it is not the weights' dtype, in every pass alike.
        synced: whether ranks generate in step, as weights that are spread over them need.
    """

    def __init__(self, model: PreTrainedModel, head: Head | None, autocast_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.model, self.head, self.autocast_dtype, self.synced = model, head, autocast_dtype, False

    def _precision(self) -> torch.autocast:
        """A context of its own for each pass: the casts of the weights that autocast keeps end with it."""
        return torch.autocast(self.model.device.type, self.autocast_dtype, enabled=self.autocast_dtype is not None)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, HybridLoss | None]:
        """See :meth:`_pass`."""
        with self._precision():
            return self._pass(*args, **kwargs)

    def _pass(
        self,
        rows: RolloutBatch,
        temperature: float,
        objective: HybridObjective | None = None,
        mu: float | Tensor = 0.5,
        counts: Denominators | None = None,
        base: dict[str, Tensor | None] | None = None,
    ) -> tuple[Tensor, HybridLoss | None]:
        """The loss and everything with it; without ``objective`` the log-probs, ``(S, T)``, 0 outside the responses.

        ``base``: what ``as_base`` of GIFT's base model gave for the same rows.
        """
        transform = sampled_transform(rows, temperature)
        if self.head is None:
            return self._from_logits(rows, transform, objective, mu, counts, base)
        transform = LogitTransform(transform.temperature, self.head.softcap, self.head.scale)
        layer, hidden = self.model.get_output_embeddings(), self._hidden(rows)
        head: dict[str, Any] = {"bias": layer.bias, "transform": transform}
        if objective is None:
            logprobs = token_logprobs_from_hidden(
                hidden, layer.weight, rows.targets, mask=rows.response_mask, outputs=("logprobs",), **head
            ).logprobs
            assert logprobs is not None
            return logprobs, None
        batch, of_base = _with_base(rows, base)
        result = hybrid_loss_from_hidden(
            hidden, layer.weight, batch, objective, mu, denominators=counts, **head, **of_base
        )
        return result.loss, result

    @torch.no_grad()
    def as_base(self, rows: RolloutBatch, *, whole_logits: bool) -> dict[str, Tensor | None]:
        """What GIFT's loss reads of this model as its base: hidden states and head, or ``whole_logits``.

        A base's head has no scale and no soft cap in the loss; a model with these gives its logits.
        """
        with self._precision():
            if whole_logits or self.head is None or (self.head.scale, self.head.softcap) != (1.0, None):
                return {"base_logits": response_logits(self.model, rows)}
            layer = self.model.get_output_embeddings()
            return {"base_hidden": self._hidden(rows), "base_weight": layer.weight, "base_bias": layer.bias}

    def _hidden(self, rows: RolloutBatch) -> Tensor:
        """``(S, T, H)``: the last hidden states that predict the response tokens."""
        first = rows.prompt_mask.shape[1] - 1  # the last prompt token predicts the first of the response
        states: Tensor = self.model.base_model(**_inputs(rows)).last_hidden_state
        return states[:, first : first + rows.targets.shape[1]]

    def _from_logits(
        self, rows: RolloutBatch, transform: LogitTransform, objective: HybridObjective | None, mu: float | Tensor,
        counts: Denominators | None, base: dict[str, Tensor | None] | None,
    ) -> tuple[Tensor, HybridLoss | None]:  # fmt: skip
        logits = response_logits(self.model, rows)
        if objective is None:
            logprobs = token_logprobs(
                logits, rows.targets, mask=rows.response_mask, transform=transform, outputs=("logprobs",)
            ).logprobs
            assert logprobs is not None
            return logprobs, None
        batch, _ = _with_base(rows, base)
        result = hybrid_loss_from_logits(
            logits, batch, objective, mu, transform=transform, inplace=True, denominators=counts
        )
        return result.loss, result

    def generate(self, *args: Any, **kwargs: Any) -> Tensor:
        """``model.generate``, in step with the other ranks where that is needed."""
        generate: Any = self.model.generate
        with self._precision():
            sequences: Tensor = generate(*args, synced_gpus=self.synced, **kwargs)
        return sequences

    def layers(self) -> Iterable[torch.nn.Module]:
        """The backbone's blocks: what FSDP gathers one at a time."""
        lists = [child for child in self.model.base_model.children() if isinstance(child, torch.nn.ModuleList)]
        return max(lists, key=len, default=torch.nn.ModuleList())


def response_logits(model: PreTrainedModel, rows: RolloutBatch) -> Tensor:
    """``(S, T, V)``: the logits that predict the response tokens, and no others."""
    first, length = rows.prompt_mask.shape[1] - 1, rows.targets.shape[1]
    keep = torch.arange(first, first + length, device=rows.input_ids.device)
    return model(**_inputs(rows), logits_to_keep=keep).logits


def _with_base(rows: RolloutBatch, base: dict[str, Tensor | None] | None) -> tuple[TokenBatch, dict[str, Any]]:
    """The rows as the losses take them, with the base's logits if it came as such; what else came of it."""
    batch, rest = rows.token_batch(), dict(base or {})
    logits = rest.pop("base_logits", None)
    return (batch if logits is None else replace(batch, base_logits=logits)), rest


def _inputs(rows: RolloutBatch) -> dict[str, Any]:
    """Of the backbone. Padding behind a response needs no mask: no live token comes after it."""
    prompt_mask = rows.prompt_mask
    mask = torch.cat([prompt_mask, prompt_mask.new_ones(rows.targets.shape)], dim=1).long()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return {"input_ids": rows.input_ids, "attention_mask": mask, "position_ids": positions, "use_cache": False}
