"""The hybrid loss of ready log-probs, and the controller's signals for trainers that keep a loss of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import eager, library
from ..objectives import CISPO, DFPO, GIFT, SAPO, HybridObjective
from ..schemas import encode
from ..signals import Signals
from ..tensors import FLOATS, plain_tensor
from ..types import Denominators, HybridLoss, TokenBatch
from . import inputs
from .once import scaled


class _TokenLoss(torch.autograd.Function):
    """The token-level loss. Its slope comes out of the forward pass, so that backward is at most a scaling."""

    @staticmethod
    def forward(ctx: Any, logprobs: Tensor, entropy: Tensor | None, args: tuple[Any, ...]) -> tuple[Tensor, ...]:
        # `args` is one tuple: autograd looks at each argument of its own, and none of these has a gradient.
        if isinstance(args[0], TokenBatch):  # a function in Python: eager, on every device
            batch, objective, mu, sum_sq, denominators = args
            outputs = eager.token_loss_of_batch(logprobs, batch, objective, mu, entropy, sum_sq, None, denominators)
        else:
            outputs = library.call("token_loss", logprobs, *args[:9], entropy, *args[9:])
        loss, scalars, rows, logprobs_out, slope, entropy_slope = outputs
        ctx.save_for_backward(slope, entropy_slope, logprobs, entropy)
        ctx.mark_non_differentiable(scalars, rows, logprobs_out)
        ctx.set_materialize_grads(False)
        return loss, scalars, rows, logprobs_out

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        slope, entropy_slope, logprobs, entropy = ctx.saved_tensors
        if grad is None:
            return None, None, None
        to_logprobs = scaled(slope, grad, logprobs) if ctx.needs_input_grad[0] else None
        to_entropy = scaled(entropy_slope, grad, entropy) if ctx.needs_input_grad[1] else None
        return to_logprobs, to_entropy, None


def hybrid_loss(
    logprobs: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    entropy: Tensor | None = None,
    sum_sq: Tensor | None = None,
    denominators: Denominators | None = None,
) -> HybridLoss:
    """The hybrid loss ``(1 - mu) RL + mu SFT`` of ready log-probs, its gradient, signals and metrics in one pass.

    Args:
        logprobs: log-probs of ``batch.targets``, shaped as them. float64 is computed in float64, all else in float32.
        batch: the tokens. Places outside ``batch.mask`` contribute exactly 0 whatever they hold, nan included.
        objective: what to compute. GIFT needs logits: use the loss from logits.
        mu: mixing weight in [0, 1], a number or a 0-d tensor on the device (its value is never read by the host).
        entropy: token entropies in nats, needed where ``objective.entropy_coef`` is not 0; may carry gradient.
        sum_sq: sum over the vocabulary of p squared a token; with it the signals serve the ``logit`` estimator.
        denominators: global counts, for gradient accumulation and data parallelism.

    Returns:
        HybridLoss; its ``loss`` is differentiable once (a second derivative raises RuntimeError). A batch or a branch
        without tokens gives a graph-connected 0.

    Raises:
        TypeError, ValueError: naming the argument, what was expected and what came.
    """
    inputs.check_objective(objective, batch)
    if logprobs is None:
        raise TypeError("logprobs must be a floating point tensor, got None")
    for name, value in (("logprobs", logprobs), ("entropy", entropy), ("sum_sq", sum_sq)):
        inputs.check_tokens(name, value, batch)
    if isinstance(objective.supervised, GIFT):
        raise ValueError("objective.supervised = GIFT needs the logits of two models; log-probs are not enough")
    if objective.entropy_coef and entropy is None:
        raise ValueError(f"entropy must be given: objective.entropy_coef is {objective.entropy_coef:g}")
    norm_length = inputs.norm_length_of(objective, batch)
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    wide, wide_entropy = inputs.plain(logprobs, dtype), inputs.plain_or_none(entropy, dtype)
    mu = inputs.mixing(mu, wide)
    counts = inputs.counts_of(denominators, wide)
    functions = inputs.functions_of(objective, library.forced_backend())
    if functions is not None or batch.token_weights is not None:
        if functions is not None and functions.reads_entropy and entropy is None:
            raise ValueError("entropy must be given: the objective reads t.entropy, which log-probs alone do not hold")
        args = (batch, objective, mu, sum_sq, Denominators(*counts))
    else:
        wide_sum_sq = None if sum_sq is None else inputs.plain(sum_sq.detach(), dtype)
        args = (
            *inputs.batch_args(batch, dtype), wide_sum_sq, None,
            inputs.plain_or_none(batch.groups, torch.int64), mu, *counts,
            *encode(objective, norm_length),
        )  # fmt: skip
    loss, scalars, rows, logprobs_out = _TokenLoss.apply(wide, wide_entropy, args)
    token_entropy = None if entropy is None else torch.where(batch.mask, entropy.detach(), 0.0)
    return assemble(loss, scalars, rows, logprobs_out, token_entropy, batch, objective, sum_sq is not None, norm_length)


def assemble(
    loss: Tensor, scalars: Tensor, rows: Tensor, logprobs: Tensor, token_entropy: Tensor | None,
    batch: TokenBatch, objective: HybridObjective, has_sum_sq: bool, norm_length: float | None,
    hidden_means: Tensor | None = None, replicas: tuple[int, ...] | None = None,
) -> HybridLoss:  # fmt: skip
    """The public result from the operator's."""
    return HybridLoss(
        loss=loss,
        logprobs=logprobs,
        token_entropy=token_entropy,
        signals=Signals(
            rows=rows,
            has_sum_sq=has_sum_sq,
            policy_aggregation=objective.aggregation,
            supervised_aggregation=objective.supervised_aggregation,
            norm_length=norm_length,
            hidden=hidden_means,
            replicas=replicas,
        ),
        scalars=scalars,
        applicable=_metric_names(objective),
        batch=batch.read_by(objective),
    )


