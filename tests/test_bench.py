"""The benchmark itself: its baseline is right, its checker sees errors, its clock measures what it says."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from gac_kernels import library
from gac_kernels.bench import eager, measure, peers, session
from gac_kernels.bench.case import MODES, Outputs
from gac_kernels.bench.cases import TokenCase
from gac_kernels.bench.check import WrongResult, compare, elementwise_bound
from gac_kernels.bench.measure import Contestant, copy_contestant, peak_bytes, quantile
from gac_kernels.bench.provider import Provider, Unavailable, verify
from gac_kernels.bench.providers import PROVIDERS as ALL_PROVIDERS
from gac_kernels.bench.session import run_case

PROVIDERS = ALL_PROVIDERS[TokenCase.kernel]


def test_bytes_count_inputs_and_outputs_once():
    case = TokenCase(8, 10)
    live, places = case.live_tokens, 80
    assert 40 <= live < places
    assert case.bytes("forward") == (4 + 4) * live + places + 4 * places
    assert case.bytes("backward") == 4 * live + 4 * places
    assert case.bytes("full") == (4 + 4) * live + places + 2 * 4 * places
    assert TokenCase(8, 10, torch.bfloat16).bytes("full") == (2 + 2) * live + places + (4 + 2) * places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(4, 1), (8, 37), (64, 300)], ids=str)
def test_baseline_and_backends_compute_the_same(size, dtype):
    names = ["eager", "eager-loss", "gac-reference"]
    names += ["gac-cpu"] if library.backends()["cpu"].startswith("cpu:") else []
    found = run_case(TokenCase(*size, dtype), names, modes=())
    assert not found.wrong
    assert list(found.errors) == names


@pytest.mark.parametrize("seed", range(3))
def test_baseline_sees_every_kind_of_token(seed):
    """Both branches, both signs of A and ratios on both sides of 1 are in the case: a slip in any shows."""
    batch = TokenCase(64, 64, seed=seed).batch
    live = batch.mask & ~batch.is_expert[:, None]
    assert 0 < batch.is_expert.sum() < 64
    assert (batch.advantages[~batch.is_expert] > 0).any() and (batch.advantages[~batch.is_expert] < 0).any()
    ratio = (TokenCase(64, 64, seed=seed).leaf().detach() - batch.old_logprobs)[live]
    assert (ratio > 0.1).any() and (ratio < -0.1).any()


def _spoiled(case, spoil):
    """The baseline with one thing wrong."""
    right = PROVIDERS["eager"](case)
    return replace(right, forward=lambda leaf: spoil(right.forward(leaf)))


SPOILT = {
    "loss off by 1e-4": lambda o: o._replace(loss=o.loss + 1e-4),
    "gradient off by 1e-4": lambda o: o._replace(loss=o.loss * (1 + 1e-4) - o.loss.detach() * 1e-4),
    "loss nan": lambda o: o._replace(loss=o.loss * torch.nan),
    "one log-prob off": lambda o: o._replace(
        logprobs=o.logprobs + torch.nn.functional.one_hot(torch.tensor(3), 64) * 1e-3
    ),
    "masked place not zero": lambda o: o._replace(logprobs=torch.where(o.logprobs == 0, -1e-3, o.logprobs)),
    "signals swapped": lambda o: o._replace(rows=o.rows[:, [0, 1, 2, 3, 4, 6, 5, 7, 8, 9, 10, 11]]),
    "signals off by 1e-4": lambda o: o._replace(rows=o.rows * (1 + 1e-4)),
    "a metric off": lambda o: o._replace(metrics=o.metrics | {"ratio_max": o.metrics["ratio_max"] * (1 + 1e-4)}),
    "a metric missing": lambda o: o._replace(metrics={k: v for k, v in o.metrics.items() if k != "approx_kl"}),
    "log-probs of another shape": lambda o: o._replace(logprobs=o.logprobs[:, :-1]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_checker_sees(what):
    case = TokenCase(16, 64)
    with pytest.raises(WrongResult, match=r"^eager: "):
        verify(_spoiled(case, SPOILT[what]), case)


@pytest.mark.parametrize("change", ["tau", "branches", "advantages", "mask", "mu"])
def test_checker_sees_a_wrong_formula(change, monkeypatch):
    """The baseline on other settings than the reference."""
    case = TokenCase(16, 64)
    case._expected  # noqa: B018  (of the true case)
    batch = case.batch
    if change == "tau":
        monkeypatch.setattr(eager, "_SAPO", replace(eager._SAPO, tau_neg=1.0))
    elif change == "branches":
        batch.is_expert[1] = True
    elif change == "advantages":
        batch.advantages[1] *= -1
    elif change == "mask":
        batch.mask[2, 0] = False
    else:
        case.mu.add_(0.01)
    with pytest.raises(WrongResult):
        verify(PROVIDERS["eager"](case), case)


def test_compare_is_strict():
    want = torch.tensor([1.0, 0.0], dtype=torch.float64)
    bound = elementwise_bound(want, torch.float32)
    assert compare("x", want.float(), want, bound) == 0.0
    for bad in ([1.0, float("nan")], [1.0, float("inf")], [1.0001, 0.0], [1.0, 1e-5]):
        with pytest.raises(WrongResult, match="x is"):
            compare("x", torch.tensor(bad), want, bound)
    with pytest.raises(WrongResult):  # a bound of 0 asks for equality
        compare("x", torch.tensor([1e-30]), torch.zeros(1), torch.zeros(1))


def test_a_wrong_provider_is_not_timed(monkeypatch):
    case = TokenCase(8, 64)
    wrong = _spoiled(case, SPOILT["loss off by 1e-4"])
    monkeypatch.setitem(PROVIDERS, "eager-loss", lambda case: replace(wrong, name="eager-loss"))
    found = run_case(case, ["eager", "eager-loss"], ["full"], budget_seconds=0)
    assert set(found.wrong) == {"eager-loss"} and "loss is" in found.wrong["eager-loss"]
    assert {record.provider for record in found.records} == {"eager", "copy"}


def test_records():
    found = run_case(TokenCase(8, 64), ["eager", "eager-loss"], budget_seconds=0)
    keys = {(r.provider, r.mode, r.metric) for r in found.records}
    assert keys == {(p, m, "speed") for p in ("eager", "eager-loss", "copy") for m in MODES} | {
        (p, m, "memory") for p in ("eager", "eager-loss") for m in MODES
    }
    for record in found.records:
        assert 0 <= record.p20 <= record.p50 <= record.p80
        assert (record.floor_ratio is None) == (record.metric == "memory")
        if record.provider == "copy":
            assert record.floor_ratio == 1.0
        elif record.metric == "speed":
            copy = found.find("copy", record.mode)
            assert record.floor_ratio == pytest.approx(record.p50 / copy.p50)
    full, loss_only = (found.find(name, "forward", "memory").p50 for name in ("eager", "eager-loss"))
    assert full > loss_only > 0  # more outputs, more intermediates


def test_absent_providers_say_why(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(peers, "installed_version", lambda name: None)
    found = run_case(TokenCase(4, 4), ["gac-triton", "gac-cuda", "liger", "verl", "trl"], ["full"], budget_seconds=0)
    assert set(found.absent) == {"gac-triton", "gac-cuda", "liger", "verl", "trl"}
    assert "interpreter" in found.absent["gac-triton"]
    assert found.absent["liger"] == "liger-kernel is not installed"
    assert found.records == []


def test_a_failing_compiler_is_named(monkeypatch):
    def compile(*args, **kwargs):
        def call(*args, **kwargs):
            raise RuntimeError("wrapper") from OSError("no compiler here\nand more")

        return call

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(Unavailable, match=r"torch.compile failed: OSError: no compiler here$"):
        PROVIDERS["compile"](TokenCase(4, 4))


def test_liger_computes_our_policy_loss(monkeypatch):
    pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # the formula is in question
    case = TokenCase(16, 64)
    assert verify(PROVIDERS["liger"](case), case) <= 1.0


# measure ----------------------------------------------------------------------------------------------------------
def test_rounds_are_interleaved_and_paired():
    calls: list[str] = []
    contestants = [Contestant(name, lambda _, name=name: calls.append(name)) for name in "abc"]
    timings = measure.measure(contestants, budget_seconds=0, min_rounds=20, warmup_rounds=2, seed=1)
    assert list(timings) == ["a", "b", "c"]
    assert {len(t.seconds) for t in timings.values()} == {20}
    rounds = ["".join(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(rounds) == 22 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert len(set(rounds)) > 3  # the order changes


def test_only_run_is_timed():
    slow = Contestant("slow", lambda state: state, prepare=lambda: time.sleep(0.02))
    timing = measure.measure([slow], budget_seconds=0, min_rounds=3, warmup_rounds=0)["slow"]
    assert timing.p20 < 0.015


def test_budget_ends_the_rounds():
    sleeper = Contestant("sleeper", lambda _: time.sleep(0.01))
    timing = measure.measure([sleeper], budget_seconds=0.2, min_rounds=2, max_rounds=1000, warmup_rounds=0)["sleeper"]
    assert 2 <= len(timing.seconds) <= 21
    assert len(measure.measure([sleeper], budget_seconds=9, max_rounds=3, warmup_rounds=0)["sleeper"].seconds) == 3


def test_cpu_clock_counts_running_time_only():
    sleeper = Contestant("sleeper", lambda _: time.sleep(0.03))
    wall, cpu = (
        measure.measure([sleeper], clock=clock, budget_seconds=0, min_rounds=3, warmup_rounds=0)["sleeper"].p50
        for clock in ("wall", "cpu")
    )
    assert wall >= 0.03 > 3 * cpu


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.2) == pytest.approx(2.0)
    assert quantile([7.0], 0.8) == 7.0


def test_peak_bytes():
    mib = 2**20

    def run(held):
        first = torch.empty(8 * mib, dtype=torch.uint8)
        del first
        second = torch.empty(4 * mib, dtype=torch.uint8)
        third = torch.empty(2 * mib, dtype=torch.uint8)
        return second, third, held

    one = Contestant("one", run, prepare=lambda: torch.empty(64 * mib, dtype=torch.uint8))
    assert 8 * mib <= peak_bytes(one) < 8.1 * mib


def test_copy_moves_as_many_bytes():
    source, target = TokenCase(8, 16).copy_buffers(500)
    copy = copy_contestant(source, target)
    assert copy.run(copy.prepare()).nbytes == 500
    assert torch.equal(source, target)


def test_outputs_that_are_not_computed_are_not_compared():
    case = TokenCase(8, 16)
    full = PROVIDERS["eager"](case).forward

    def loss_alone(leaf):
        return Outputs(full(leaf).loss)

    assert verify(Provider("loss", "0", loss_alone), case) <= 1.0


def test_contestants_run_on_a_fresh_leaf():
    case = TokenCase(8, 16)
    one = session.contestant(PROVIDERS["eager"](case), case, "full")
    first, second = (one.run(one.prepare())[1][0] for _ in range(2))
    assert torch.equal(first, second)
    assert case.leaf().grad is None
