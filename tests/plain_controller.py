"""The published controller, one number at a time in Python floats: the oracle of the tests of the controller.

Written from the text of the rule (GAC, arXiv 2605.26184), not from gac_kernels/controller.py: no tensors, no masks, an
`if` where the rule says if. A sequence is a Row; what a step observed is a list of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass
class Row:
    expert: bool
    tokens: int
    nll: float  # mean over tokens
    advantage: float
    disagreement: float  # mean over tokens

    def sums(self) -> list[float]:
        own = [float(self.expert), float(self.tokens), self.nll * self.tokens]
        return [*own, 0.0 if self.expert else self.advantage, self.disagreement * self.tokens, *[0.0] * 7]


def rows_tensor(rows: list[Row]) -> torch.Tensor:
    return torch.tensor([r.sums() for r in rows], dtype=torch.float64).reshape(-1, 12)


def variance(values: list[float]) -> float:
    mean = math.fsum(values) / len(values)
    return max(1e-8, math.fsum((v - mean) ** 2 for v in values) / len(values))


def measured(rows: list[Row], trim: float) -> list[float | None]:
    """sigma_s^2, sigma_r^2, Delta^2 of what a step observed; None where there is no sequence to tell."""
    experts = [r.nll for r in rows if r.expert and r.tokens]
    rollouts = [r.advantage for r in rows if not r.expert and r.tokens]
    distances = [r.disagreement for r in rows if r.tokens]
    noise_s = None
    if any(math.isnan(v) for v in experts):
        noise_s = math.nan
    elif experts:
        cut = int(trim * len(experts)) if len(experts) >= 4 else 0
        noise_s = variance(sorted(experts)[cut : len(experts) - cut])
    noise_r = None
    if rollouts:
        noise_r = variance(rollouts) if all(map(math.isfinite, rollouts)) else math.nan
    return [noise_s, noise_r, math.fsum(distances) / len(distances) if distances else None]


class PlainController:
    """`config` has the fields of ControllerConfig, `prior` is a function of the step or None."""

    def __init__(self, config, prior):
        self.config, self.prior = config, prior
        self.mu = config.init_mu
        self.adaptive = not isinstance(config.alpha, float)
        self.alpha = config.alpha.init if self.adaptive else config.alpha
        self.emas = [None, None, None]
        self.estimate = None
        self.mu_star = config.init_mu
        self.skipped = 0
        self.t = 0

    def step(self, rows: list[Row], kl: float | None = None) -> float:
        config = self.config
        beta = config.ema_beta
        if self.adaptive:
            if math.isfinite(kl):
                rule = config.alpha
                excess = max(-1.0, min(1.0, kl / rule.target - 1.0))
                self.alpha = max(rule.low, min(rule.high, self.alpha * math.exp(rule.gain * excess)))
            else:
                self.skipped += 1
        if self.t % config.update_every == 0:
            for i, value in enumerate(measured(rows, config.trim)):
                if value is None:
                    continue
                if not math.isfinite(value):
                    self.skipped += 1
                elif self.emas[i] is None:
                    self.emas[i] = value
                else:
                    self.emas[i] = beta * self.emas[i] + (1 - beta) * value
        if None in self.emas:
            self.mu_star = smooth = self.mu
        else:
            noise_s, noise_r, distance = self.emas
            if config.disagreement_cap is not None:
                distance = min(distance, config.disagreement_cap * (noise_s + noise_r))
            self.mu_star = (self.alpha * distance + noise_r) / (distance + noise_s + noise_r)
            if config.smoothing == "reference":
                smooth = beta * self.mu + (1 - beta) * self.mu_star
                smooth = max(config.mu_min, min(config.mu_max, smooth))
            else:
                first = self.estimate is None
                self.estimate = self.mu_star if first else beta * self.estimate + (1 - beta) * self.mu_star
                smooth = self.estimate
        candidate = smooth
        if self.prior is not None:
            candidate = (1 - config.blend) * self.prior(self.t) + config.blend * smooth
        change = max(-config.change_cap, min(config.change_cap, candidate - self.mu))
        self.mu = max(config.mu_min, min(config.mu_max, self.mu + change))
        self.t += 1
        return self.mu
