"""What the controller promises besides its numbers: no device reads, a mu that stays, exact resume, clear errors."""

import io
import math
import random
import warnings
from dataclasses import dataclass, fields

import pytest
import torch
from controller_support import NO_PRIOR, assert_same_state, cosine, observed_rows
from host_reads import forbid_host_reads
from plain_controller import rows_tensor

import gac_kernels as gk
from gac_kernels import controller_schema
from gac_kernels import signals as sig
from gac_kernels.reference.controller import controller_step as reference_step
from gac_kernels.signals import Signals

pytestmark = pytest.mark.usefixtures("backend")

ESTIMATORS = ("coefficient", "logit", "hidden")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("alpha", [0.5, gk.KLTarget()])
@pytest.mark.parametrize("smoothing", ["estimate", "reference"])
def test_no_step_reads_the_device(estimator, alpha, smoothing, backend):
    config = gk.ControllerConfig(estimator, smoothing, alpha=alpha, znorm=True, update_every=3, disagreement_cap=5.0)
    rows = rows_tensor(observed_rows(random.Random(1), 0)).float()

    def run(device):
        controller = gk.GuidedAdaptiveController(config, device=device)
        signals = Signals(rows.to(device), has_sum_sq=True, hidden=torch.ones(len(rows), 4, device=device))
        kl = torch.ones((), device=device)
        counts = []
        with forbid_host_reads() as watch:
            for _ in range(7):
                before = watch.operators
                controller.observe(signals)
                controller.step(kl)
                counts.append(watch.operators - before)
            controller.step(0.5)
            controller.metrics()
            controller.state_dict()
        return counts

    counts = run("cpu")
    if backend == "reference":
        assert run("meta")  # there is nothing to read, and an attempt raises
    # The step is one operator; the others bring the signals and the KL into its form.
    assert max(counts) <= 8, counts
    assert max(counts[1], counts[2], counts[4], counts[5]) <= (5 if config.alpha != 0.5 else 3)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("alpha", [0.5, gk.KLTarget()])
def test_the_reference_of_the_step_reads_nothing_from_the_device(estimator, alpha):
    """Its operators run inside of ours, where no watch sees them."""
    config = gk.ControllerConfig(estimator, alpha=alpha, disagreement_cap=5.0)
    rows = rows_tensor(observed_rows(random.Random(1), 0))
    hidden = torch.ones(len(rows), 4) if estimator == "hidden" else None
    state, kl = gk.GuidedAdaptiveController(config)._state, torch.full((), 0.1, dtype=torch.float64)
    static = (*controller_schema.encode_config(config), 1, 0, 0.0)
    with forbid_host_reads() as watch:
        reference_step(state, rows, hidden, None, kl, *static)
        before = watch.operators
        reference_step(state, None, None, None, kl, *static)
    assert before > 60
    # Between refreshes the scalar arithmetic is all there is: a bound on launches, should it live on a GPU.
    assert watch.operators - before <= (62 if config.alpha != 0.5 else 44)


def test_mu_of_a_step_stays_what_it_was():
    """A backward that runs after step() must see the mu of its own forward."""
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(prior=gk.ConstantPrior(0.9)))
    x = torch.tensor(2.0, requires_grad=True)
    mu = controller.mu
    loss = x * x * mu
    assert controller.step() is not mu
    loss.backward()
    assert mu.item() == 0.5
    assert x.grad.item() == 2.0
    assert controller.mu.item() == pytest.approx(0.51)


def test_no_gradient_enters_and_inference_mode_does_not_spoil_mu():
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=gk.KLTarget()))
    rows = torch.ones(3, 12, requires_grad=True)
    controller.observe(Signals(rows * 1.0))
    assert not controller.step(torch.tensor(0.1, requires_grad=True)).requires_grad
    with torch.inference_mode():
        controller.observe(Signals(torch.ones(3, 12)))
        controller.step(torch.tensor(0.1))
    x = torch.tensor(1.0, requires_grad=True)
    (x * controller.mu).backward()
    assert x.grad == controller.mu


def test_a_forgotten_observe_is_said_once_a_silence():
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=3))
    signals = gk.Signals(torch.zeros(2, 12))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            controller.step()
        assert not said  # the first refresh may come before the first batch
        for _ in range(9):
            controller.step()
        assert len(said) == 1 and "has observed nothing for two refreshes, up to step 3" in str(said[0].message)
        assert said[0].filename == __file__
        controller.observe(signals)
        for _ in range(12):
            controller.step()
        assert len(said) == 2


