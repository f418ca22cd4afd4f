"""The controller's step in CUDA C++, emulated on host threads: against the reference, the oracle, and itself."""

from __future__ import annotations

import random
from dataclasses import replace

import cuda_emulation
import pytest
import torch
from controller_support import NO_PRIOR, assert_same_state, cosine, observed_rows
from plain_controller import PlainController, rows_tensor

import gac_kernels as gk
from gac_kernels import controller_schema, library
from gac_kernels.signals import AGGREGATIONS, Signals


@pytest.fixture(scope="module", autouse=True)
def emulated():
    cuda_emulation.load()


CONFIGS = {
    "coefficient": gk.ControllerConfig(),
    "znorm": gk.ControllerConfig(znorm=True, trim=0.3),
    "logit": gk.ControllerConfig("logit", smoothing="reference"),
    "hidden": gk.ControllerConfig("hidden", prior=gk.ConstantPrior(0.3)),
    "kl, capped": gk.ControllerConfig(alpha=gk.KLTarget(), prior=None, disagreement_cap=0.4),
}


def some_rows(seed, sequences):
    """Rows of all twelve columns: demonstrations, rollouts, and now and then one without a token."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sequences, 12, generator=generator, dtype=torch.float64)
    rows[:, 0] = (torch.rand(sequences, generator=generator) < 0.4).double()
    rows[:, 1] = torch.randint(0, 7, (sequences,), generator=generator).double()
    rows[:, 2:3] *= rows[:, 1:2]
    rows[:, 3] *= 1 - rows[:, 0]
    rows[:, 4], rows[:, 7:9], rows[:, 10:] = rows[:, 4].abs(), rows[:, 7:9].abs() + 0.5, rows[:, 10:].abs()
    return rows


def arguments(config, rows, hidden=None, *, kl=None, steps=0, ways=("token-mean", "seq-mean-token-sum-norm")):
    controller = gk.GuidedAdaptiveController(config)
    state = controller._state.clone()
    state[controller_schema.STEPS] = steps
    kl = None if kl is None else torch.tensor(kl, dtype=torch.float64)
    weights = (*(AGGREGATIONS.index(way) for way in ways), 12.5)
    return state, rows, hidden, None, kl, *controller_schema.encode_config(config), *weights


def both(*args):
    """By CUDA C++ and by the reference."""
    with gk.use_backend("cuda"):
        got = library.call("controller_step", *args)
    with gk.use_backend("reference"):
        want = library.call("controller_step", *args)
    return got, want


def assert_close(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-14, equal_nan=True)
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0.0)
    assert got[1].dtype == torch.float32
    assert got[1].dim() == 0


# Fewer rows than a warp has lanes, than a block has threads, more, a power of two and not; and, at 2100, more than the
# emulated machine's 12 KiB of shared memory can sort.
@pytest.mark.parametrize("sequences", [0, 1, 3, 31, 64, 65, 130, 2100])
@pytest.mark.parametrize("name", ["coefficient", "znorm", "logit"])
def test_numbers_of_sequences(name, sequences):
    rows = some_rows(sequences, sequences)
    for dtype in (torch.float64, torch.float32):
        args = arguments(CONFIGS[name], rows.to(dtype))
        got, want = both(*args)
        assert_close(got, want)
        if sequences > 30:
            assert got[0][controller_schema.MEASURED].tolist() == [1, 1, 1]


@pytest.mark.parametrize("width", [0, 1, 31, 32, 33, 100])
@pytest.mark.parametrize("sequences", [0, 2, 5, 70])
def test_widths_of_hidden_states(width, sequences):
    rows = some_rows(sequences, sequences)
    hidden = torch.randn(sequences, width, generator=torch.Generator().manual_seed(width), dtype=torch.float64)
    hidden[rows[:, 1] == 0] = torch.nan  # of no sequence
    for of_rows, of_hidden in ((torch.float64, torch.float64), (torch.float32, torch.float64), (torch.float32,) * 2):
        args = arguments(CONFIGS["hidden"], rows.to(of_rows), hidden.to(of_hidden))
        got, want = both(*args)
        assert_close(got, want)
    assert got[0].isfinite().all()


@pytest.mark.parametrize("supervised", AGGREGATIONS)
@pytest.mark.parametrize("policy", AGGREGATIONS)
def test_weights_of_the_aggregations(policy, supervised):
    rows = some_rows(7, 20)
    for name, hidden in (("logit", None), ("hidden", rows[:, 2:9].contiguous())):
        got, want = both(*arguments(CONFIGS[name], rows, hidden, ways=(policy, supervised)))
        assert_close(got, want)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), -1e30, -1e-9, 1e200])
@pytest.mark.parametrize("column", [0, 1, 2, 3, 4, 7, 8, 10, 11])
def test_what_is_not_finite_is_counted(bad, column):
    rows = some_rows(3, 40)
    live = (rows[:, 1] > 0) & (rows[:, 0] == (1.0 if column == 2 else 0.0))
    rows[live.nonzero()[0], column] = bad
    for name, hidden in (
        ("coefficient", None),
        ("znorm", None),
        ("logit", None),
        ("hidden", some_rows(4, 40)[:, 2:9].contiguous()),
    ):
        got, want = both(*arguments(CONFIGS[name], rows, hidden))
        assert_close(got, want)
        assert got[0][controller_schema.SKIPPED] == want[0][controller_schema.SKIPPED]


@pytest.mark.parametrize("prior", [gk.CosinePrior(), gk.CosinePrior(0, 0), gk.CosinePrior(3, 5, 0.7, 0.2), None])
def test_the_prior_and_the_refresh_by_the_devices_count(prior):
    config = gk.ControllerConfig(prior=prior, update_every=4)
    rows = some_rows(5, 12)
    for steps in (0, 1, 2, 3, 4, 7, 8, 199, 200, 201, 600, 999, 1000, 5000):
        got, want = both(*arguments(config, rows, steps=steps))
        assert_close(got, want)
        assert got[0][controller_schema.MEASURED].tolist() == [float(steps % 4 == 0)] * 3
        assert got[0][controller_schema.STEPS] == steps + 1
        if prior is not None:
            assert got[0][controller_schema.PRIOR].item() == pytest.approx(prior.value(steps), rel=1e-12)


@pytest.mark.parametrize(
    "kl", [0.02, 0.5, -1.0, float("nan"), float("inf"), [0.03, 1.0, 2.0], [float("nan"), 0.0, 1.0]]
)
def test_the_kl_of_one_rank_and_of_all(kl):
    got, want = both(*arguments(CONFIGS["kl, capped"], some_rows(5, 12), kl=kl))
    assert_close(got, want)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_follows_the_reference(name):
    """A hundred steps of the controller itself, each from the state before it."""
    config, rng = replace(CONFIGS[name], update_every=3), random.Random(name)
    emulated, eager = gk.GuidedAdaptiveController(config), gk.GuidedAdaptiveController(config)
    for t in range(100):
        rows = some_rows(t, rng.randrange(12))
        signals = Signals(rows, has_sum_sq=True, hidden=rows[:, 2:9])
        kl = rng.choice([0.01, 0.05, float("nan")])
        for controller, backend in ((emulated, "cuda"), (eager, "reference")):
            with gk.use_backend(backend):
                controller.observe(signals)
                controller.step(kl)
    torch.testing.assert_close(emulated._state, eager._state, rtol=1e-10, atol=1e-13)
    assert emulated.state_dict()["skipped"] == eager.state_dict()["skipped"]


def test_a_run_follows_the_published_rule():
    config, rng = gk.ControllerConfig(update_every=2), random.Random(2)
    ours, plain = gk.GuidedAdaptiveController(config), PlainController(config, cosine)
    with gk.use_backend("cuda"):
        for t in range(60):
            rows = observed_rows(rng, t)
            ours.observe(Signals(rows_tensor(rows)))
            assert ours.step().item() == pytest.approx(plain.step(rows), abs=6e-8)


def test_the_same_call_gives_the_same_bits():
    hidden = some_rows(9, 300)[:, 2:9].contiguous()
    for name in CONFIGS:
        args = arguments(CONFIGS[name], some_rows(9, 300), hidden, kl=0.03)
        with gk.use_backend("cuda"):
            first = library.call("controller_step", *args)
            assert all(torch.equal(library.call("controller_step", *args)[0], first[0]) for _ in range(5))


def test_a_replayed_step_goes_on_by_the_state_on_the_device():
    """What a CUDA graph repeats: the operator on the same tensors, and copies into the state and mu it began with."""
    config = gk.ControllerConfig(update_every=3, prior=gk.CosinePrior(4, 9))
    with gk.use_backend("cuda"):
        captured, eager = gk.GuidedAdaptiveController(config), gk.GuidedAdaptiveController(config)
        for t in range(2):
            for controller in (captured, eager):
                controller.observe(Signals(some_rows(t, 12)))
                controller.step()
        state, mu, held = captured._state, captured.mu, eager.mu
        before = held.item()
        for t in range(2, 12):
            captured.observe(Signals(some_rows(t, 12)))
            captured._advance(None, capturing=True)
            eager.observe(Signals(some_rows(t, 12)))
            eager.step()
            assert captured._state is state
            assert captured.mu is mu
            assert torch.equal(mu, eager.mu)
        assert held.item() == before
        assert captured.steps == 12
        assert_same_state(captured, eager)
        captured.load_state_dict(gk.GuidedAdaptiveController(config).state_dict())
        assert captured._state is state
        assert mu.item() == 0.5
        assert captured.steps == 0


def test_several_ranks_cannot_be_captured(monkeypatch):
    monkeypatch.setattr("gac_kernels.controller.world_size", lambda group: 2)
    with pytest.raises(RuntimeError, match="CUDA graph needs a group of one rank, got 2"):
        gk.GuidedAdaptiveController(NO_PRIOR)._advance(None, capturing=True)


@pytest.mark.parametrize("form", ["controller_step_cuda", "controller_step", "controller_step_reference"])
def test_the_operator_is_registered_as_it_should(form):
    hidden = some_rows(9, 30)[:, 2:9].contiguous()
    for name in ("coefficient", "hidden"):
        args = arguments(CONFIGS[name], some_rows(9, 30), hidden)
        torch.library.opcheck(getattr(torch.ops.gac_kernels, form).default, args)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"state must have 13 elements, got 12", {0: torch.zeros(12, dtype=torch.float64)}),
        (r"state must have dtype float64", {0: torch.zeros(13)}),
        (r"rows must have 12 columns, got 11", {1: torch.zeros(3, 11)}),
        (r"rows must have dtype float32", {1: torch.zeros(3, 12).half()}),
        (r"rows must be contiguous", {1: torch.zeros(3, 24)[:, ::2]}),
        (r"hidden must be given", {2: None}),
        (r"hidden must have 40 rows, got 3", {2: torch.zeros(3, 7)}),
        (r"rows and estimate exclude each other", {3: torch.zeros(6, dtype=torch.float64)}),
        (r"kl must be given", {4: None}),
        (r"estimator must be in \[0, 2\], got 3", {5: 3}),
    ],
)
@pytest.mark.parametrize("form", ["controller_step_cuda", "controller_step"])
def test_the_operator_refuses_what_does_not_fit(form, match, change):
    if form == "controller_step" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    config = replace(CONFIGS["hidden"], alpha=gk.KLTarget())
    args = list(arguments(config, some_rows(1, 40), torch.zeros(40, 7), kl=0.1))
    for place, value in change.items():
        args[place] = value
    with pytest.raises(RuntimeError, match=match):
        getattr(torch.ops.gac_kernels, form)(*args)
