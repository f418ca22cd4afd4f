"""The estimators on sequences that the oracle has not seen, and on the same ones with their coefficients falsified.

Each branch is passed through on its own, step by step of fresh sequences, in every condition of the oracle; a point's
signals are those of its two conditions put one below the other, as micro-batches are. Falsified are

* the advantages: dealt out anew among the rollouts of all conditions and steps at these weights;
* phi and the log-prob that it comes from: likewise, among the tokens of the demonstrations;
* both at once;
* all of them: constant, advantage, phi and a token's NLL 1.

So what tells one condition from another by these numbers is gone, and no more: lengths, 1 - 2 p + sum p^2 (``logit``)
and the gradient's direction (``hidden``) stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..config import ControllerConfig
from ..objectives import GRPO, NLL, HybridObjective
from ..signals import (
    ADVANTAGE,
    CR,
    CR2,
    CS,
    CS2,
    CSCR,
    DIFF_NORM,
    DISAGREEMENT,
    EXPERT,
    NLL_SUM,
    OWN_NORM,
    TOKENS,
    Signals,
    concatenate,
    estimate,
)
from .oracle import Oracle, optimum
from .rollouts import RolloutBatch

CAP = 0.5  # disagreement_cap of "logit-capped"
ESTIMATORS = {
    "coefficient": ControllerConfig(),
    "coefficient-znorm": ControllerConfig(znorm=True),
    "logit": ControllerConfig(estimator="logit"),
    "logit-capped": ControllerConfig(estimator="logit", disagreement_cap=CAP),
    "hidden": ControllerConfig(estimator="hidden"),
}
# kind -> the passes that it is made of: (demonstrations, rollouts)
KINDS = {
    "ordinary": ("ordinary", "ordinary"),
    "advantages": ("ordinary", "shuffled"),
    "phi": ("shuffled", "ordinary"),
    "both": ("shuffled", "shuffled"),
    "constant": ("constant", "constant"),
}
Steps = list[Signals]  # of one condition


def fresh_signals(oracle: Oracle, groups: int) -> dict[str, dict[tuple[int, int], Steps]]:
    """kind -> (exchanged, inverted) -> signals of ``groups`` steps' sequences, from the estimators' share."""
    config = oracle.trainer.config
    drawn = oracle.draw(2, groups * config.prompts_per_step, groups * config.demonstrations_per_step)
    supervised = _supervised(oracle, [oracle.supervised_batches(drawn, share, groups) for share in oracle.exchanged])
    policy = _policy(oracle, [oracle.policy_batches(drawn, share, groups) for share in oracle.inverted])
    return {
        kind: {
            (i, j): [concatenate(both) for both in zip(rollouts, shown, strict=True)]
            for i, shown in enumerate(supervised[of_supervised])
            for j, rollouts in enumerate(policy[of_policy])
        }
        for kind, (of_supervised, of_policy) in KINDS.items()
    }


def estimates(steps: Sequence[Signals]) -> dict[str, list[float]]:
    """The three signals by every estimator that the passes can feed (``hidden`` needs a head that is understood), means
    over the steps as the controller's averages are; and mu* of these means."""
    found = {}
    for name, config in ESTIMATORS.items():
        if config.estimator == "hidden" and steps[0].hidden is None:
            continue
        values_G3 = []
        for signals in steps:
            values, present = estimate(signals, config.estimator, trim=config.trim, znorm=config.znorm)
            values_G3.append(torch.where(present, values, torch.nan).tolist())
        signals_3 = np.mean(values_G3, axis=0).tolist()
        found[name] = [*signals_3, optimum(signals_3, cap=config.disagreement_cap)]
    return found


