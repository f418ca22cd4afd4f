"""The guided adaptive controller (GAC, arXiv 2605.26184): from the signals of past batches to the mixing weight mu.

    mu* = (alpha D + sigma_r^2) / (D + sigma_s^2 + sigma_r^2)
    e   = beta e + (1 - beta) mu*               smoothing "estimate" (ours), or
    e   = beta mu + (1 - beta) mu*              smoothing "reference" (the published code)
    c   = (1 - lambda) prior(step) + lambda e
    mu  = clip(mu + clip(c - mu, -cap, cap), mu_min, mu_max)

mu* minimises (mu - alpha)^2 D + mu^2 sigma_s^2 + (1 - mu)^2 sigma_r^2, a bound on the error of the mixed gradient.

The state is a handful of float64 tensors on the device, replaced and never written in place. The host knows the number
of the step, and with it when to refresh and where the prior stands; it reads nothing from the device.
"""

from __future__ import annotations

import json
import numbers
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import ConstantPrior, ControllerConfig, CosinePrior, KLTarget
from .distributed import gather_signals, mean_kl, world_size
from .signals import Signals, concatenate, estimate, live_policy_tokens, require_alike

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ConstantPrior", "ControllerConfig", "CosinePrior", "GuidedAdaptiveController", "KLTarget"]

# A signal from here on counts as not finite: mu* adds up three of them, and must not overflow.
LARGEST_SIGNAL = 1e300

# The tensors of a state, by name: shape and dtype.
STATE = {
    "mu": ((), torch.float64),
    "mu_star": ((), torch.float64),
    "estimate": ((), torch.float64),  # e
    "alpha": ((), torch.float64),
    "signals": ((3,), torch.float64),  # EMAs of sigma_s^2, sigma_r^2, Delta^2; 0 until first measured
    "measured": ((3,), torch.bool),
    "skipped": ((), torch.float64),
}
STATE_VERSION = 1

_DEFAULT_CONFIG = ControllerConfig()


