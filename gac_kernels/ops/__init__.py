"""The public losses: checks, one autograd Function each, and the composition of the operators."""

from .hidden import hybrid_loss_from_hidden, token_logprobs_from_hidden
from .logits import hybrid_loss_from_logits, token_logprobs
from .token import hybrid_loss, signals_from_logprobs

__all__ = [
    "hybrid_loss",
    "hybrid_loss_from_hidden",
    "hybrid_loss_from_logits",
    "signals_from_logprobs",
    "token_logprobs",
    "token_logprobs_from_hidden",
]
