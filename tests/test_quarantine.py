"""What enters the controller is finite and not negative; all else changes nothing and is counted. What it saves can be
loaded, and is then what it was to the last bit."""

from __future__ import annotations

import io
import itertools
import math
import random
import warnings
from dataclasses import replace

import pytest
import torch
from controller_support import NO_PRIOR, assert_same_state
from hypothesis import given, settings
from hypothesis import strategies as st

import gac_kernels as gk
from gac_kernels import signals as sig
from gac_kernels.signals import Signals

S, T = 6, 5
NAN, INF = math.nan, math.inf
ESTIMATORS = ("coefficient", "logit", "hidden")
BATCH = gk.TokenBatch.from_padded(
    torch.zeros(S, T, dtype=torch.long),
    torch.ones(S, T),
    is_expert_S=torch.arange(S) < 3,
    advantages=torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, 0.5]),
)
LOGP = -torch.rand(S, T, generator=torch.Generator().manual_seed(0)) - 0.1
EACH_STEP = replace(NO_PRIOR, update_every=1)


def good() -> Signals:
    out = gk.hybrid_loss(LOGP, BATCH, gk.HybridObjective(), 0.5, sum_sq=torch.full((S, T), 0.5))
    return replace(out.signals, hidden=out.signals.rows[:, 1:4] + 0.5)


def signals_of(controller) -> torch.Tensor:
    return controller.state_dict()["signals"]


