"""Terms of any objective: those written out in ``terms.py``, and those that are functions of a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..objectives import HybridObjective, PolicyObjective, SupervisedObjective
from ..objectives.eager import TensorToken, eager_loss
from ..objectives.term import Term
from . import terms
from .terms import Tokens, log_ratio


def _evaluated(
    objective: PolicyObjective | SupervisedObjective, term: Term, logp_N: Tensor, tokens: Tokens, counts_N: Tensor,
    factor_N: Tensor | None, entropy_N: Tensor | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:  # fmt: skip
    """Loss, slope, and what the metrics count. The loss carries autograd's graph where ``logp_N`` does: then the
    function itself is run on tensors."""
    values = {
        "old_logp": tokens.old_N,
        "ref_logp": tokens.ref_N,
        "advantage": tokens.advantages_N,
        "entropy": entropy_N,
    }
    segments = tokens.segments

    def total(x_N: Tensor) -> Tensor:
        return segments.expand(segments.sum(x_N))

    loss_N, slope_N, seen = term(logp_N, values, counts_N, total, factor_N)
    if logp_N.requires_grad and torch.is_grad_enabled():
        loss_N = eager_loss(objective, TensorToken(logp_N, values, counts_N, total))
        loss_N = loss_N if factor_N is None else factor_N * loss_N
    return loss_N, slope_N, seen


def policy_terms(
    logp_N: Tensor, tokens: Tokens, objective: HybridObjective, entropy_N: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """:func:`terms.policy_terms` of any policy objective."""
    if objective.policy_term is None:
        return terms.policy_terms(logp_N, tokens, objective)
    assert isinstance(objective.policy, PolicyObjective)
    logp_N = torch.where(tokens.policy_N, logp_N, 0.0)
    value_N, slope_N, seen = _evaluated(
        objective.policy, objective.policy_term, logp_N, tokens, tokens.policy_N, tokens.rollout_N, entropy_N
    )
    log_ratio_N = log_ratio(logp_N.detach(), tokens.old_N)[0]
    return value_N, slope_N, {"log_ratio": log_ratio_N, "ratio": log_ratio_N.exp(), **seen}


def supervised_terms(
    logp_N: Tensor, tokens: Tokens, objective: HybridObjective, entropy_N: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value and slope ``c_s`` of each token's supervised term; of rollouts too, whose ``c_s`` the signals compare."""
    if objective.supervised_term is None:
        slope_N = terms.supervised_slope(logp_N, objective)
        return slope_N * torch.where(slope_N == 0, 0.0, logp_N), slope_N  # phi logp is 0 at p = 0, never nan
    assert isinstance(objective.supervised, SupervisedObjective)
    value_N, slope_N, _ = _evaluated(
        objective.supervised, objective.supervised_term, logp_N, tokens, tokens.live_N, None, entropy_N
    )
    return value_N, slope_N
