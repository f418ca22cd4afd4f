"""The controller against the published rule in plain Python."""

import math
import random
from dataclasses import replace

import pytest
import torch
from controller_support import NO_PRIOR, assert_same_state, cosine, observed_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_controller import PlainController, Row, rows_tensor

import gac_kernels as gk
from gac_kernels.signals import Signals

pytestmark = pytest.mark.usefixtures("backend")

CONFIGS = {
    "default": (gk.ControllerConfig(), cosine),
    "reference": (gk.ControllerConfig(smoothing="reference"), cosine),
    "no prior": (NO_PRIOR, None),
    "reference, no prior": (replace(NO_PRIOR, smoothing="reference"), None),
    "constant prior": (gk.ControllerConfig(prior=gk.ConstantPrior(0.3), blend=0.8), lambda t: 0.3),
    "reference, constant prior": (
        gk.ControllerConfig(smoothing="reference", prior=gk.ConstantPrior(0.3), update_every=1), lambda t: 0.3,
    ),
    "reference, tight": (
        gk.ControllerConfig(
            smoothing="reference", ema_beta=0.5, mu_min=0.25, mu_max=0.4, init_mu=0.3, change_cap=0.5, update_every=1,
            prior=gk.ConstantPrior(0.1),
        ), lambda t: 0.1,
    ),
    "kl": (gk.ControllerConfig(alpha=gk.KLTarget()), cosine),
    "kl, reference": (gk.ControllerConfig(alpha=gk.KLTarget(gain=0.5), smoothing="reference"), cosine),
    "kl, no prior": (replace(NO_PRIOR, alpha=gk.KLTarget(target=0.01, init=0.2), update_every=3), None),
    "alpha 0": (replace(NO_PRIOR, alpha=0.0, ema_beta=0.5, update_every=1, change_cap=0.2), None),
    "alpha 1": (replace(NO_PRIOR, alpha=1.0, ema_beta=0.0, update_every=1, change_cap=1.0), None),
    "tight": (gk.ControllerConfig(mu_min=0.45, mu_max=0.55, init_mu=0.55, update_every=2, blend=1.0), cosine),
    "capped distance": (replace(NO_PRIOR, disagreement_cap=0.05, update_every=1, ema_beta=0.9), None),
    "trimmed": (replace(NO_PRIOR, trim=0.3, update_every=1, ema_beta=0.9), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_follows_the_published_rule_step_for_step(name):
    config, prior = CONFIGS[name]
    ours, plain, rng = gk.GuidedAdaptiveController(config), PlainController(config, prior), random.Random(name)
    seen = set()
    for t in range(330):
        rows = observed_rows(rng, t)
        kl = rng.choice([0.0, 0.01, 0.02, 0.05, 3.0, math.nan, math.inf]) if plain.adaptive else None
        before = plain.mu
        want = plain.step(rows, kl)
        ours.observe(Signals(rows_tensor(rows)))
        got = ours.step(kl)
        assert got is ours.mu
        assert got.dtype == torch.float32
        assert got.dim() == 0
        assert got.item() == pytest.approx(want, abs=6e-8)  # a rounding to float32
        assert config.mu_min <= got.item() <= config.mu_max  # that never leaves the bounds, in float64 either
        metrics = {key.removeprefix("gac/"): value.item() for key, value in ours.metrics().items()}
        state = {"mu_star": plain.mu_star, "alpha": plain.alpha, "skipped": plain.skipped}
        state |= dict(zip(("sigma_s2", "sigma_r2", "delta2"), plain.emas, strict=True))
        for key, value in state.items():
            assert metrics[key] == pytest.approx(0.0 if value is None else value, rel=1e-11, abs=1e-15), (t, key)
        if prior is not None:
            assert metrics["prior"] == pytest.approx(prior(t), rel=1e-12)
        seen |= {"capped"} if abs(plain.mu - before) > 0.999 * config.change_cap else set()
        seen |= {"skipped"} if plain.skipped else set()
        seen |= {"at a bound"} if plain.mu in (config.mu_min, config.mu_max) else set()
    assert None not in plain.emas
    assert "skipped" in seen
    assert "at a bound" in seen or name != "tight"
    assert "capped" in seen or name != "default"


def test_fixed_point_of_the_reference_smoothing():
    """At lambda 0.5 and beta 0.99: 0.990 prior + 0.0099 mu*. The estimate hardly counts."""
    config = gk.ControllerConfig(smoothing="reference", prior=gk.ConstantPrior(0.3))
    controller = gk.GuidedAdaptiveController(config)
    rows = [Row(True, 3, x, 0.0, 0.5) for x in (1.0, 2.0)] + [Row(False, 3, 1.0, x, 0.5) for x in (-2.0, 2.0)]
    for _ in range(200):
        controller.observe(Signals(rows_tensor(rows)))
        controller.step()
    mu_star = controller.metrics()["gac/mu_star"].item()
    assert mu_star > 0.8
    assert controller.mu.item() == pytest.approx((0.5 * 0.3 + 0.005 * mu_star) / 0.505, abs=1e-6)
    assert controller.mu.item() == pytest.approx(0.990 * 0.3 + 0.0099 * mu_star, abs=1e-4)


def test_estimate_smoothing_means_what_blend_says():
    """The default's fixed point at lambda 0.5 lies half way between prior and mu*."""
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(prior=gk.ConstantPrior(0.3)))
    rows = [Row(True, 3, x, 0.0, 0.5) for x in (1.0, 2.0)] + [Row(False, 3, 1.0, x, 0.5) for x in (-2.0, 2.0)]
    for _ in range(100):
        controller.observe(Signals(rows_tensor(rows)))
        controller.step()
    mu_star = controller.metrics()["gac/mu_star"].item()
    assert controller.mu.item() == pytest.approx(0.5 * 0.3 + 0.5 * mu_star, abs=1e-6)


finite = st.floats(1e-8, 1e12)


@settings(max_examples=60, deadline=None)
@given(finite, finite, st.floats(0, 1e12), st.floats(0, 1), st.none() | st.floats(1e-3, 1e3))
def test_mu_star_minimises_the_bound(noise_s, noise_r, distance, alpha, cap):
    """(mu - alpha)^2 D + mu^2 sigma_s^2 + (1 - mu)^2 sigma_r^2 has a zero slope at mu*."""
    controller = gk.GuidedAdaptiveController(replace(NO_PRIOR, alpha=alpha, disagreement_cap=cap))
    # Two rows of +-sigma have the biased variance sigma^2.
    rows = [Row(True, 1, s * math.sqrt(noise_s), 0.0, distance) for s in (-1, 1)]
    rows += [Row(False, 1, 0.0, s * math.sqrt(noise_r), distance) for s in (-1, 1)]
    controller.observe(Signals(rows_tensor(rows)))
    controller.step()
    metrics = controller.metrics()
    mu, s, r, d = (metrics[f"gac/{k}"].item() for k in ("mu_star", "sigma_s2", "sigma_r2", "delta2"))
    assert (s, r, d) == pytest.approx((noise_s, noise_r, distance), rel=1e-9)
    d = d if cap is None else min(d, cap * (s + r))
    assert 0 <= mu <= 1
    assert abs((mu - alpha) * d + mu * s - (1 - mu) * r) <= 1e-12 * (d + s + r)


def test_before_all_signals_exist_only_the_prior_moves_mu():
    still = gk.GuidedAdaptiveController(NO_PRIOR)
    rollouts_only = Signals(rows_tensor([Row(False, 2, 1.0, x, 0.3) for x in (0.0, 1.0)]))
    for _ in range(25):
        still.observe(rollouts_only)
        assert still.step().item() == 0.5
    assert still.metrics()["gac/sigma_r2"] == 0.25
    assert still.metrics()["gac/sigma_s2"] == 0
    moved = gk.GuidedAdaptiveController(gk.ControllerConfig(prior=gk.ConstantPrior(0.51)))
    assert moved.step().item() == pytest.approx(0.505)  # half of the way from 0.5, which stands in for the estimate
    assert moved.step().item() == pytest.approx(0.5075)


def test_a_refresh_takes_the_signals_of_its_own_step_only():
    controller = gk.GuidedAdaptiveController(replace(NO_PRIOR, update_every=4))
    for t in range(9):
        controller.observe(Signals(rows_tensor([Row(False, 1, 0.0, x * t, 0.0) for x in (-1, 1)])))
        controller.step()
        want = {0: 1e-8, 4: 0.99 * 1e-8 + 0.01 * 16}
        if t in want:
            assert controller.metrics()["gac/sigma_r2"].item() == pytest.approx(want[t])
    assert controller.metrics()["gac/sigma_r2"].item() == pytest.approx(0.99 * want[4] + 0.01 * 64)


def test_the_kl_rule():
    target = gk.KLTarget(target=0.02, low=0.3, high=0.6, gain=0.1, init=0.5)
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=target))

    def alpha_after(kl):
        controller.step(kl)
        return controller.metrics()["gac/alpha"].item()

    assert alpha_after(0.02) == 0.5
    assert alpha_after(0.03) == pytest.approx(0.5 * math.exp(0.05))
    assert alpha_after(torch.tensor(100.0)) == pytest.approx(0.5 * math.exp(0.15))  # the excess counts as 1
    assert alpha_after(torch.tensor(100.0, dtype=torch.float64)) == 0.6  # clipped
    assert [alpha_after(x) for x in (math.nan, math.inf, -math.inf)] == [0.6] * 3
    assert controller.metrics()["gac/skipped"] == 3
    assert alpha_after(0) == pytest.approx(0.6 * math.exp(-0.1))
    assert [alpha_after(-5.0) for _ in range(9)][-1] == 0.3