def test_metrics_are_copies():
    controller = gk.GuidedAdaptiveController()
    state = gk.GuidedAdaptiveController()
    metrics = controller.metrics()
    assert list(metrics) == [
        f"gac/{k}" for k in ("mu", "mu_star", "sigma_s2", "sigma_r2", "delta2", "alpha", "prior", "skipped")
    ]
    assert metrics["gac/mu"].dtype == torch.float32
    assert metrics["gac/mu"] == controller.mu
    for value in metrics.values():
        assert value.dim() == 0
        assert not value.requires_grad
        value.fill_(7.0)
    assert_same_state(controller, state)
    assert controller.mu == 0.5


def test_metrics_without_a_prior_show_the_estimate():
    controller = gk.GuidedAdaptiveController(NO_PRIOR)
    assert controller.metrics()["gac/prior"] == 0.5


def drive(controller, rng, steps):
    for _ in range(steps):
        controller.observe(Signals(rows_tensor(observed_rows(rng, controller.steps)).float()))
        controller.step(rng.choice([0.01, 0.05, math.nan]))


@pytest.mark.parametrize("smoothing", ["estimate", "reference"])
@pytest.mark.parametrize("cut", [0, 1, 9, 10, 37])
def test_a_resumed_controller_goes_on_bit_for_bit(cut, smoothing):
    config = gk.ControllerConfig(alpha=gk.KLTarget(), smoothing=smoothing, update_every=5)
    straight, rng = gk.GuidedAdaptiveController(config), random.Random(5)
    drive(straight, rng, cut)
    file = io.BytesIO()
    torch.save(straight.state_dict(), file)
    file.seek(0)
    state, place = torch.load(file, weights_only=True), rng.getstate()
    drive(straight, rng, 60)
    resumed = gk.GuidedAdaptiveController(config)
    drive(resumed, random.Random(6), 3)
    resumed.observe(Signals(torch.ones(1, 12)))  # belongs to a step that the resumed run does not know
    resumed.load_state_dict(state)
    rng.setstate(place)
    drive(resumed, rng, 60)
    assert_same_state(straight, resumed)
    assert torch.equal(straight.mu, resumed.mu)
    assert straight.steps == cut + 60


def test_a_state_dict_shares_no_memory():
    """Neither with the controller it was taken from, nor with the one that loads it."""
    config, rng = gk.ControllerConfig(alpha=gk.KLTarget()), random.Random(0)
    source, reader, twin = (gk.GuidedAdaptiveController(config) for _ in range(3))
    drive(source, rng, 13)
    state = source.state_dict()
    reader.load_state_dict(state)
    twin.load_state_dict(source.state_dict())
    for value in state.values():
        if torch.is_tensor(value):
            value.zero_()
    assert_same_state(source, twin)
    assert_same_state(reader, twin)


def broken(state, **changes):
    return {k: v for k, v in {**state, **changes}.items() if v is not ...}


