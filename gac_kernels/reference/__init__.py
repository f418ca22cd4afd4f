"""Eager formulas for everything the kernels compute: the oracle, and the backend of every device without kernels.

Each term gives its value, differentiable by autograd, and its slope written out; tests hold one against the other and
both against formulas in plain Python. Works in whatever float dtype comes in (float64 is what tests compare against)
and stands alone: no kernel, no dispatch.
"""

from .logits import gift_loss, hybrid_loss_from_logits, token_logprobs
from .loss import hybrid_loss, token_loss, token_weights
from .rows import Rows, RowTransform, row_gradient, row_statistics, token_slopes
from .terms import gate

__all__ = [
    "RowTransform",
    "Rows",
    "gate",
    "gift_loss",
    "hybrid_loss",
    "hybrid_loss_from_logits",
    "row_gradient",
    "row_statistics",
    "token_logprobs",
    "token_loss",
    "token_slopes",
    "token_weights",
]
