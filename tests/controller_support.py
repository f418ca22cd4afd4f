"""What the tests of the controller share."""

from __future__ import annotations

import math

import torch
from plain_controller import Row

import gac_kernels as gk

NO_PRIOR = gk.ControllerConfig(prior=None)


def observed_rows(rng, t):
    """What a step observes: now and then a branch is missing, a number is nan, or there is nothing at all."""
    experts, rollouts = rng.choice([(5, 8), (12, 6), (5, 8), (0, 7), (6, 0), (0, 0), (1, 1)])
    drift = math.sin(t / 40)
    rows = [Row(True, rng.randint(1, 9), 2 + drift + rng.gauss(0, 1), 0.0, rng.random()) for _ in range(experts)]
    rows += [Row(False, rng.randint(1, 9), 1.0, rng.gauss(drift, 0.7), rng.random()) for _ in range(rollouts)]
    rows += [Row(rng.random() < 0.5, 0, 0.0, 0.0, 0.0)]
    rng.shuffle(rows)
    victim = rng.choice(rows)
    if victim.tokens and rng.random() < 0.2:
        setattr(victim, rng.choice(["nll", "advantage", "disagreement"]), math.nan)
        if victim.expert:
            victim.advantage = 0.0
    return rows


def cosine(t):
    """Linear 0 -> 0.85 in 200 steps, then cosine to 0.15 in 800."""
    if t <= 200:
        return 0.85 * t / 200
    return 0.15 + 0.7 * (1 + math.cos(math.pi * min(t - 200, 800) / 800)) / 2


def assert_same_state(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if torch.is_tensor(value) else value == second[key]
        assert same, key