@pytest.mark.parametrize(
    ("match", "changes"),
    [
        (r"lacks \['alpha', 'mu'\]", {"mu": ..., "alpha": ...}),
        (r"unknown keys \['nu'\]", {"nu": 1}),
        (r"version.* must be in \[1, 2\], got 3", {"version": 3}),
        ("blend: 0.5 here, 0.25 there", {"config": gk.ControllerConfig(blend=0.25).as_dict()}),
        ("prior: .*CosinePrior.* here, None there", {"config": NO_PRIOR.as_dict()}),
        ("'step'.* got -1", {"step": -1}),
        ("'step'.* got 1.0", {"step": 1.0}),
        (r"'signals'.*\(3,\).*float64.*\(2,\)", {"signals": torch.zeros(2, dtype=torch.float64)}),
        ("'mu'.*float64.*float32", {"mu": torch.tensor(0.5)}),
        ("'mu'.* must be in .0.05, 0.9., got 0.95", {"mu": torch.tensor(0.95, dtype=torch.float64)}),
        ("'alpha'.* got nan", {"alpha": torch.tensor(math.nan, dtype=torch.float64)}),
        ("'measured'.* got float", {"measured": 1.0}),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(match, changes):
    controller, twin = gk.GuidedAdaptiveController(), gk.GuidedAdaptiveController()
    for c in (controller, twin):
        drive(c, random.Random(1), 13)
    good = gk.GuidedAdaptiveController().state_dict()
    with pytest.raises((ValueError, TypeError), match=match):
        controller.load_state_dict(broken(good, **changes))
    assert_same_state(controller, twin)
    assert controller.mu == twin.mu


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "estimator .* 'oracle'", lambda: gk.ControllerConfig(estimator="oracle")),
        (ValueError, "smoothing .* 'none'", lambda: gk.ControllerConfig(smoothing="none")),
        (ValueError, r"ema_beta .* \[0, 1\), got 1", lambda: gk.ControllerConfig(ema_beta=1)),
        (ValueError, "update_every .* got 0", lambda: gk.ControllerConfig(update_every=0)),
        (TypeError, "update_every .* 2.5", lambda: gk.ControllerConfig(update_every=2.5)),
        (ValueError, r"blend .* \[0, 1\], got 1.5", lambda: gk.ControllerConfig(blend=1.5)),
        (ValueError, "blend .* nan", lambda: gk.ControllerConfig(blend=math.nan)),
        (TypeError, "blend .* '0.5'", lambda: gk.ControllerConfig(blend="0.5")),
        (TypeError, "blend .* True", lambda: gk.ControllerConfig(blend=True)),
        (ValueError, "change_cap .* 0", lambda: gk.ControllerConfig(change_cap=0)),
        (ValueError, "mu_max .* 1.1", lambda: gk.ControllerConfig(mu_max=1.1)),
        (ValueError, r"mu_min .* \[0, 0.4\], got 0.45", lambda: gk.ControllerConfig(mu_min=0.45, mu_max=0.4)),
        (ValueError, r"init_mu .* \[0.05, 0.9\], got 0.95", lambda: gk.ControllerConfig(init_mu=0.95)),
        (ValueError, r"trim .* \[0, 0.5\), got 0.5", lambda: gk.ControllerConfig(trim=0.5)),
        (ValueError, "alpha .* -0.1", lambda: gk.ControllerConfig(alpha=-0.1)),
        (TypeError, "alpha .* None", lambda: gk.ControllerConfig(alpha=None)),
        (TypeError, "prior .* 0.5", lambda: gk.ControllerConfig(prior=0.5)),
        (
            TypeError,
            "prior must be .* got Own",
            lambda: gk.ControllerConfig(prior=type("Own", (gk.ConstantPrior,), {})(0.5)),
        ),
        (ValueError, "disagreement_cap .* 0", lambda: gk.ControllerConfig(disagreement_cap=0.0)),
        (TypeError, "znorm .* 1", lambda: gk.ControllerConfig(znorm=1)),
        (ValueError, "target .* 0", lambda: gk.KLTarget(target=0.0)),
        (ValueError, "low .* 0", lambda: gk.KLTarget(low=0.0)),
        (ValueError, "low .* 0.99", lambda: gk.KLTarget(low=0.99)),
        (ValueError, "high .* 1.5", lambda: gk.KLTarget(high=1.5)),
        (ValueError, "gain .* -1", lambda: gk.KLTarget(gain=-1)),
        (ValueError, "init .* 0.05", lambda: gk.KLTarget(init=0.05)),
        (ValueError, "warmup .* -1", lambda: gk.CosinePrior(warmup=-1)),
        (TypeError, "decay .* 1.5", lambda: gk.CosinePrior(decay=1.5)),
        (ValueError, "peak .* 2", lambda: gk.CosinePrior(peak=2)),
        (ValueError, "valley .* -0.1", lambda: gk.CosinePrior(valley=-0.1)),
        (ValueError, "mu .* 1.2", lambda: gk.ConstantPrior(1.2)),
        (TypeError, "config .* 3", lambda: gk.GuidedAdaptiveController(3)),
    ],
)
def test_configuration_errors_name_the_field(error, match, make):
    with pytest.raises(error, match=match):
        make()


def test_configurations_are_values():
    assert gk.ControllerConfig(alpha=1) == gk.ControllerConfig(alpha=1.0)
    assert hash(gk.ControllerConfig()) == hash(gk.ControllerConfig())
    assert gk.ControllerConfig(alpha=gk.KLTarget()).as_dict()["alpha"]["kind"] == "KLTarget"


