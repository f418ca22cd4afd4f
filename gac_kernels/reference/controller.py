"""The controller's step in plain torch, on any device: nothing is read by the host, masks stand where one would branch.

    mu* = (alpha D + sigma_r^2) / (D + sigma_s^2 + sigma_r^2)
    e   = beta e + (1 - beta) mu*               smoothing "estimate" (ours), or
    e   = clip(beta mu + (1 - beta) mu*, mu_min, mu_max)    smoothing "reference" (the published code)
    c   = (1 - lambda) prior(step) + lambda e
    mu  = clip(mu + clip(c - mu, -cap, cap), mu_min, mu_max)

mu* minimises (mu - alpha)^2 D + mu^2 sigma_s^2 + (1 - mu)^2 sigma_r^2, a bound on the error of the mixed gradient (GAC,
arXiv 2605.26184).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import ControllerConfig, CosinePrior, KLTarget
from ..controller_schema import (
    ALPHA,
    ESTIMATE,
    LARGEST_SIGNAL,
    MEASURED,
    MU,
    MU_STAR,
    PRIOR,
    SIGNALS,
    SKIPPED,
    STEPS,
    decode_config,
    narrowed_mu,
)
from ..signals import AGGREGATIONS, Signals, estimate


def controller_step(
    state: Tensor, rows: Tensor | None, hidden: Tensor | None, given: Tensor | None, kl: Tensor | None, *static: Any
) -> tuple[Tensor, Tensor]:
    """The operator of this name: schema and shapes stand in controller_schema.py."""
    *numbers, policy_aggregation, supervised_aggregation, norm_length = static
    config = decode_config(*numbers)
    old = State.of(state)
    new = replace(old, steps=old.steps + 1.0)
    if isinstance(config.alpha, KLTarget):
        if kl is None:
            raise ValueError("controller_step: kl must be given with kl_target, got None")
        new = _move_alpha(new, config.alpha, kl)
    if rows is not None:
        ways = AGGREGATIONS[policy_aggregation], AGGREGATIONS[supervised_aggregation], norm_length or None
        seen = Signals(rows, True, *ways, hidden=hidden)
        found = estimate(seen, config.estimator, trim=config.trim, znorm=config.znorm)
        new = _take_in(new, *found, old.steps, config)
    elif given is not None:
        new = _take_in(new, given[:3], given[3:] != 0, old.steps, config)
    if new.alpha is not old.alpha or new.signals is not old.signals:
        new = replace(new, mu_star=_optimum(new, config))
    new = _move_mu(new, old, config)
    return new.packed(), narrowed_mu(config, new.mu)


@dataclass(frozen=True)
class State:
    """The numbers of a state by name, 0-d or (3,), float64."""

    mu: Tensor
    mu_star: Tensor
    estimate: Tensor
    alpha: Tensor
    signals: Tensor
    measured: Tensor
    skipped: Tensor
    steps: Tensor
    prior: Tensor

    @staticmethod
    def of(state: Tensor) -> State:
        numbers = state.unbind()
        first = numbers[MU], numbers[MU_STAR], numbers[ESTIMATE], numbers[ALPHA]
        return State(*first, state[SIGNALS], state[MEASURED], numbers[SKIPPED], numbers[STEPS], numbers[PRIOR])

    def packed(self) -> Tensor:
        first = torch.stack((self.mu, self.mu_star, self.estimate, self.alpha))
        return torch.cat((first, self.signals, self.measured, torch.stack((self.skipped, self.steps, self.prior))))


def optimal_mu(sigma_s2: Any, sigma_r2: Any, delta2: Any, alpha: Any) -> Any:
    """mu* of the three signals (arXiv 2605.26184), of tensors or numbers; 0 / 0 where all are 0."""
    return (alpha * delta2 + sigma_r2) / (delta2 + (sigma_s2 + sigma_r2))


def prior_of(config: ControllerConfig, step: Tensor) -> Tensor:
    """``config.prior.value(step)`` for a step on the device."""
    if not isinstance(config.prior, CosinePrior):
        assert config.prior is not None
        return torch.full_like(step, config.prior.mu)
    warmup, decay, peak, valley = (getattr(config.prior, name) for name in ("warmup", "decay", "peak", "valley"))
    # Few operators, in place: on a device each is a launch. Behind the decay the angle is pi, whose cosine is -1.
    if decay:
        angle = (step - warmup).mul_(math.pi / decay).clamp_(max=math.pi)
        falling = angle.cos_().add_(1.0).mul_(0.5 * (peak - valley)).add_(valley)
    else:
        falling = torch.full_like(step, valley)
    return torch.where(step < warmup, step * (peak / warmup), falling) if warmup else falling


def _move_alpha(state: State, target: KLTarget, kl: Tensor) -> State:
    """One step of the KL rule; a KL that is not finite is counted and moves nothing. One below 0, which sampled
    log-ratios (k1) can be, moves alpha as 0 does."""
    if kl.numel() == 3:
        mean, bad = kl[0], kl[2]
        finite = (kl[1] != 0) & (mean.abs() < torch.inf)
    else:
        mean = kl.reshape(())
        finite = mean.abs() < torch.inf
        bad = ~finite
    factor = ((mean / target.target - 1.0).clamp_(-1.0, 1.0) * target.gain).exp_()
    moved = (state.alpha * factor).clamp_(target.low, target.high)
    return replace(state, alpha=torch.where(finite, moved, state.alpha), skipped=state.skipped + bad)


def _take_in(state: State, values: Tensor, present: Tensor, step: Tensor, config: ControllerConfig) -> State:
    """On a step that refreshes: EMAs of the signals that are present, finite and not negative; a first value is taken
    as it is."""
    present = present & (step.remainder(config.update_every) == 0)
    usable = present & (values >= 0) & (values < LARGEST_SIGNAL)  # false for nan
    moved = torch.lerp(values, state.signals, state.measured * config.ema_beta)
    return replace(
        state,
        signals=torch.where(usable, moved, state.signals),
        measured=torch.where(usable, 1.0, state.measured),
        skipped=state.skipped + (present & ~usable).sum(),
    )


def _optimum(state: State, config: ControllerConfig) -> Tensor:
    """mu* of the EMAs; without meaning before all three are there."""
    sigma_s2, sigma_r2, delta2 = state.signals.unbind()
    if config.disagreement_cap is not None:
        delta2 = torch.minimum(delta2, (sigma_s2 + sigma_r2) * config.disagreement_cap)
    return optimal_mu(sigma_s2, sigma_r2, delta2, state.alpha)


def _move_mu(new: State, old: State, config: ControllerConfig) -> State:
    """Smooth mu*, blend it with the prior, and move mu towards it; mu itself stands in for mu* until all three signals
    were measured."""
    mu, was_ready = old.mu, old.measured.all()
    ready = was_ready if new.measured is old.measured else new.measured.all()
    mu_star = torch.where(ready, new.mu_star, mu)
    if config.smoothing == "reference":
        smooth = torch.lerp(mu_star, mu, config.ema_beta).clamp_(config.mu_min, config.mu_max)
    else:  # the first mu* is taken as it is
        smooth = torch.where(was_ready, torch.lerp(mu_star, old.estimate, config.ema_beta), mu_star)
    prior = target = smooth
    if config.prior is not None:
        prior = prior_of(config, old.steps)
        target = torch.add(smooth * config.blend, prior, alpha=1.0 - config.blend)
    moved = (target - mu).clamp_(-config.change_cap, config.change_cap).add_(mu)
    return replace(new, mu=moved.clamp_(config.mu_min, config.mu_max), mu_star=mu_star, estimate=smooth, prior=prior)
