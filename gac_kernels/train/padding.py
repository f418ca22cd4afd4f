"""Whether a model is the same behind padding on the left, as rollouts of unequal prompts need."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import PreTrainedModel

from .directory import refused

_PADS, _TOKENS = 3, 6


@torch.no_grad()
def check_padding(directory: Path, model: PreTrainedModel, pad_id: int) -> None:
    """Raise ValueError where padding on the left changes a row's log-probs, or where they are not finite.

    Recurrent models that ignore the attention mask (RWKV) read padding as text: their log-probs move by whole nats. A
    few tokens through the model, alone and padded, show it whatever the model is called.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
    count = max(1, min(_TOKENS, positions))
    ids = (torch.arange(1, count + 1) * max(1, rows // (count + 1)) % rows)[None].to(model.device)
    padded = torch.cat([ids.new_full((1, _PADS), pad_id), ids], dim=1)
    mask = torch.cat([torch.zeros_like(ids[:, :1]).expand(1, _PADS), torch.ones_like(ids)], dim=1)
    alone = _logprobs(model, ids, torch.ones_like(ids))
    behind = _logprobs(model, padded, mask)[:, _PADS:]
    if not bool(alone.isfinite().all()):
        raise refused(directory / "config.json", "the model's log-probs are not finite: its weights are damaged")
    moved = float((behind - alone).abs().amax().nan_to_num(torch.inf))
    # Two sums in another order: some units in the last place of the largest logit. Padding that is read moves them by
    # tenths of a nat and more.
    allowed = 1e-2 + 4 * torch.finfo(model.dtype).eps * float(alone.abs().amax())
    if moved > allowed:
        raise refused(
            directory / "config.json",
            f"{type(model).__name__} reads padding on the left as text (log-probs move by {moved:.2g} nats); prompts "
            "of unequal length could not be rolled out together",
        )


def _logprobs(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """``(1, T, V)`` in float32, of a forward pass as the loop makes it."""
    places = (mask.cumsum(dim=1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
    return logits.float().log_softmax(-1)
