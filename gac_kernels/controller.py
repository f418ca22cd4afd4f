"""The guided adaptive controller (GAC, arXiv 2605.26184): from the signals of past batches to the mixing weight mu.

    mu* = (alpha D + sigma_r^2) / (D + sigma_s^2 + sigma_r^2)
    e   = beta e + (1 - beta) mu*               smoothing "estimate" (ours), or
    e   = clip(beta mu + (1 - beta) mu*, mu_min, mu_max)    smoothing "reference" (the published code)
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
from .controller_ranks import HEADER, compare_controllers
from .controller_state import STATE, STATE_VERSION, bits_of, first_state, read_state
from .distributed import check_group, copies_in, describe, exchange, gather_rows, mean_kl, world_size
from .library import call
from .reference.controller import optimal_mu
from .signals import Signals, concatenate, estimate, live_policy_tokens, require_alike
from .tensors import NUMBERS, plain_tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ConstantPrior", "ControllerConfig", "CosinePrior", "GuidedAdaptiveController", "KLTarget", "optimal_mu"]

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
    finite, or negative, leaves that signal as it was and is counted in `skipped`; so is a KL that is not finite. A row
    that does not say what it is (signals.Estimate) makes all three signals such.

    device: of mu, the state and all observed signals; default torch's default device.
    process_group: ranks that share the controller's state; default the default group, if torch.distributed is
    initialised when step() runs. Every rank must call step() equally often, also one that observed nothing. Ranks that
    hold the same rows (`Signals.replicas`: those of a loss with tp_group) count once. Ranks exchange signals on refresh
    steps only (plus one small gather of the KL a step under KLTarget), and compare there, and at their first step() or
    that after load_state_dict, step, configuration and state: a difference raises the same ValueError on all ranks,
    before anything whose size depends on it is exchanged, and changes nothing. With a group that
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
        self._observed: list[Signals] = []
        self._step = 0
        self._unfed = 0  # refreshes in a row that had nothing to read
        self._captured = False  # whether a CUDA graph holds the state: it knows the count of steps, and we do not
        first = first_state(config)
        self._begun: list[int] | None = bits_of(first)  # until ranks have compared what they begin with
        self._state = torch.tensor(first, dtype=torch.float64, device=device)
        self._mu = schema.narrowed_mu(config, self._state[schema.MU])

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
            kept = Signals(rows, replicas=signals.replicas)
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
            # What can raise or wait comes before the first change of the state, and what ranks compare before what
            # they exchange: sizes depend on it.
            meets = ranks > 1 and (refresh or self._begun is not None)
            own = self._own_kl(kl, meets)
            table = self._meet(observed if refresh else None) if meets else []
            of_ranks = None if own is None or ranks == 1 else mean_kl(own, *self._weight(observed), self._group)
            if refresh and ranks > 1:
                observed = gather_rows(observed, table, self._group, self._state.device)
            if refresh and not fixed:
                self._say_unfed(observed)
            seen = self._seen(observed if refresh else None, own if of_ranks is None else of_ranks)
            state, mu = call("controller_step", self._state, *seen)
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
        values that were left out: not finite, negative, or of rows that do not say what they are.
        """
        numbers = self._state.clone().unbind()
        names = ("mu_star", "sigma_s2", "sigma_r2", "delta2", "alpha", "prior", "skipped")
        places = (schema.MU_STAR, *range(7)[schema.SIGNALS], schema.ALPHA, schema.PRIOR, schema.SKIPPED)
        found = {f"gac/{name}": numbers[place] for name, place in zip(names, places, strict=True)}
        return {"gac/mu": self._mu.clone(), **found}

    def state_dict(self) -> dict[str, Any]:
        """The state after the last step(): copies of the tensors, numbers, and the configuration.

        What was observed since is not part of it, as accumulated gradients are not part of an optimizer's: who resumes
        repeats the step. RuntimeWarning where something that the next step() would read is left out so. Loads with
        torch.load(..., weights_only=True).
        """
        waits = self._target is not None or self._step % self.config.update_every == 0
        if self._observed and waits and not self._captured:
            warnings.warn(
                f"state_dict() leaves out the signals of {len(self._observed)} micro-batches that were observed since "
                "the last step(): save after step(), or repeat the whole step after loading",
                RuntimeWarning,
                stacklevel=2,
            )
        tensors = {name: self._state[at].to(dtype, copy=True) for name, (_, dtype, at) in STATE.items()}
        return {"version": STATE_VERSION, "config": self.config.as_dict(), "step": self.steps, **tensors}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state_dict() bit for bit, and forget what was observed. May read the device.

        ValueError (TypeError for what is no tensor) for unknown or missing keys, another version or configuration,
        shapes, dtypes or values that do not fit. The controller is then as it was.
        """
        read, step = read_state(state_dict, self.config)
        state = read.to(self._state.device)
        mu = schema.narrowed_mu(self.config, state[schema.MU])
        if self._captured:
            self._state.copy_(state)
            self._mu.copy_(mu)
        else:
            self._state, self._mu = state, mu
        self._step, self._observed, self._begun = step, [], bits_of(read.tolist())

    def _own_kl(self, kl: Tensor | float | None, meets: bool) -> Tensor | None:
        """This rank's KL, float64 0-d, or None under a fixed alpha. A refusal is told to the ranks that wait for us."""
        if self._target is None:
            return None
        try:
            return self._checked_kl(kl)
        except (TypeError, ValueError):
            if meets:
                self._exchange(None, refused=True)
            raise

    def _checked_kl(self, kl: Tensor | float | None) -> Tensor:
        device = self._state.device
        if isinstance(kl, Tensor):
            plain_tensor("kl", kl, NUMBERS)
            if kl.dim() != 0 or kl.device != device:
                raise ValueError(f"kl must be 0-d on {device}, got shape {tuple(kl.shape)} on {kl.device}")
            return kl.detach().double()
        if kl is None:
            raise ValueError("step() needs kl under KLTarget, got None")
        if isinstance(kl, bool) or not isinstance(kl, numbers.Real):
            raise TypeError(f"kl must be a number or a 0-d tensor, got {kl!r}")
        return torch.full((), float(kl), dtype=torch.float64, device=device)

    def _weight(self, observed: Signals | None) -> tuple[Tensor, float]:
        """What this rank's KL weighs: its live RL tokens, shared with the ranks of the group that hold the same."""
        if observed is None:
            return torch.zeros_like(self._state[schema.MU]), 1.0
        return live_policy_tokens(observed), 1.0 / copies_in(self._group, observed.replicas)

    def _exchange(self, observed: Signals | None, refused: bool = False) -> list[list[int]]:
        config = json.dumps(self.config.as_dict(), sort_keys=True)
        begun = [0] * schema.STATE_NUMBERS if self._begun is None else self._begun
        header = (int(refused), self._step, zlib.crc32(config.encode()), int(self._begun is not None), *begun)
        return exchange("step() of a controller", (*header, *describe(observed)), self._group, self._state.device)

    def _meet(self, observed: Signals | None) -> list[list[int]]:
        """Compare what must be equal on all ranks; on each refresh, and at the first step() of a controller or of a
        state that it loaded. Returns what describes the ranks' signals."""
        table = self._exchange(observed)
        compare_controllers([row[:HEADER] for row in table], self.config, self._group, self._state.device)
        self._begun = None
        return [row[HEADER:] for row in table]