def test_priors():
    prior = gk.CosinePrior()
    assert [prior.value(t) for t in (0, 100, 200, 1000, 5000)] == [0.0, 0.425, 0.85, 0.15, 0.15]
    assert prior.value(600) == pytest.approx(0.5)
    assert max(abs(prior.value(t) - cosine(t)) for t in range(1200)) < 1e-15
    assert gk.CosinePrior(warmup=0).value(0) == 0.85
    assert gk.CosinePrior(warmup=0, decay=0).value(0) == 0.15
    assert gk.ConstantPrior(0.25).value(17) == 0.25


@pytest.mark.parametrize(
    ("estimator", "match"),
    [("hidden", "'hidden' needs signals that carry"), ("logit", "'logit' needs signals made with")],
)
def test_signals_that_the_estimator_cannot_use_are_refused_at_once(estimator, match):
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(estimator))
    with pytest.raises(ValueError, match=match):
        controller.observe(Signals(torch.ones(2, 12)))


def test_signals_must_fit_the_controller_and_each_other():
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig("logit"))
    with pytest.raises(TypeError, match="signals must be Signals, got Tensor"):
        controller.observe(torch.ones(2, 12))
    with pytest.raises(ValueError, match="cpu, got meta"):
        controller.observe(Signals(torch.ones(2, 12, device="meta"), has_sum_sq=True))
    controller.observe(Signals(torch.ones(2, 12), has_sum_sq=True))
    with pytest.raises(ValueError, match="policy_aggregation"):
        controller.observe(Signals(torch.ones(2, 12), has_sum_sq=True, policy_aggregation="token-mean"))


def test_what_the_estimator_does_not_read_may_differ():
    """Padded micro-batches of different widths, say: only the logit estimator weighs by norm_length."""
    controller = gk.GuidedAdaptiveController()
    controller.observe(Signals(torch.ones(2, 12), has_sum_sq=True, norm_length=7.0))
    controller.observe(Signals(torch.ones(2, 12), norm_length=9.0, hidden=torch.ones(2, 3)))
    controller.step()
    assert controller.metrics()["gac/delta2"] == 1


def test_kl_errors():
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=gk.KLTarget()))
    with pytest.raises(ValueError, match=r"step\(\) needs kl"):
        controller.step()
    with pytest.raises(ValueError, match=r"kl must be 0-d on cpu, got shape \(1,\)"):
        controller.step(torch.ones(1))
    with pytest.raises(ValueError, match=r"kl must be 0-d on cpu, .* on meta"):
        controller.step(torch.ones((), device="meta"))
    with pytest.raises(TypeError, match=r"kl .* '0.1'"):
        controller.step("0.1")
    assert controller.steps == 0
    assert controller.metrics()["gac/alpha"] == 0.5


def test_kl_is_ignored_under_a_fixed_alpha():
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(prior=None))
    assert controller.step(math.nan) == 0.5
    assert controller.metrics()["gac/skipped"] == 0


def test_columns():
    assert [sig.SIGNAL_COLUMNS[i] for i in (sig.EXPERT, sig.TOKENS, sig.OWN_NORM, sig.DIFF_NORM)] == [
        "expert", "tokens", "own_norm", "diff_norm",
    ]  # fmt: skip


def test_every_option_of_the_configuration_is_known_to_the_operator():
    """An option that the kernels do not know must be one of the estimators', with a default that changes nothing; then
    it belongs into this test, and into the call of signals.estimate in the controller."""
    assert {field.name for field in fields(gk.ControllerConfig)} == controller_schema.ENCODED_FIELDS


def test_an_option_that_the_operator_does_not_know_is_estimated_outside():
    @dataclass(frozen=True)
    class WithOption(gk.ControllerConfig):
        debias: bool = False

    controllers = [gk.GuidedAdaptiveController(WithOption(update_every=1, debias=debias)) for debias in (False, True)]
    assert [controller._fused for controller in controllers] == [True, False]
    rng = random.Random(4)
    for t in range(30):
        signals = Signals(rows_tensor(observed_rows(rng, t)))
        for controller in controllers:
            controller.observe(signals)
            controller.step()
    fused, given = (controller._state for controller in controllers)
    torch.testing.assert_close(fused, given, rtol=1e-12, atol=0)
