"""A gradient made by the forward pass: handed on once, scaled in place, and never differentiated again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import library


class _FirstOrderOnly(torch.autograd.Function):
    """``value``, tied to ``anchors`` by a node that refuses to be differentiated: the gradient is a constant here, so a
    second derivative through it would be silently wrong."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *anchors: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("gac_kernels losses have no second derivative: the forward pass made the gradient")


def first_order_only(value: Tensor, *anchors: Tensor | None) -> Tensor:
    """``value`` as a backward may return it; the guard is needed under ``create_graph`` only."""
    return _FirstOrderOnly.apply(value, *anchors) if torch.is_grad_enabled() else value


def scaled(gradient: Tensor, upstream: Tensor, anchor: Tensor) -> Tensor:
    """``gradient * upstream`` in a backward. Where autograd is about to drop the graph, and the buffer with it, the
    buffer itself is scaled and handed on: nothing is written where ``upstream`` is 1, and the host reads nothing.
    """
    if torch.is_grad_enabled():  # create_graph
        with torch.no_grad():
            value = gradient * upstream
        return _FirstOrderOnly.apply(value, anchor, upstream)
    if torch.compiler.is_compiling() or torch._C._autograd._get_current_graph_task_keep_graph():
        return gradient * upstream
    library.call("scale_", gradient, upstream)
    return gradient