class GuidedAdaptiveController:
    """Holds mu and moves it once an optimizer step.

        loss = hybrid_loss(..., mu=controller.mu)      every micro-batch of the step
        controller.observe(loss.signals)
        ...
        controller.step()                              once; controller.mu is now that of the next step

    `mu` for a step thus comes from the signals before it, and does not depend on the batch that it weighs.

    Until each of the three signals has been measured once, the estimate is the current mu, so that only the prior moves
    it. A batch without experts or without RL sequences leaves that branch's signal as it was. A signal that is not
    finite leaves that signal as it was and is counted in `skipped`; so is a KL.

    device: of mu, the state and all observed signals; default torch's default device.
    process_group: ranks that share the controller's state; default the default group, if torch.distributed is
    initialised when step() runs. Every rank must call step() equally often, also one that observed nothing. Ranks
    exchange signals on refresh steps only (plus one small gather of the KL a step under KLTarget). With a group that
    has a CPU backend too ("cpu:gloo,cuda:nccl") no exchange makes the host wait for the device; with "nccl" alone that
    of the row counts does, once a refresh.
    """

    def __init__(
        self,
        config: ControllerConfig = _DEFAULT_CONFIG,
        *,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(config, ControllerConfig):
            raise TypeError(f"config must be a ControllerConfig, got {config!r}")
        self.config = config
        self._group = process_group
        self._target = config.alpha if isinstance(config.alpha, KLTarget) else None
        self._fingerprint = zlib.crc32(json.dumps(config.as_dict(), sort_keys=True).encode())
        state = {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in STATE.items()}
        for name in ("mu", "mu_star", "estimate"):
            state[name].fill_(config.init_mu)
        state["alpha"].fill_(config.alpha.init if isinstance(config.alpha, KLTarget) else config.alpha)
        self._restore(state, 0, state["measured"].all())

    @property
    def mu(self) -> Tensor:
        """The mixing weight, 0-d float32 on the device.

        A new tensor after each step(), never written in place: what a loss or a logger holds keeps its value, and a
        backward that runs after step() sees the mu of its own forward.
        """
        return self._mu

    @property
    def steps(self) -> int:
        """How often step() was called."""
        return self._step

    def observe(self, signals: Signals) -> None:
        """Add a micro-batch's signals to those of the current step. ValueError if the estimator cannot use them."""
        if not isinstance(signals, Signals):
            raise TypeError(f"signals must be Signals, got {type(signals).__name__}")
        if signals.rows.device != self._state["mu"].device:
            raise ValueError(f"signals must lie on {self._state['mu'].device}, got {signals.rows.device}")
        # Only what the estimator reads is kept: micro-batches and ranks may differ in the rest, and it need not travel.
        estimator, rows = self.config.estimator, signals.rows.detach()
        if estimator == "logit":
            if not signals.has_sum_sq:
                raise ValueError("estimator 'logit' needs signals made with sum_sq (sum p^2), got signals without it")
            kept = replace(signals, rows=rows, hidden=None)
        elif estimator == "hidden":
            if signals.hidden is None:
                raise ValueError("estimator 'hidden' needs signals that carry `hidden` (S, H), got signals without it")
            kept = replace(signals, rows=rows, has_sum_sq=False, hidden=signals.hidden.detach())
        else:
            kept = Signals(rows)
        if self._observed:
            require_alike(self._observed[0], kept)
        self._observed.append(kept)

    def step(self, kl: Tensor | float | None = None) -> Tensor:
        """End an optimizer step: take in what was observed (every update_every-th time), move mu, and return it.

        kl: the policy's KL of this step on this rank, 0-d; needed under KLTarget (else ValueError), ignored otherwise.
        Over ranks it is weighted by the observed live RL tokens; pass nan where a rank has none. alpha moves first, so
        that this step's mu* has it. Reads nothing from the device.
        """
        refresh = self._step % self.config.update_every == 0
        with torch.inference_mode(False):  # mu enters autograd graphs, which cannot save an inference tensor
            read = refresh or self._target is not None
            observed = concatenate(self._observed) if self._observed and read else None
            # What can raise or wait comes before the first change of the state.
            if self._target is not None:
                kl_of_all = self._mean_kl(kl, observed)
            if refresh and world_size(self._group) > 1:
                tag = (self._step, self._fingerprint)
                observed = gather_signals(observed, self._group, self._state["mu"].device, tag)
            state, ready = dict(self._state), self._ready
            if self._target is not None:
                _move_alpha(state, self._target, *kl_of_all)
            if refresh and observed is not None:
                self._refresh(state, observed)
                ready = state["measured"].all()
            if read:
                state["mu_star"] = self._optimum(state)
            self._move_mu(state, ready)
            self._restore(state, self._step + 1, ready)
        return self._mu

    def metrics(self) -> dict[str, Tensor]:
        """Copies of the state after the last step(), 0-d on the device: mu in float32, the rest in float64.

        The signals are their EMAs, 0 until first measured; mu_star is the current mu until all are. prior is the value
        that the last step() used; without a prior it is the estimate, which then stands in its place. skipped counts
        values that were not finite.
        """
        state, prior = self._state, self.config.prior
        sigma_s2, sigma_r2, delta2 = state["signals"].clone().unbind()
        if prior is None:
            prior_value = state["estimate"].clone()
        else:
            prior_value = torch.full_like(state["mu"], prior.value(max(self._step - 1, 0)))
        return {
            "gac/mu": self._mu.clone(),
            "gac/mu_star": state["mu_star"].clone(),
            "gac/sigma_s2": sigma_s2,
            "gac/sigma_r2": sigma_r2,
            "gac/delta2": delta2,
            "gac/alpha": state["alpha"].clone(),
            "gac/prior": prior_value,
            "gac/skipped": state["skipped"].clone(),
        }

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step(): copies of the tensors, numbers, and the configuration.

        What was observed since is not part of it, as accumulated gradients are not part of an optimizer's: who resumes
        repeats the step. Loads with torch.load(..., weights_only=True).
        """
        tensors = {name: tensor.clone() for name, tensor in self._state.items()}
        return {"version": STATE_VERSION, "config": self.config.as_dict(), "step": self._step, **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state_dict() bit for bit, and forget what was observed. May read the device.

        ValueError (TypeError for what is no tensor) for unknown or missing keys, another version or configuration,
        shapes, dtypes or values that do not fit. The controller is then as it was.
        """
        expected = {"version", "config", "step", *STATE}
        if missing := sorted(expected - set(state_dict)):
            raise ValueError(f"state_dict lacks {missing}")
        if unknown := sorted(set(state_dict) - expected, key=str):
            raise ValueError(f"state_dict has unknown keys {unknown}")
        if state_dict["version"] != STATE_VERSION:
            raise ValueError(f"state_dict['version'] must be {STATE_VERSION}, got {state_dict['version']!r}")
        ours, theirs = self.config.as_dict(), state_dict["config"]
        if ours != theirs:
            differing = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
            text = ", ".join(f"{k}: {ours.get(k)!r} here, {theirs.get(k)!r} there" for k in differing)
            raise ValueError(f"state_dict['config'] must be this controller's configuration, differs in {text}")
        step = state_dict["step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"state_dict['step'] must be an int of at least 0, got {step!r}")
        state = {name: self._checked(name, state_dict[name]) for name in STATE}
        self._restore(state, step, state["measured"].all())

    def _checked(self, name: str, tensor: object) -> Tensor:
        """A copy on this controller's device of a tensor of a state_dict, or an error that names it."""
        shape, dtype = STATE[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"state_dict[{name!r}] must be a tensor of {shape} {dtype}, got {got}")
        low, high = (self.config.mu_min, self.config.mu_max) if name == "mu" else (0.0, LARGEST_SIGNAL)
        if not ((tensor >= low) & (tensor <= high)).all():  # also nan
            raise ValueError(f"state_dict[{name!r}] must be in [{low:g}, {high:g}], got {tensor.tolist()}")
        return tensor.detach().to(self._state["mu"].device, copy=True)

    def _restore(self, state: dict[str, Tensor], step: int, ready: Tensor) -> None:
        """Make `state` the one after `step` steps. ready: whether all three signals were measured, 0-d bool."""
        self._state, self._step, self._ready = state, step, ready
        self._mu = state["mu"].float()
        self._observed: list[Signals] = []

    def _mean_kl(self, kl: Tensor | float | None, observed: Signals | None) -> tuple[Tensor, Tensor, Tensor]:
        """The KL over all ranks, whether it is finite, and how many ranks' was not: 0-d."""
        device = self._state["mu"].device
        if isinstance(kl, Tensor):
            if kl.dim() != 0 or kl.device != device:
                raise ValueError(f"kl must be 0-d on {device}, got shape {tuple(kl.shape)} on {kl.device}")
            kl = kl.detach().double()
        elif kl is None:
            raise ValueError("step() needs kl under KLTarget, got None")
        elif isinstance(kl, bool) or not isinstance(kl, numbers.Real):
            raise TypeError(f"kl must be a number or a 0-d tensor, got {kl!r}")
        else:
            kl = torch.full((), float(kl), dtype=torch.float64, device=device)
        if world_size(self._group) == 1:
            finite = kl.abs() < torch.inf
            return kl, finite, ~finite
        tokens = torch.zeros_like(kl) if observed is None else live_policy_tokens(observed)
        return mean_kl(kl, tokens, self._group)

    def _refresh(self, state: dict[str, Tensor], observed: Signals) -> None:
        """EMAs of the signals that `observed` can tell and that are finite; a first value is taken as it is."""
        config = self.config
        values, present = estimate(observed, config.estimator, trim=config.trim, znorm=config.znorm)
        usable = present & (values < LARGEST_SIGNAL)  # false for nan
        measured = state["measured"]
        moved = torch.lerp(values, state["signals"], measured.double() * config.ema_beta)
        state["signals"] = torch.where(usable, moved, state["signals"])
        state["measured"] = measured | usable
        state["skipped"] = state["skipped"] + (present & ~usable).sum()

    def _optimum(self, state: dict[str, Tensor]) -> Tensor:
        """mu* of the EMAs; without meaning before all three are there."""
        sigma_s2, sigma_r2, delta2 = state["signals"].unbind()
        noise = sigma_s2 + sigma_r2
        if self.config.disagreement_cap is not None:
            delta2 = torch.minimum(delta2, noise * self.config.disagreement_cap)
        return optimal_mu(sigma_s2, sigma_r2, delta2, state["alpha"])

    def _move_mu(self, state: dict[str, Tensor], ready: Tensor) -> None:
        """Smooth the estimate, blend it with the prior, and move mu towards it."""
        config, mu = self.config, state["mu"]
        mu_star = state["mu_star"] = torch.where(ready, state["mu_star"], mu)
        if config.smoothing == "reference":
            smooth = torch.lerp(mu_star, mu, config.ema_beta)
        else:  # the first mu* is taken as it is
            smooth = torch.where(self._ready, torch.lerp(mu_star, state["estimate"], config.ema_beta), mu_star)
        state["estimate"] = smooth
        blend, offset = 1.0, 0.0
        if config.prior is not None:
            blend, offset = config.blend, (1.0 - config.blend) * config.prior.value(self._step)
        # In place on a fresh tensor: the allocations would cost as much as the arithmetic.
        moved = (smooth * blend).add_(offset).sub_(mu).clamp_(-config.change_cap, config.change_cap).add_(mu)
        state["mu"] = moved.clamp_(config.mu_min, config.mu_max)


def optimal_mu(sigma_s2: Any, sigma_r2: Any, delta2: Any, alpha: Any) -> Any:
    """mu* of the three signals (arXiv 2605.26184), of tensors or numbers; 0 / 0 where all are 0."""
    return (alpha * delta2 + sigma_r2) / (delta2 + (sigma_s2 + sigma_r2))


def _move_alpha(state: dict[str, Tensor], target: KLTarget, kl: Tensor, finite: Tensor, bad: Tensor) -> None:
    """One step of the KL rule; a KL that is not finite is counted and moves nothing."""
    factor = (kl / target.target - 1.0).clamp_(-1.0, 1.0).mul_(target.gain).exp_()
    moved = (state["alpha"] * factor).clamp_(target.low, target.high)
    state["alpha"] = torch.where(finite, moved, state["alpha"])
    state["skipped"] = state["skipped"] + bad
