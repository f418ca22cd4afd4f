"""The guided adaptive controller (GAC, arXiv 2605.26184): from the signals of past batches to the mixing weight mu.

    mu* = (alpha D + sigma_r^2) / (D + sigma_s^2 + sigma_r^2)
    e   = beta e + (1 - beta) mu*               smoothing "estimate" (ours), or
    e   = beta mu + (1 - beta) mu*              smoothing "reference" (the published code)
    c   = (1 - lambda) prior(step) + lambda e
    mu  = clip(mu + clip(c - mu, -cap, cap), mu_min, mu_max)

mu* minimises (mu - alpha)^2 D + mu^2 sigma_s^2 + (1 - mu)^2 sigma_r^2, a bound on the error of the mixed gradient.

The state is one float64 tensor on the device, replaced and never written in place; one operator, `controller_step`,
makes the next (gac_kernels/controller_schema.py). The host knows the number of the step, and with it when ranks must
exchange their signals; it reads nothing from the device.
"""

from __future__ import annotations

import json
import numbers
import warnings
import zlib
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import controller_schema as schema
from .config import ConstantPrior, ControllerConfig, CosinePrior, KLTarget
from .distributed import check_group, gather_signals, mean_kl, world_size
from .library import call
from .reference.controller import optimal_mu
from .signals import Signals, concatenate, estimate, live_policy_tokens, require_alike
from .tensors import NUMBERS, plain_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ConstantPrior", "ControllerConfig", "CosinePrior", "GuidedAdaptiveController", "KLTarget", "optimal_mu"]