@pytest.mark.parametrize("value", [NAN, INF, -INF, -1e30, -1.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("row", [1, 4], ids=["demonstration", "rollout"])
def test_one_bad_row_never_poisons(estimator, value, row, backend):
    """Each column of one row in turn. Afterwards the state is finite, what was not taken is counted, and good signals
    are taken as if nothing had been."""
    read = {
        "coefficient": {0, 1, 2, 3, 4}, "logit": {0, 1, 10, 11}, "hidden": {0, 1, 12, 13, 14},
    }[estimator]  # fmt: skip
    for column in range(15):
        controller = gk.GuidedAdaptiveController(replace(EACH_STEP, estimator=estimator))
        controller.observe(good())
        controller.step()
        before, bad = controller.state_dict(), good()
        (bad.rows if column < 12 else bad.hidden)[row, column % 12] = value
        controller.observe(bad)
        controller.step()
        after = controller.state_dict()
        # Finite numbers below 0 are numbers where a column is no sum of squares and no count.
        number = value in (-1e30, -1.0) and column not in (0, 1, 4, 10, 11)
        unread = column not in read or (column, row) in {(2, 4), (3, 1)}
        if number or unread:
            assert after["skipped"] == 0 or estimator != "logit", column
        else:
            assert after["skipped"] >= 1, column
            assert (after["signals"] == before["signals"]).sum() >= after["skipped"], column
        if unread and estimator != "hidden":
            torch.testing.assert_close(after["signals"], before["signals"], rtol=1e-12, atol=0)
        for _ in range(3):
            controller.observe(good())
            assert math.isfinite(float(controller.step()))
        state = controller.state_dict()
        assert all(state[name].isfinite().all() for name in ("mu", "mu_star", "estimate", "signals"))
        assert (state["signals"] >= 0).all()
        gk.GuidedAdaptiveController(replace(EACH_STEP, estimator=estimator)).load_state_dict(state)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("value", [NAN, INF, -INF, -3.0])
@pytest.mark.parametrize("column", [sig.EXPERT, sig.TOKENS])
def test_a_row_that_does_not_say_what_it_is_spoils_all_three_signals(estimator, value, column, backend):
    controller = gk.GuidedAdaptiveController(replace(EACH_STEP, estimator=estimator))
    controller.observe(good())
    controller.step()
    before, bad = signals_of(controller), good()
    bad.rows[2, column] = value
    controller.observe(bad)
    controller.step()
    assert controller.metrics()["gac/skipped"] == 3
    assert torch.equal(signals_of(controller), before)


@pytest.mark.parametrize("value", [-INF, -1e30, NAN, INF])
def test_a_sum_of_squares_that_is_none_is_left_out(value, every_backend):
    """Through the loss: one token of a rollout, whose norm the estimator then does not have."""
    sum_sq = torch.full((S, T), 0.5)
    sum_sq[4, 3] = value
    rows = gk.hybrid_loss(LOGP, BATCH, gk.HybridObjective(), 0.5, sum_sq=sum_sq).signals.rows
    assert not rows[4, sig.OWN_NORM].isfinite() and not rows[4, sig.DIFF_NORM].isfinite()
    others = [0, 1, 2, 3, 5]
    assert rows[others].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_squared_norms_of_confident_tokens_are_not_negative(dtype, every_backend):
    """1 - 2 p + sum p^2 rounds to -1e-7 there; by its arithmetic it is 0 or more. Against float64."""
    generator = torch.Generator().manual_seed(3)
    gap = torch.rand(S, T, generator=generator, dtype=torch.float64) * 20
    logits = torch.stack((gap, torch.zeros_like(gap)), -1)
    wide = logits.log_softmax(-1)
    p, others = wide[..., 0].exp(), wide[..., 1].exp()
    logp, sum_sq = wide[..., 0].to(dtype), (p.square() + others.square()).to(dtype)
    batch = replace(BATCH, advantages=BATCH.advantages.to(dtype))
    rows = gk.hybrid_loss(logp, batch, gk.HybridObjective(gk.CISPO()), 0.5, sum_sq=sum_sq)
    rows = rows.signals.rows.double()
    assert (rows[:, sig.OWN_NORM] >= 0).all() and (rows[:, sig.DIFF_NORM] >= 0).all()
    norm, cs = 2 * others.square(), -p * (1 - p)
    cr = torch.where(BATCH.is_expert[:, None], 0.0, -BATCH.advantages.double()[:, None])
    own = torch.where(BATCH.is_expert[:, None], cs, cr)
    near = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-13}
    torch.testing.assert_close(rows[:, sig.OWN_NORM], (own.square() * norm).sum(1), **near)
    torch.testing.assert_close(rows[:, sig.DIFF_NORM], ((cs - cr).square() * norm).sum(1), **near)


@pytest.mark.parametrize(("share", "taken"), [(-1e-9, True), (-0.007, True), (-0.009, False), (-1.0, False)])
def test_what_rounding_takes_below_0_counts_as_0(share, taken, backend):
    """Signals made elsewhere: down to 2^-7 of the sum of c^2, which is what 16 bits round, a squared norm is 0."""
    rows = good().rows.double()
    rows[:, sig.CS2 : sig.CSCR] = 2.0
    rows[:, sig.DISAGREEMENT] = 3.0
    rows[:, sig.OWN_NORM], rows[:, sig.DIFF_NORM] = 2.0 * share, 3.0 * share
    controller = gk.GuidedAdaptiveController(replace(EACH_STEP, estimator="logit"))
    controller.observe(Signals(rows, True))
    controller.step()
    state = controller.state_dict()
    assert state["measured"].tolist() == [taken] * 3
    assert state["skipped"] == (0 if taken else 3)
    assert (state["signals"] >= 0).all() and state["signals"][2] == 0


HOSTILE = st.sampled_from([0.0, 1.0, -1.0, 2.5, NAN, INF, -INF, 1e200, -1e200, 1e300, -1e-9, 1e-320, 7.0])


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.lists(HOSTILE, min_size=15, max_size=15), max_size=5),
    st.lists(HOSTILE, min_size=4, max_size=4),
    st.sampled_from(
        list(itertools.product(("coefficient", "logit", "hidden"), ("estimate", "reference"), (False, True)))
    ),
)
@pytest.mark.parametrize("backend_name", ["reference", "cpu"])
def test_whatever_is_saved_can_be_loaded(backend_name, rows, kls, kind):
    """Any rows and KLs: the state stays finite, loads into another controller, and is the same bits there."""
    if backend_name == "cpu" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    estimator, smoothing, znorm = kind
    config = gk.ControllerConfig(
        estimator, smoothing, ema_beta=0.5, update_every=1, alpha=gk.KLTarget(), znorm=znorm, disagreement_cap=2.0
    )
    controller, other = gk.GuidedAdaptiveController(config), gk.GuidedAdaptiveController(config)
    with gk.use_backend(backend_name):
        for kl in kls:
            values = torch.tensor(rows, dtype=torch.float64).reshape(-1, 15)
            controller.observe(Signals(values[:, :12], True, hidden=values[:, 12:]))
            controller.observe(good())
            controller.step(kl)
            file = io.BytesIO()
            torch.save(controller.state_dict(), file)
            file.seek(0)
            other.load_state_dict(torch.load(file, weights_only=True))
            assert_same_state(controller, other)
            assert all(value.isfinite() for value in controller.metrics().values())
            assert config.mu_min <= float(controller.mu) <= config.mu_max


