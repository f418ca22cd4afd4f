"""The loss from float16 logits, whose gradient is made in backward: only there is the loss scale known.

A gradient that the forward made would be divided by the step's counts and rounded to float16, which ends at 6e-8,
before a loss scale arrives. Here the forward reads the logits, and backward writes ``upstream * gradient``, made in
float32 and rounded once. Under a loss scale that is less traffic than a gradient made in the forward and then scaled.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import library
from .once import first_order_only
from .plan import LossPlan


class LateGradientLoss(torch.autograd.Function):
    """As ``_LogitsLoss``, but for when the gradient is made. In place the logits keep their values until then."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, base_logits: Tensor | None, plan: LossPlan, inplace: bool
    ) -> tuple[Tensor, ...]:
        kind, *_ = plan.token_weights()
        rows = (plan.targets, kind, plan.temperature, base_logits)
        logprobs, entropy, sum_sq, normalizer, supervised = library.call("row_statistics", logits, *rows, *plan.static)
        gift = None if base_logits is None else supervised
        loss, scalars, signals, _, slope, bonus = plan.token_loss(logprobs, entropy, sum_sq, gift)
        ctx.inplace, ctx.spent, ctx.static = inplace, False, plan.static
        slopes = slope.view(-1), bonus.view(-1) if plan.has_bonus else None
        ctx.save_for_backward(logits, *rows, normalizer, entropy, *slopes)
        results = loss, scalars, signals, logprobs, entropy
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        nothing = (None,) * 3
        if grad is None or not ctx.needs_input_grad[0]:
            return None, *nothing
        if ctx.spent:  # before the saved tensors are asked for, whose own complaint would not say what to do
            raise RuntimeError(
                "second backward through a loss whose gradient was written over the logits and handed on: "
                "call hybrid_loss_from_logits with inplace=False to keep it"
            )
        logits, *rows, slope, bonus = ctx.saved_tensors
        with torch.no_grad():
            slopes = slope * grad, None if bonus is None else bonus * grad
            if ctx.inplace:
                ctx.spent = True
                library.call("row_gradient_", logits, *rows, *slopes, *ctx.static)
                # Whoever saved the logits for a backward of their own must learn that they are gone.
                torch.autograd.graph.increment_version(logits)
                gradient = logits.detach()
            else:
                gradient = library.call("row_gradient", logits, *rows, *slopes, *ctx.static)
        return first_order_only(gradient, logits, grad), *nothing