def _metric_names(objective: HybridObjective) -> tuple[str, ...]:
    always = ("ratio_mean", "ratio_max", "approx_kl")
    if isinstance(objective.policy, SAPO):
        return *always, "effective_update_ratio"
    if isinstance(objective.policy, DFPO):
        return *always, "cancellation_residual"
    if (term := objective.policy_term) is not None and term.program.clipped is None:
        return always if term.program.update is None else (*always, "effective_update_ratio")
    return *always, "effective_update_ratio", "clip_fraction"


# The paper's coefficients, c_r = -A and c_s = -phi: on-policy, the clipped importance weight is 1.
_PAPER = HybridObjective(CISPO(clip_high=2.0))


@torch.no_grad()
def signals_from_logprobs(
    logprobs: Tensor, batch: TokenBatch, objective: HybridObjective | None = None, *, sum_sq: Tensor | None = None
) -> Signals:
    """What the controller observes, from log-probs alone: for trainers that keep a loss of their own.

    Args:
        logprobs: as in :func:`hybrid_loss`; no gradient flows.
        batch: the tokens.
        objective: whose slopes are the coefficients; None takes the paper's, ``c_r = -A`` and ``c_s = -phi``
            (GAC, arXiv 2605.26184).
        sum_sq: sum of p squared a token, needed by the ``logit`` estimator.
    """
    inputs.check_batch(batch)
    plain_tensor("logprobs", logprobs, FLOATS)
    if objective is None:
        objective, batch = (
            _PAPER,
            replace(batch, old_logprobs=None, ref_logprobs=None, rollout_weights=None, token_weights=None),
        )
    elif isinstance(objective, HybridObjective) and objective.entropy_coef:
        objective = replace(objective, entropy_coef=0.0)  # its gradient is no slope on logp and needs the entropies
    return hybrid_loss(logprobs.detach(), batch, objective, 0.5, sum_sq=sum_sq).signals