def test_alpha_moves_before_mu_star_does():
    controller = gk.GuidedAdaptiveController(replace(NO_PRIOR, alpha=gk.KLTarget()))
    rows = [Row(True, 1, x, 0.0, 1e9) for x in (0, 1)] + [Row(False, 1, 0.0, x, 1e9) for x in (0, 1)]
    controller.observe(Signals(rows_tensor(rows)))
    controller.step(1.0)  # D dominates, so mu* = alpha
    assert controller.metrics()["gac/mu_star"].item() == pytest.approx(0.5 * math.exp(0.1), rel=1e-8)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e200, 1.7e154])
def test_what_is_not_finite_is_quarantined_signal_by_signal(value):
    """1e200 squared is not finite; 1.7e154 squared is, but three of its kind must be added."""
    controller = gk.GuidedAdaptiveController(replace(NO_PRIOR, update_every=1))
    good = [Row(True, 1, x, 0.0, 0.5) for x in (0, 1)] + [Row(False, 1, 0.0, x, 0.5) for x in (0, 1)]
    controller.observe(Signals(rows_tensor(good)))
    controller.step()
    before = controller.metrics()
    for i, (field, row) in enumerate({"nll": 0, "advantage": 2}.items()):
        bad = [replace(r) for r in good]
        setattr(bad[row], field, value)
        controller.observe(Signals(rows_tensor(bad)))
        controller.step()
        after = controller.metrics()
        assert after["gac/skipped"] == i + 1
        for key in ("gac/sigma_s2", "gac/sigma_r2", "gac/delta2"):
            assert after[key] == pytest.approx(before[key].item())
    bad = [replace(good[0], disagreement=value if value < math.inf else math.nan), *good[1:]]
    controller.observe(Signals(rows_tensor(bad)))
    controller.step()
    assert all(x.isfinite() for x in controller.metrics().values())


def test_micro_batches_give_the_bits_of_one_batch():
    rng, config = random.Random(0), gk.ControllerConfig(alpha=gk.KLTarget(), update_every=2)
    whole, parts = gk.GuidedAdaptiveController(config), gk.GuidedAdaptiveController(config)
    for t in range(40):
        rows = rows_tensor(observed_rows(rng, t)).float()
        whole.observe(Signals(rows))
        for part in rows.tensor_split(sorted(rng.sample(range(len(rows) + 1), k=min(2, len(rows))))):
            parts.observe(Signals(part))
        whole.step(0.03), parts.step(0.03)
        assert_same_state(whole, parts)