# The tensors of a state_dict, by name: shape, dtype, and place in the state on the device.
STATE: dict[str, tuple[tuple[int, ...], torch.dtype, int | slice]] = {
    "mu": ((), torch.float64, schema.MU),
    "mu_star": ((), torch.float64, schema.MU_STAR),
    "estimate": ((), torch.float64, schema.ESTIMATE),  # e
    "alpha": ((), torch.float64, schema.ALPHA),
    "signals": ((3,), torch.float64, schema.SIGNALS),  # EMAs of sigma_s^2, sigma_r^2, Delta^2; 0 until first measured
    "measured": ((3,), torch.bool, schema.MEASURED),
    "skipped": ((), torch.float64, schema.SKIPPED),
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

    CUDA graphs: observe() and step() of one process can be captured (a KL as a tensor); a replay is then a step, which
    refreshes by the count on the device. From the capture on the state and `mu` stay where the graph knows them and are
    written in place, so what must survive a replay has to be copied, and `steps` and state_dict() read the device.
    """

    def __init__(
        self,
        config: ControllerConfig = _DEFAULT_CONFIG,
        *,
        device: torch.device | str | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        if not isinstance(config, ControllerConfig):
            raise TypeError(f"config must be a ControllerConfig (as in ControllerConfig(mu_max=0.8)), got {config!r}")
        check_group("process_group", process_group)
        self.config = config
        self._group = process_group
        self._target = config.alpha if isinstance(config.alpha, KLTarget) else None
        self._static, self._fused = schema.encode_config(config), schema.fused_estimate(config)
        self._fingerprint = zlib.crc32(json.dumps(config.as_dict(), sort_keys=True).encode())
        self._observed: list[Signals] = []
        self._step = 0
        self._unfed = 0  # refreshes in a row that had nothing to read
        self._captured = False  # whether a CUDA graph holds the state: it knows the count of steps, and we do not
        alpha = config.alpha.init if isinstance(config.alpha, KLTarget) else config.alpha
        mu, prior = config.init_mu, schema.prior_before(config, 0, config.init_mu)
        state = [mu, mu, mu, alpha, *[0.0] * 6, 0.0, 0.0, prior]
        self._state = torch.tensor(state, dtype=torch.float64, device=device)
        self._mu = self._state[schema.MU].float()

    @property
    def mu(self) -> Tensor:
        """The mixing weight, 0-d float32 on the device.

        A new tensor after each step(), never written in place: what a loss or a logger holds keeps its value, and a
        backward that runs after step() sees the mu of its own forward. (In a CUDA graph: see the class.)
        """
        return self._mu

    @property
    def steps(self) -> int:
        """How often step() was called. Reads the device where a CUDA graph has captured it."""
        return int(self._state[schema.STEPS].item()) if self._captured else self._step

    def observe(self, signals: Signals) -> None:
        """Add a micro-batch's signals to those of the current step. ValueError if the estimator cannot use them."""
        if not isinstance(signals, Signals):
            cure = "; a loss has them as .signals" if hasattr(signals, "signals") else ""
            raise TypeError(f"signals must be Signals, got {type(signals).__name__}{cure}")
        if signals.rows.device != self._state.device:
            raise ValueError(f"signals must lie on {self._state.device}, got {signals.rows.device}")
        # Only what the estimator reads is kept: micro-batches and ranks may differ in the rest, and it need not travel.
        estimator, rows = self.config.estimator, signals.rows.detach()
        if estimator == "logit":
            if not signals.has_sum_sq:
                raise ValueError(
                    "estimator 'logit' needs signals made with sum_sq (sum p^2), got signals without it: give sum_sq= "
                    "with the log-probs, or make the loss from logits or hidden states"
                )
            kept = replace(signals, rows=rows, hidden=None)
        elif estimator == "hidden":
            if signals.hidden is None:
                raise ValueError(
                    "estimator 'hidden' needs signals that carry `hidden` (S, H), got signals without it: make the "
                    "loss with hybrid_loss_from_hidden"
                )
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
        capturing = self._state.is_cuda and torch.cuda.is_current_stream_capturing()
        return self._advance(kl, capturing)

    def _advance(self, kl: Tensor | float | None, capturing: bool) -> Tensor:
        """One step. Captured or after a capture, its count is the device's alone."""
        fixed = capturing or self._captured
        refresh = fixed or self._step % self.config.update_every == 0
        ranks = world_size(self._group)
        if fixed and ranks > 1:
            raise RuntimeError(f"step() in a CUDA graph needs a group of one rank, got {ranks}")
        with torch.inference_mode(False):  # mu enters autograd graphs, which cannot save an inference tensor
            read = refresh or (self._target is not None and ranks > 1)
            observed = concatenate(self._observed) if self._observed and read else None
            # What can raise or wait comes before the first change of the state.
            of_ranks = None if self._target is None else self._mean_kl(kl, observed)
            if refresh and ranks > 1:
                tag = (self._step, self._fingerprint)
                observed = gather_signals(observed, self._group, self._state.device, tag)
            if refresh and not fixed:
                self._say_unfed(observed)
            state, mu = call("controller_step", self._state, *self._seen(observed if refresh else None, of_ranks))
            if fixed:  # a replay reads what its capture read
                self._state.copy_(state)
                self._mu.copy_(mu)
            else:
                self._state, self._mu = state, mu
        self._captured = fixed
        self._step += 1
        self._observed = []
        return self._mu

    def _say_unfed(self, observed: Signals | None) -> None:
        """A forgotten observe() looks like a run: only the prior moves mu. Said once a silence."""
        self._unfed = self._unfed + 1 if observed is None else 0
        if self._unfed == 2:
            warnings.warn(
                f"the controller has observed nothing for two refreshes, up to step {self._step}: call "
                "observe(out.signals) for every micro-batch; until then only the prior moves mu",
                RuntimeWarning,
                stacklevel=4,
            )

    def _seen(self, observed: Signals | None, kl: Tensor | None) -> tuple[Any, ...]:
        """The operator's arguments behind the state: the signals' rows, or what signals.estimate makes of them."""
        weights = schema.encode_signals(observed)
        if observed is None:
            return None, None, None, kl, *self._static, *weights
        config, hidden = self.config, observed.hidden
        if not self._fused:
            values, present = estimate(observed, config.estimator, trim=config.trim, znorm=config.znorm)
            return None, None, torch.cat((values, present.double())), kl, *self._static, *weights
        if hidden is not None:
            hidden = (hidden if hidden.dtype == torch.float64 else hidden.float()).contiguous()
        return observed.rows.contiguous(), hidden, None, kl, *self._static, *weights

    def metrics(self) -> dict[str, Tensor]:
        """Copies of the state after the last step(), 0-d on the device: mu in float32, the rest in float64.

        The signals are their EMAs, 0 until first measured; mu_star is the current mu until all are. prior is the value
        that the last step() used; without a prior it is the estimate, which then stands in its place. skipped counts
        values that were not finite.
        """
        numbers = self._state.clone().unbind()
        names = ("mu_star", "sigma_s2", "sigma_r2", "delta2", "alpha", "prior", "skipped")
        places = (schema.MU_STAR, *range(7)[schema.SIGNALS], schema.ALPHA, schema.PRIOR, schema.SKIPPED)
        found = {f"gac/{name}": numbers[place] for name, place in zip(names, places, strict=True)}
        return {"gac/mu": self._mu.clone(), **found}

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step(): copies of the tensors, numbers, and the configuration.

        What was observed since is not part of it, as accumulated gradients are not part of an optimizer's: who resumes
        repeats the step. Loads with torch.load(..., weights_only=True).
        """
        tensors = {name: self._state[at].to(dtype, copy=True) for name, (_, dtype, at) in STATE.items()}
        return {"version": STATE_VERSION, "config": self.config.as_dict(), "step": self.steps, **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state_dict() bit for bit, and forget what was observed. May read the device.

        ValueError (TypeError for what is no tensor) for unknown or missing keys, another version or configuration,
        shapes, dtypes or values that do not fit. The controller is then as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a mapping, got {type(state_dict).__name__}")
        expected = {"version", "config", "step", *STATE}
        if missing := sorted(expected - set(state_dict)):
            raise ValueError(f"state_dict lacks {missing}")
        if unknown := sorted(set(state_dict) - expected, key=str):
            raise ValueError(f"state_dict has unknown keys {unknown}")
        if not isinstance(state_dict["version"], int) or state_dict["version"] != STATE_VERSION:
            raise ValueError(f"state_dict['version'] must be {STATE_VERSION}, got {state_dict['version']!r}")
        ours, theirs = self.config.as_dict(), state_dict["config"]
        if not isinstance(theirs, Mapping):
            raise TypeError(f"state_dict['config'] must be a mapping, got {type(theirs).__name__}")
        if odd := [v for v in theirs.values() if not isinstance(v, (str, int, float, dict, type(None)))]:
            raise TypeError(f"state_dict['config'] must hold plain values, got {type(odd[0]).__name__}")
        if ours != theirs:
            differing = sorted((k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)), key=str)
            text = ", ".join(f"{k}: {ours.get(k)!r} here, {theirs.get(k)!r} there" for k in differing)
            raise ValueError(f"state_dict['config'] must be this controller's configuration, differs in {text}")
        step = state_dict["step"]
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"state_dict['step'] must be an int of at least 0, got {step!r}")
        state = torch.empty(schema.STATE_NUMBERS, dtype=torch.float64, device=self._state.device)
        for name, (_, _, place) in STATE.items():
            state[place] = self._checked(name, state_dict[name])
        state[schema.STEPS] = step
        state[schema.PRIOR] = schema.prior_before(self.config, step, float(state_dict["estimate"]))
        mu = state[schema.MU].float()
        if self._captured:
            self._state.copy_(state)
            self._mu.copy_(mu)
        else:
            self._state, self._mu = state, mu
        self._step, self._observed = step, []

    def _checked(self, name: str, tensor: object) -> Tensor:
        """A tensor of a state_dict, on this controller's device, or an error that names it."""
        shape, dtype, _ = STATE[name]
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict[{name!r}] must be a tensor, got {type(tensor).__name__}")
        if (tuple(tensor.shape), tensor.dtype) != (shape, dtype):
            got = f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(f"state_dict[{name!r}] must be a tensor of {shape} {dtype}, got {got}")
        low, high = (self.config.mu_min, self.config.mu_max) if name == "mu" else (0.0, schema.LARGEST_SIGNAL)
        if not ((tensor >= low) & (tensor <= high)).all():  # also nan
            raise ValueError(f"state_dict[{name!r}] must be in [{low:g}, {high:g}], got {tensor.tolist()}")
        return tensor.detach().to(self._state.device)

    def _mean_kl(self, kl: Tensor | float | None, observed: Signals | None) -> Tensor:
        """The operator's kl: of this rank alone, 0-d, or of all ranks, (3,)."""
        device = self._state.device
        if isinstance(kl, Tensor):
            plain_tensor("kl", kl, NUMBERS)
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
            return kl
        tokens = torch.zeros_like(kl) if observed is None else live_policy_tokens(observed)
        mean, finite, bad = mean_kl(kl, tokens, self._group)
        return torch.stack((mean, finite.double(), bad))
