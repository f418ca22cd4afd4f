"""Objectives as a user would write them: those that the kernels know by name, once more."""

from __future__ import annotations

from dataclasses import dataclass

import torch

import gac_kernels as gk


@dataclass(frozen=True)
class MySAPO(gk.PolicyObjective):
    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def gated(self, t):
        tau = torch.where(t.advantage > 0, self.tau_pos, self.tau_neg)
        return 4 / tau * torch.sigmoid(tau * t.ratio_minus_one)

    def loss(self, t):
        return -t.advantage * self.gated(t)

    def update(self, t):
        s = torch.sigmoid(torch.where(t.advantage > 0, self.tau_pos, self.tau_neg) * t.ratio_minus_one)
        return 4 * s * (1 - s)


@dataclass(frozen=True)
class MyGRPO(gk.PolicyObjective):
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None

    def loss(self, t):
        first = t.ratio if self.delta is None else torch.clamp(t.ratio, max=self.delta)
        clip = torch.clamp(t.ratio, 1 - self.clip_low, 1 + self.clip_high)
        return -torch.minimum(first * t.advantage, clip * t.advantage)

    def clipped(self, t):
        up, down = t.advantage > 0, t.advantage < 0
        hit = (up & (t.ratio > 1 + self.clip_high)) | (down & (t.ratio < 1 - self.clip_low))
        return hit if self.delta is None else hit | (down & (t.ratio > self.delta))


@dataclass(frozen=True)
class MyGSPO(gk.PolicyObjective):
    clip: float = 0.05

    def loss(self, t):
        s = torch.exp(t.sequence_mean(t.log_ratio))
        return -torch.minimum(s * t.advantage, torch.clamp(s, 1 - self.clip, 1 + self.clip) * t.advantage)

    def clipped(self, t):
        s = torch.exp(t.sequence_mean(t.log_ratio))
        return ((t.advantage > 0) & (s > 1 + self.clip)) | ((t.advantage < 0) & (s < 1 - self.clip))


@dataclass(frozen=True)
class MyPhi(gk.SupervisedObjective):
    def loss(self, t):
        phi = (t.p * (1 - t.p)).detach()
        return torch.where(phi == 0, 0.0, -phi * t.logp)