@pytest.mark.parametrize("prior", [gk.CosinePrior(7, 11, 0.83, 0.17), gk.ConstantPrior(1 / 3), None])
@pytest.mark.parametrize("smoothing", ["estimate", "reference"])
def test_a_restored_controller_has_the_last_bit_of_everything(prior, smoothing, backend):
    """Every metric, at every step: the prior's cosine too, of which a device and a host compute other last bits."""
    config = gk.ControllerConfig(smoothing=smoothing, prior=prior, alpha=gk.KLTarget(), update_every=3)
    controller, draw = gk.GuidedAdaptiveController(config), random.Random(2)
    for _ in range(25):
        controller.observe(gk.signals_from_logprobs(LOGP * draw.uniform(0.5, 2.0), BATCH))
        controller.step(draw.choice([0.013, 0.05, NAN]))
        restored = gk.GuidedAdaptiveController(config)
        restored.load_state_dict(controller.state_dict())
        ours, theirs = controller.metrics(), restored.metrics()
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name
        assert torch.equal(controller._state, restored._state)
        assert controller.steps == restored.steps and torch.equal(controller.mu, restored.mu)


def test_signals_of_a_step_that_has_not_ended_are_not_lost_in_silence():
    """They are no part of the state, as accumulated gradients are none of an optimizer's: told where they'd count."""
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.state_dict()
    controller.observe(good())
    with pytest.warns(RuntimeWarning, match="leaves out the signals of 1 micro-batches .* save after step"):
        saved = controller.state_dict()
    controller.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        controller.observe(good())  # of a step that does not refresh: nobody will read them
        controller.state_dict()
    again = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=2))
    again.load_state_dict(saved)
    again.observe(good())  # the step is repeated
    again.step()
    assert_same_state(controller, again)


@pytest.mark.parametrize(
    "bounds", [(0.1, 0.1), (0.3, 0.7), (0.05, 0.9), (0.1, 0.4), (1 / 3, 2 / 3), (0.0, 1.0), (0.7, 0.7)]
)
def test_mu_in_float32_does_not_leave_its_bounds(bounds, backend):
    """Compared with the float64 bounds, as a user's assertion compares; 0.1 and 0.7 lie between two float32. Where no
    float32 lies inside, the nearest."""
    low, high = bounds
    for init, pull in ((low, 0.0), (high, 1.0)):
        config = gk.ControllerConfig(
            prior=gk.ConstantPrior(pull), blend=0.0, mu_min=low, mu_max=high, init_mu=init, change_cap=0.01
        )
        controller = gk.GuidedAdaptiveController(config)
        restored = gk.GuidedAdaptiveController(config)
        restored.load_state_dict(controller.state_dict())
        for mu in (controller.mu, restored.mu, controller.step(), controller.metrics()["gac/mu"]):
            assert mu.dtype == torch.float32
            assert low <= mu.item() <= high or (low == high and mu == torch.tensor(low))
            assert abs(mu.item() - init) <= 2**-24


def test_a_state_of_version_1_with_a_rounded_norm_is_read():
    controller = gk.GuidedAdaptiveController()
    state = {name: value for name, value in controller.state_dict().items() if name != "prior"} | {"version": 1}
    state["signals"] = torch.tensor([1.0, 2.0, -1e-9], dtype=torch.float64)
    controller.load_state_dict(state)
    assert signals_of(controller).tolist() == [1.0, 2.0, 0.0]
    for worse in (NAN, -INF):
        state["signals"] = torch.tensor([1.0, 2.0, worse], dtype=torch.float64)
        with pytest.raises(ValueError, match=r"'signals'.* must be in"):
            controller.load_state_dict(state)
