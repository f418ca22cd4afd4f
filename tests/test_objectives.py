"""Objectives validate themselves; a user's gate is checked for the four conditions and computes what it says."""

from __future__ import annotations

import math

import pytest
import torch
from support import Case

import gac_kernels as gk
from gac_kernels import reference


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: gk.SAPO("sigmoids"), "gate"),
        (lambda: gk.SAPO(tau_pos=0.0), "tau_pos"),
        (lambda: gk.SAPO(tau_neg=float("nan")), "tau_neg"),
        (lambda: gk.GRPO(clip_low=-0.1), "clip_low"),
        (lambda: gk.GRPO(clip_low=1.5), "clip_low"),
        (lambda: gk.GRPO(clip_high=float("inf")), "clip_high"),
        (lambda: gk.GRPO(0.2, 0.2, delta=1.1), "delta"),
        (lambda: gk.CISPO(0.0), "clip_high"),
        (lambda: gk.GSPO(-1.0), "clip_low"),
        (lambda: gk.DFPO("min"), "transform"),
        (lambda: gk.DFPO(ratio="mean"), "ratio"),
        (lambda: gk.NLL("Phi"), "weight"),
        (lambda: gk.GIFT(beta=-1.0), "beta"),
        (lambda: gk.GIFT(smooth=1.5), "smooth"),
        (lambda: gk.HybridObjective(kl_coef=-1.0), "kl_coef"),
        (lambda: gk.HybridObjective(kl_estimator="k4"), "kl_estimator"),
        (lambda: gk.HybridObjective(entropy_coef=float("nan")), "entropy_coef"),
        (lambda: gk.HybridObjective(aggregation="mean"), "aggregation"),
        (lambda: gk.HybridObjective(supervised_aggregation="mean"), "supervised_aggregation"),
        (lambda: gk.HybridObjective(norm_length=0.0), "norm_length"),
        (lambda: gk.LogitTransform(temperature=0.0), "temperature"),
        (lambda: gk.LogitTransform(temperature=torch.ones(2, 2)), "temperature"),
        (lambda: gk.LogitTransform(softcap=-1.0), "softcap"),
        (lambda: gk.LogitTransform(scale=0.0), "scale"),
    ],
)
def test_bad_values_name_the_argument(make, name):
    with pytest.raises(ValueError, match=rf"^{name} must"):
        make()


@pytest.mark.parametrize(
    "make", [lambda: gk.SAPO(tau_pos="1"), lambda: gk.GRPO(clip_low=True), lambda: gk.HybridObjective("sapo")]
)
def test_bad_types_name_the_argument(make):
    with pytest.raises(TypeError, match=r"^(tau_pos|clip_low|policy) must be"):
        make()


def test_frozen_and_hashable():
    assert gk.HybridObjective(gk.GRPO(0.2, 0.3)) == gk.HybridObjective(gk.GRPO(0.2, 0.3))
    assert len({gk.HybridObjective(), gk.HybridObjective(), gk.HybridObjective(gk.CISPO())}) == 2
    with pytest.raises(AttributeError):
        gk.SAPO().tau_pos = 2.0


def softsign(u, tau):
    return 1.0 + u / torch.sqrt(1.0 + (tau * u) ** 2)


def softsign_slope(u, tau):
    return (1.0 + (tau * u) ** 2) ** -1.5


INADMISSIBLE = {
    "its derivative": gk.Gate("wrong slope", softsign, lambda u, tau: (1.0 + (tau * u) ** 2) ** -1.4),
    "global maximum 1": gk.Gate(
        "too steep", lambda u, tau: 2 * softsign(u, tau), lambda u, tau: 2 * softsign_slope(u, tau)
    ),
    "continuous": gk.Gate("clipped", lambda u, tau: u.clamp(-0.2, 0.2), lambda u, tau: (u.abs() <= 0.2).to(u.dtype)),
    "fall away": gk.Gate("identity", lambda u, tau: u, lambda u, tau: torch.ones_like(u)),
    "go to 0": gk.Gate("log", lambda u, tau: torch.log1p(u.abs()) * u.sign(), lambda u, tau: 1 / (1 + u.abs())),
    "finite": gk.Gate("nan", softsign, lambda u, tau: torch.where(u > 5, math.nan, softsign_slope(u, tau))),
}
MATCH = {
    "its derivative": "slope must be the derivative", "global maximum 1": "global maximum 1",
    "continuous": "continuous|derivative of value",
    "fall away": "fall away", "go to 0": r"r f'\(r\) must go to 0", "finite": "must be finite",
}  # fmt: skip


@pytest.mark.parametrize("condition", INADMISSIBLE)
def test_inadmissible_gates_are_refused(condition):
    with pytest.raises(ValueError, match=MATCH[condition]):
        gk.SAPO(INADMISSIBLE[condition])


@pytest.mark.parametrize("name", ["sigmoid", "erf", "arctan", "softsign"])
@pytest.mark.parametrize("tau", [1.0, 1.05, 10.0, 12.0])
def test_built_in_gates_pass_the_check(name, tau):
    gk.Gate(name, lambda u, tau: reference.gate(name, u, tau)[0], lambda u, tau: reference.gate(name, u, tau)[1]).check(
        tau
    )


def test_custom_gate_equals_the_built_in_one():
    """The user's softsign gives the built-in's loss, gradient, signals and metrics, and refuses other backends."""
    batch, extra = Case((5, 9, 3), (False, True, False), seed=31).padded()
    results = []
    for gate in ("softsign", gk.Gate("mine", softsign, softsign_slope)):
        leaf = extra["logprobs"].clone().requires_grad_()
        out = gk.hybrid_loss(leaf, batch, gk.HybridObjective(gk.SAPO(gate, 3.0, 4.0)), 0.3)
        out.loss.backward()
        results.append((out.loss.detach(), leaf.grad, out.signals.rows, out.metrics["effective_update_ratio"]))
    for built_in, mine in zip(*results, strict=True):
        torch.testing.assert_close(mine, built_in, rtol=1e-12, atol=1e-14)
    custom = gk.HybridObjective(gk.SAPO(gk.Gate("mine", softsign, softsign_slope)))
    with gk.use_backend("triton"), pytest.raises(ValueError, match="does not support the custom gate"):
        gk.hybrid_loss(extra["logprobs"], batch, custom, 0.3)