def _policy(oracle: Oracle, conditions: list[list[RolloutBatch]]) -> dict[str, list[Steps]]:
    """Passes over the rollouts: pass -> condition -> steps."""
    objective = oracle.trainer.config.objective
    advantages = [rows.advantages for steps in conditions for rows in steps]
    dealt = iter(oracle.shuffle(torch.cat(advantages)).split([len(a) for a in advantages]))
    shuffled = [[replace(rows, advantages=next(dealt)) for rows in steps] for steps in conditions]
    ones = [replace(rows, advantages=torch.ones_like(rows.advantages)) for rows in conditions[0]]
    constant = [_pass(oracle, rows, replace(objective, supervised=NLL("none"))) for rows in ones]
    return {
        "ordinary": [[_pass(oracle, rows, objective) for rows in steps] for steps in conditions],
        "shuffled": [[_pass(oracle, rows, objective) for rows in steps] for steps in shuffled],
        "constant": [constant] * len(conditions),  # the conditions differ in nothing but advantages
    }


def _supervised(oracle: Oracle, conditions: list[list[RolloutBatch]]) -> dict[str, list[Steps]]:
    """Passes over the demonstrations: pass -> condition -> steps."""
    objective = oracle.trainer.config.objective
    ordinary = [[_pass(oracle, rows, objective) for rows in steps] for steps in conditions]
    logprobs = [_logprobs(oracle, rows) for steps in conditions for rows in steps]
    dealt = iter(oracle.shuffle(torch.cat(logprobs)).split([len(values) for values in logprobs]))
    return {
        "ordinary": ordinary,
        "shuffled": [[_with_logprobs(oracle, rows, next(dealt)) for rows in steps] for steps in conditions],
        "constant": [[_constant(oracle, rows) for rows in steps] for steps in conditions],
    }


def _pass(oracle: Oracle, rows: RolloutBatch, objective: HybridObjective) -> Signals:
    """Signals of the ordinary pass, without its graph."""
    _, result = oracle.trainer.policy(rows, 1.0, objective, 0.5)
    signals = result.signals
    hidden = None if signals.hidden is None else signals.hidden.detach()
    return replace(signals, rows=signals.rows.detach(), hidden=hidden)


def _logprobs(oracle: Oracle, rows: RolloutBatch) -> Tensor:
    """Of all live tokens, in order."""
    with torch.no_grad():
        logprobs, _ = oracle.trainer.policy(rows, 1.0)
    return logprobs[rows.response_mask]


def _constant(oracle: Oracle, rows: RolloutBatch) -> Signals:
    signals = _pass(oracle, rows, replace(oracle.trainer.config.objective, supervised=NLL("none")))
    table = signals.rows.clone()
    table[:, NLL_SUM] = table[:, TOKENS]
    return replace(signals, rows=table)


def _with_logprobs(oracle: Oracle, rows: RolloutBatch, logprobs: Tensor) -> Signals:
    """Signals of demonstrations whose tokens' coefficients and NLL come from these log-probs, one a live token.

    They are run as rollouts, whose coefficient at a ratio of 1 is -advantage and can be given a token; the columns are
    then put where a demonstration has them.
    """
    objective = oracle.trainer.config.objective
    nll_ST = torch.zeros(rows.targets.shape, dtype=logprobs.dtype, device=logprobs.device)
    nll_ST[rows.response_mask] = -logprobs
    p_ST = torch.exp(-nll_ST)
    weighted = isinstance(objective.supervised, NLL) and objective.supervised.weight == "phi"
    phi_ST = p_ST * (1.0 - p_ST) if weighted else torch.ones_like(p_ST)
    as_rollouts = replace(rows, advantages=phi_ST, is_expert=torch.zeros_like(rows.is_expert))
    signals = _pass(oracle, as_rollouts, replace(objective, policy=GRPO()))
    columns = list(signals.rows.unbind(1))
    columns[EXPERT], columns[NLL_SUM] = torch.ones_like(columns[EXPERT]), nll_ST.sum(1).to(columns[NLL_SUM].dtype)
    columns[CS], columns[CS2] = columns[CR], columns[CR2]
    columns[DISAGREEMENT], columns[DIFF_NORM] = columns[CR2], columns[OWN_NORM]
    columns[ADVANTAGE] = columns[CR] = columns[CR2] = columns[CSCR] = torch.zeros_like(columns[EXPERT])
    return replace(signals, rows=torch.stack(columns, dim=1))
