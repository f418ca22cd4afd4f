"""What sets mu: GAC and the baselines it is compared with, behind one small interface.

Every rule sees the same three moments of a step. ``route`` says which prompts of a rollout batch stay on RL,
``observe`` gets the result of each micro-batch, ``step`` closes the optimizer step and moves ``mu``. The step's loss is
``scale * ((1 - mu) * policy + mu * supervised)``, with ``mu`` and ``scale`` from before the step, so a rule that states
two weights ``w_r`` and ``w_s`` is ``scale = w_r + w_s``, ``mu = w_s / scale``: no rule needs a loss of its own. All but
HPT keep every prompt on RL; all but SRFT have ``scale = 1``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..controller import GuidedAdaptiveController, KLTarget
from ..types import HybridLoss, TokenBatch
from .config import TrainConfig
from .ranks import Ranks


class Mixing:
    """The interface, and its simplest member: a constant mu.

    Every rank must call every method; all then hold the same bits.

    Attributes:
        mu: 0-d float32 tensor, the weight of the demonstrations in the next step.
        scale: 0-d float32 tensor that multiplies the whole loss of the next step.
    """

    def __init__(self, mu: float, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.mu = torch.tensor(mu, dtype=torch.float32, device=device)
        self.scale = torch.ones((), dtype=torch.float32, device=device)

    def route(self, pass_rates_P: Tensor) -> Tensor | None:
        """``(P,)`` bool: the prompts that keep their rollouts; each of the others gets one demonstration instead.

        None: every prompt keeps them, and ``demonstrations_per_step`` demonstrations come beside.
        """
        return None

    def observe(self, result: HybridLoss, batch: TokenBatch) -> None:
        """Take note of one micro-batch of the step under way."""

    def step(self, kl: Tensor | None = None) -> None:
        """Close the optimizer step. ``kl``: 0-d, the policy's mean KL to the reference model, where there is one."""

    def metrics(self) -> dict[str, Tensor]:
        """0-d tensors for the log."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next steps depend on."""
        return {"mu": self.mu, "scale": self.scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where ``state_dict`` was taken."""
        for name in ("mu", "scale"):
            setattr(self, name, state[name].to(self.mu.device))


class Adaptive(Mixing):
    """GAC: mu minimises the estimated error of the mixed gradient (:class:`GuidedAdaptiveController`)."""

    def __init__(self, config: TrainConfig) -> None:
        settings = config.resolved_controller()
        super().__init__(settings.init_mu, config.device)
        self.controller = GuidedAdaptiveController(settings, device=torch.device(config.device))
        self.takes_kl = isinstance(settings.alpha, KLTarget)

    def observe(self, result: HybridLoss, batch: TokenBatch) -> None:
        self.controller.observe(result.signals)

    def step(self, kl: Tensor | None = None) -> None:
        self.mu = self.controller.step(kl if self.takes_kl else None)

    def metrics(self) -> dict[str, Tensor]:
        return self.controller.metrics()

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.controller.load_state_dict(state)
        self.mu = self.controller.mu


class Schedule(Mixing):
    """mu from 0.9 to 0.05 over the horizon, then level: CHORD-mu's cosine (arXiv 2508.11408), or a straight line."""

    HIGH, LOW = 0.9, 0.05

    def __init__(self, shape: str, horizon: int, device: torch.device | str = "cpu") -> None:
        super().__init__(self.HIGH, device)
        self.shape, self.horizon, self.count = shape, horizon, 0

    def at(self, step: int) -> float:
        """mu of step ``step``, counted from 0."""
        passed = min(step / self.horizon, 1.0)
        left = 1.0 - passed if self.shape == "linear" else 0.5 * (1.0 + math.cos(math.pi * passed))
        return self.LOW + (self.HIGH - self.LOW) * left

    def step(self, kl: Tensor | None = None) -> None:
        self.count += 1
        self.mu = torch.full_like(self.mu, self.at(self.count))

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.count = state["count"]


class KLDriven(Mixing):
    """``mu <- clip(mu exp(gain clip(KL / target - 1, -1, 1)), 0.05, 0.9)``: more guidance the further the policy is."""

    TARGET, GAIN, LOW, HIGH = 0.02, 0.1, 0.05, 0.9

    def __init__(self, device: torch.device | str = "cpu") -> None:
        super().__init__(0.5, device)

    def step(self, kl: Tensor | None = None) -> None:
        if kl is None:
            raise ValueError("kl must be given to the KL-driven rule, got None; set reference=True")
        change = torch.exp(self.GAIN * (kl.float() / self.TARGET - 1.0).clamp(-1.0, 1.0))
        # A KL that is not finite says nothing about the policy; mu then stays where it is.
        change = torch.where(torch.isfinite(change), change, torch.ones_like(change))
        self.mu = (self.mu * change).clamp(self.LOW, self.HIGH)


class SRFT(Mixing):
    """Demonstrations weigh ``w = 0.5 exp(-Hn)`` beside a full RL loss (SRFT, arXiv 2506.19767).

    ``Hn`` is the policy's mean token entropy (nats) on the demonstrations of the step before, as every rule here weighs
    a step by what is known before it; before the first step it counts as 0, which gives ``w`` its largest value.
    """

    def __init__(self, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> None:
        super().__init__(0.0, device, ranks)
        self._sum, self._count = torch.zeros(2, dtype=torch.float64, device=device)
        self._weigh(torch.zeros((), device=device))

    def observe(self, result: HybridLoss, batch: TokenBatch) -> None:
        if result.token_entropy is None:
            raise ValueError("result.token_entropy must be given to SRFT, got None")
        expert = batch.mask & batch.is_expert[:, None]
        self._sum = self._sum + torch.where(expert, result.token_entropy, 0.0).sum(dtype=torch.float64)
        self._count = self._count + expert.sum()

    def step(self, kl: Tensor | None = None) -> None:
        total, count = self.ranks.sum(torch.stack((self._sum, self._count))).unbind()
        self._weigh(total / count.clamp(min=1.0))
        self._sum, self._count = torch.zeros_like(self._sum), torch.zeros_like(self._count)

    def _weigh(self, entropy: Tensor) -> None:
        weight = 0.5 * torch.exp(-entropy.float())
        self.scale = 1.0 + weight
        self.mu = weight / self.scale

    def metrics(self) -> dict[str, Tensor]:
        return {"srft/weight": self.scale - 1.0}


class HPT(Mixing):
    """Per prompt either RL or SFT (HPT, arXiv 2509.04419): a pass rate above ``gamma`` keeps the prompt's rollouts, any
    other prompt gives them up for one demonstration, its own or else the next of the pool.

    ``mu`` is the share of prompts that went to SFT, so every prompt weighs the same whichever way it went. It belongs
    to the rollout batch that it was read from, hence it is set by ``route``, before that batch's first step.
    """

    def __init__(self, gamma: float, device: torch.device | str = "cpu", ranks: Ranks | None = None) -> None:
        super().__init__(0.0, device, ranks)
        self.gamma = gamma

    def route(self, pass_rates_P: Tensor) -> Tensor | None:
        keep = pass_rates_P > self.gamma
        kept, prompts = self.ranks.total(int(keep.sum()), len(keep))
        self.mu = torch.full_like(self.mu, 1.0 - kept / prompts)
        return keep


def build_mixing(config: TrainConfig, ranks: Ranks | None = None) -> Mixing:
    """The rule named ``config.controller``."""
    if config.controller == "gac":
        return Adaptive(config)
    if config.controller in ("linear", "cosine"):
        return Schedule(config.controller, config.horizon, config.device)
    if config.controller == "kl":
        return KLDriven(config.device)
    if config.controller == "srft":
        return SRFT(config.device, ranks)
    if config.controller == "hpt":
        return HPT(config.hpt_gamma, config.device, ranks)
    return Mixing(config.mu, config.device)
