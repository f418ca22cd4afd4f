"""From logits on: log-probs, GIFT and the hybrid loss of a batch of logits. The oracle of the row kernels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..objectives import GIFT, HybridObjective, LogitTransform
from ..types import Denominators, HybridLoss, TokenBatch, TokenLogprobs
from .loss import hybrid_loss
from .terms import Segments


def transformed(logits: Tensor, transform: LogitTransform, rows_S: Tensor | None = None) -> Tensor:
    """``scale``, soft cap and temperature, in this order, up to a constant a row, which no softmax notices.

    A temperature per sequence is given per row by the caller. Without a cap the largest logit is taken off first, so
    that large ones keep their digits and never overflow.
    """
    heat = transform.temperature if rows_S is None else rows_S[..., None]
    if transform.softcap is None:
        z = logits - logits.detach().amax(-1, keepdim=True)
        return z * (transform.scale / heat)
    z = logits * transform.scale
    return transform.softcap * torch.tanh(z / transform.softcap) / heat


def token_logprobs(
    logits: Tensor, targets: Tensor, mask: Tensor | None = None, transform: LogitTransform | None = None,
    temperature: Tensor | None = None,
) -> TokenLogprobs:  # fmt: skip
    """Log-prob, entropy and sum of p squared of each row; select before arithmetic, so masked rows hold 0.

    A temperature a sequence goes with the first dimension of ``targets``; ``temperature`` is one a target.
    """
    transform = transform or LogitTransform()
    dtype = torch.promote_types(logits.dtype, torch.float32)
    rows = None if temperature is None else temperature.to(dtype)
    if rows is None and isinstance(transform.temperature, Tensor):
        rows = transform.temperature.to(dtype).view(-1, *(1,) * (targets.ndim - 1)).expand(targets.shape)
    live = targets.ne(-100) if mask is None else mask.bool() & targets.ne(-100)
    z = transformed(torch.where(live[..., None], logits.to(dtype), 0.0), transform, rows)
    logp_V = torch.log_softmax(z, dim=-1)
    p_V = logp_V.exp()
    chosen = logp_V.gather(-1, torch.where(live, targets, 0).long()[..., None]).squeeze(-1)
    entropy = -torch.where(p_V > 0, p_V * torch.where(p_V > 0, logp_V, 0.0), 0.0).sum(-1)
    return TokenLogprobs(
        logprobs=torch.where(live, chosen, 0.0),
        entropy=torch.where(live, entropy, 0.0),
        sum_sq=torch.where(live, p_V.detach().square().sum(-1), 0.0),
    )


def gift_loss(logits: Tensor, base_logits: Tensor, targets: Tensor, objective: GIFT) -> Tensor:
    """``cross entropy(q, softmax(logits))`` with ``q ~ (p0 + floor) exp(beta 1[k = y])`` (arXiv 2601.09233), in log
    space."""
    log_p0 = torch.log_softmax(base_logits.detach(), dim=-1)
    if objective.smooth:
        uniform = math.log(objective.smooth) - math.log(logits.shape[-1])
        kept = log_p0 + (math.log1p(-objective.smooth) if objective.smooth < 1 else -math.inf)
        log_p0 = torch.logaddexp(kept, torch.full_like(log_p0, uniform))
    if objective.floor:
        log_p0 = torch.logaddexp(log_p0, torch.full_like(log_p0, math.log(objective.floor)))
    bump = torch.zeros_like(log_p0).scatter(-1, targets.long()[..., None], objective.beta)
    q = torch.softmax(log_p0 + bump, dim=-1)
    log_p = torch.log_softmax(logits, dim=-1)
    return -(q * torch.where(q > 0, log_p, 0.0)).sum(-1)


def hybrid_loss_from_logits(
    logits: Tensor,
    batch: TokenBatch,
    objective: HybridObjective,
    mu: float | Tensor,
    *,
    transform: LogitTransform | None = None,
    denominators: Denominators | None = None,
) -> HybridLoss:
    """The hybrid loss of ``(*targets.shape, V)`` logits, GIFT included; keeps every intermediate, as eager does."""
    transform = transform or LogitTransform()
    heat = None
    if isinstance(transform.temperature, Tensor):  # one a sequence: give each token its own
        heat = Segments.of(batch).expand(transform.temperature).view(batch.targets.shape)
    out = token_logprobs(logits, batch.targets, batch.mask, transform, heat)
    assert out.logprobs is not None
    supervised_N = None
    if isinstance(objective.supervised, GIFT):
        if batch.base_logits is None:
            raise ValueError("batch.base_logits must be given: GIFT compares with the base model")
        live = batch.mask[..., None]
        z = transformed(torch.where(live, logits, 0.0), transform, heat)
        base = torch.where(live, batch.base_logits.to(z.dtype), 0.0)
        supervised_N = gift_loss(z, base, torch.where(batch.mask, batch.targets, 0), objective.supervised).reshape(-1)
    return hybrid_loss(
        out.logprobs, batch, objective, mu, entropy=out.entropy, sum_sq=out.sum_sq, denominators=denominators,
        supervised_loss_N=supervised_N,
    )  # fmt: skip
