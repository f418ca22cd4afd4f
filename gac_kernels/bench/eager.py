"""The losses by hand: what one would write in PyTorch to have the same numbers, and to have them fast.

They are the baselines of the benchmark, so they take what can be taken without a kernel: one log-softmax serves all,
constants of a sequence stay out of the token arithmetic, intermediates are shared between loss, signals and metrics,
the signals' slopes are written down instead of asked of autograd, and nothing is read by the host. They are no part of
the package's results.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..objectives import SAPO

_SAPO = SAPO()


def logits_loss(logits: Tensor, targets: Tensor, *rest: Any, everything: bool) -> tuple[Tensor, ...]:
    """The same from ``(S, T, V)`` logits and ``(S, T)`` targets; ``rest`` as in :func:`token_loss` from ``mask`` on.

    Of what gives log-probs, log_softmax and gather was the fastest with its backward on a CPU: cross_entropy takes as
    long, logsumexp up to four times as long.

    Returns:
        What :func:`token_loss` returns, and with ``everything`` the entropy ``(S, T)`` with 0 where masked.
    """
    logp_V = torch.log_softmax(logits, -1, dtype=torch.promote_types(logits.dtype, torch.float32))
    logp = logp_V.gather(-1, targets[..., None]).squeeze(-1)
    if not everything:
        return token_loss(logp, *rest, everything=False)
    with torch.no_grad():
        p_V = logp_V.exp()
        sum_sq = torch.linalg.vector_norm(p_V, dim=-1).square()  # one pass, where square and sum take two
        entropy = torch.where(rest[0], -p_V.mul_(logp_V).sum(-1), 0.0)
    return *token_loss(logp, *rest, everything=True, sum_sq=sum_sq), entropy


def hidden_loss(hidden: Tensor, weight: Tensor, targets: Tensor, *rest: Any, everything: bool) -> tuple[Tensor, ...]:
    """:func:`logits_loss` from hidden states ``(S, T, H)`` and a head ``(V, H)``: all logits at once."""
    return logits_loss(hidden @ weight.t(), targets, *rest, everything=everything)


def plain_logits_loss(logits: Tensor, targets: Tensor, *rest: Any, everything: bool) -> tuple[Tensor, ...]:
    """:func:`logits_loss` as it is mostly written: log-probs, entropy and sum of p squared each from the logits, by the
    functions of the same name, under autograd. Computes everything, asked or not."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logp = torch.log_softmax(wide, -1).gather(-1, targets[..., None]).squeeze(-1)
    p_V = torch.softmax(wide, -1)
    entropy = -(p_V * torch.log_softmax(wide, -1)).sum(-1)
    sum_sq = p_V.square().sum(-1).detach()
    everything_else = token_loss(logp, *rest, everything=True, sum_sq=sum_sq)
    return *everything_else, torch.where(rest[0], entropy.detach(), 0.0)


def token_loss(
    logprobs: Tensor,
    mask: Tensor,
    is_expert: Tensor,
    advantages: Tensor,
    old_logprobs: Tensor,
    mu: Tensor,
    *,
    everything: bool,
    sum_sq: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """SAPO (seq-mean-token-mean) and NLL with phi (token-mean) of a padded batch.

    Args:
        logprobs, old_logprobs: ``(S, T)`` float. mask: ``(S, T)`` bool. is_expert: ``(S,)`` bool. advantages: ``(S,)``.
        mu: 0-d. everything: also the signals and metrics, else the loss alone. sum_sq: ``(S, T)``, for the signals.

    Returns:
        loss; with ``everything`` also logprobs ``(S, T)`` with 0 where masked, signal rows ``(S, 12)`` in the order of
        ``signals``, and the metrics ratio_mean, ratio_max, approx_kl, effective_update_ratio.
    """
    expert, policy = mask & is_expert[:, None], mask & ~is_expert[:, None]
    logp = torch.where(mask, logprobs.float() if logprobs.dtype.itemsize < 4 else logprobs, 0.0)
    advantages = advantages.to(logp.dtype)
    old = torch.where(policy, old_logprobs.to(logp.dtype), logp.detach())  # a ratio of 1 outside the policy branch
    log_ratio = (logp - old).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    tau_S = torch.where(advantages > 0, advantages.new_full((), _SAPO.tau_pos), _SAPO.tau_neg)
    gate = torch.sigmoid(tau_S[:, None] * (ratio - 1.0))

    tokens_S = mask.sum(-1)
    policy_S = ~is_expert & (tokens_S > 0)
    policy_rows = policy_S.sum().clamp(min=1)
    scale_S = torch.where(policy_S, -4.0 * advantages / (tau_S * tokens_S.clamp(min=1)), 0.0)
    policy_loss = (torch.where(policy, gate, 0.0).sum(-1) * scale_S).sum() / policy_rows

    p = logp.detach().exp()
    phi = p - p * p  # 0 where masked, p being 1 there
    supervised_loss = -(torch.where(expert, phi, 0.0) * logp).sum() / expert.sum().clamp(min=1)
    loss = (1.0 - mu) * policy_loss + mu * supervised_loss
    if not everything:
        return (loss,)

    return loss, logp.detach(), *_by_products(logp, log_ratio, ratio, gate, phi, mask, is_expert, advantages, sum_sq)


@torch.no_grad()
def _by_products(
    logp: Tensor,
    log_ratio: Tensor,
    ratio: Tensor,
    gate: Tensor,
    phi: Tensor,
    mask: Tensor,
    is_expert: Tensor,
    advantages: Tensor,
    sum_sq: Tensor | None,
) -> tuple[Tensor, ...]:
    """Signal rows and the four metrics, from what the loss has computed already."""
    policy, tokens_S = mask & ~is_expert[:, None], mask.sum(-1)
    update = torch.where(policy, 4.0 * gate * (1.0 - gate), 0.0)  # f'(r)
    cr, cs = -advantages[:, None] * update * ratio, -phi
    difference = cs - cr
    norms: tuple[Tensor, ...] = (torch.zeros_like(advantages),) * 2
    if sum_sq is not None:
        n = torch.where(mask, 1.0 - 2.0 * logp.exp() + sum_sq, 0.0)
        norms = (torch.where(policy, cr, cs).square() * n).sum(-1), (difference.square() * n).sum(-1)
    rows = torch.stack(
        [
            (is_expert & (tokens_S > 0)).to(logp.dtype),
            tokens_S.to(logp.dtype),
            -logp.sum(-1),
            torch.where(~is_expert & (tokens_S > 0), advantages, 0.0),
            difference.square().sum(-1),
            cs.sum(-1),
            cr.sum(-1),
            cs.square().sum(-1),
            cr.square().sum(-1),
            (cs * cr).sum(-1),
            *norms,
        ],
        dim=-1,
    )
    count = policy.sum().clamp(min=1)
    live_ratio = torch.where(policy, ratio, 0.0)
    return (
        rows,
        live_ratio.sum() / count,
        live_ratio.amax(),
        (ratio - 1.0 - log_ratio).sum() / count,
        update.sum() / count,
    )
