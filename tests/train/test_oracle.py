"""The oracle against every batch's gradient at once, the statistics against hand values, and the command's promises."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import small

import gac_kernels as gk
from gac_kernels.cli import main
from gac_kernels.statistics import correlate, pearson, ranks, spearman
from gac_kernels.train.loop import Trainer
from gac_kernels.train.oracle import SHARES, Half, Moments, Oracle, branch_gradient, distance2, optimum


def trainer(**settings):
    sizes = {"prompts_per_step": 4, "demonstrations_per_step": 4, "demonstration_pool": 60, "dtype": "float64"}
    return Trainer(small(**{**sizes, **settings}))


def moments(rows):
    found = Moments()
    for row in rows:
        found.add([row[:2], row[2:]])
    return found


# moments -------------------------------------------------------------------------------------------------------------
def test_moments_are_those_of_all_gradients_at_once():
    a, b = torch.randn(9, 5, dtype=torch.float64), 1.0 + torch.randn(7, 5, dtype=torch.float64)
    assert moments(a).variance == pytest.approx(float(a.var(0).sum()), rel=1e-12)
    want = (a.mean(0) - b.mean(0)).square().sum() - a.var(0).sum() / 9 - b.var(0).sum() / 7
    assert distance2(moments(a), moments(b)) == pytest.approx(float(want), rel=1e-12)
    both = moments(a[:4]) + moments(a[4:])
    assert both.variance == pytest.approx(moments(a).variance, rel=1e-12) and both.count == 9


def test_distance_is_unbiased():
    """Over 2000 draws its mean is the true distance within 5 standard errors; the plain one is far outside."""
    draw = torch.Generator().manual_seed(0)
    shift = torch.tensor([0.5, 0.0, 0.0, -0.5], dtype=torch.float64)  # squared: 0.5; sampling adds 4 / 5 + 4 / 5
    found = torch.tensor(
        [
            distance2(
                *(moments(torch.randn(5, 4, dtype=torch.float64, generator=draw) + s) for s in (shift, 0 * shift))
            )
            for _ in range(2000)
        ]
    )
    error = float(found.std()) / 2000**0.5
    assert abs(float(found.mean()) - 0.5) < 5 * error < 0.5


def test_variance_needs_two_batches():
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        _ = moments(torch.ones(1, 4)).variance


def test_optimum_by_hand():
    assert optimum((1.0, 3.0, 4.0)) == pytest.approx((0.5 * 4 + 3) / 8)
    assert optimum((1.0, 3.0, -4.0)) == pytest.approx(0.75)
    assert np.isnan(optimum((0.0, 0.0, 0.0)))


# oracle --------------------------------------------------------------------------------------------------------------
def test_branch_gradients_are_those_of_the_mixed_loss():
    run = trainer()
    rows = Oracle(run, 2, 0).fresh()
    policy = branch_gradient(run.policy, rows, run.config.objective, expert=False)
    supervised = branch_gradient(run.policy, rows, run.config.objective, expert=True)
    loss, _ = run.policy(rows, 1.0, run.config.objective, 0.25)  # exact in float32
    for p, s, both in zip(policy, supervised, torch.autograd.grad(loss, list(run.model.parameters())), strict=True):
        torch.testing.assert_close(0.75 * p + 0.25 * s, both, rtol=1e-9, atol=1e-12)


def test_a_half_is_the_batches_gradients(monkeypatch):
    run = trainer()
    oracle, seen = Oracle(run, 2, 0), []
    collect = oracle._collect
    monkeypatch.setattr(oracle, "_collect", lambda collector: seen.append(collect(collector)) or seen[-1])
    first, _ = oracle.halves(4)
    flat = {
        expert: torch.stack(
            [
                torch.cat([g.flatten() for g in branch_gradient(run.policy, r, run.config.objective, expert=expert)])
                for rows in seen[:2]
                for r in rows.micro_batches()
            ]
        )
        for expert in (True, False)
    }
    sigma_s2, sigma_r2, delta2 = first.signals(2)
    noise = {expert: float(g.var(0).sum()) for expert, g in flat.items()}
    assert first.policy.count == len(flat[True]) == 4
    assert sigma_s2 == pytest.approx(noise[True] / 2, rel=1e-9) and sigma_r2 == pytest.approx(
        noise[False] / 2, rel=1e-9
    )
    apart = float((flat[True].mean(0) - flat[False].mean(0)).square().sum())
    assert delta2 == pytest.approx(apart - sum(noise.values()) / 4, rel=1e-9)


def test_shares_never_meet_and_the_run_is_left_alone():
    run, alone = trainer(), trainer()
    run.step(), alone.step()
    oracle = Oracle(run, 2, 0)
    prompts = []
    for collector in oracle.collectors:
        task = collector.task
        prompts.append({task.prompt(i).prompt for i in range(40)} | {task.demonstration(i).prompt for i in range(40)})
    assert len(prompts) == SHARES and all(prompts)
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    oracle.halves(2), oracle.signals(oracle.fresh())
    run.step(), alone.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), alone.model.parameters(), strict=True))


def test_controls_change_what_they_say():
    oracle = Oracle(trainer(), 2, 0)
    rows = oracle.fresh()
    rows = replace(rows, advantages=torch.where(rows.is_expert, 0.0, torch.arange(len(rows.groups)) - 6.0))
    rows = replace(rows, advantages=rows.advantages.float())
    found = {kind: dict(zip(gk.signals.SIGNAL_COLUMNS, s.rows.detach().T, strict=True)) for kind, s in
             oracle.signals(rows).items()}  # fmt: skip
    plain, expert = found["ordinary"], found["ordinary"]["expert"] > 0
    shuffled = found["advantages"]["advantage"]
    assert not torch.equal(shuffled, plain["advantage"])
    assert torch.equal(shuffled[~expert].sort().values, plain["advantage"][~expert].sort().values)
    phi = found["phi"]  # its rows: rollouts first
    assert torch.equal(phi["expert"].sort().values, plain["expert"].sort().values)
    for column in ("cs", "cs2", "nll_sum"):  # shuffling keeps the sum over the demonstrations
        torch.testing.assert_close(phi[column][phi["expert"] > 0].sum(), plain[column][expert].sum())
    assert not torch.allclose(phi["cs2"][phi["expert"] > 0], plain["cs2"][expert])
    constant = found["constant"]
    torch.testing.assert_close(constant["cs2"], constant["tokens"])
    torch.testing.assert_close(constant["cr2"], torch.where(expert, 0.0, constant["tokens"]))


def test_an_oracle_that_cannot_be_cut_is_refused():
    with pytest.raises(ValueError, match="prompts_per_step must be a positive multiple of 3, got 4"):
        Oracle(trainer(), 3, 0)
    with pytest.raises(ValueError, match=r"temperature must be 1\.0"):
        Oracle(trainer(temperature=0.7), 2, 0)


def test_halves_add_up():
    a, b = moments(torch.randn(4, 3)), moments(torch.randn(4, 3))
    assert (Half(a, b) + Half(a, b)).policy.count == 8


# statistics ----------------------------------------------------------------------------------------------------------
def test_correlations_by_hand():
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 2, 3], [1e-200, 2e-200, 3e-200]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [1, 10, 100, 90]) == pytest.approx(0.8)
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3])) and np.isnan(spearman([1, np.nan, 2], [1, 2, 3]))
    with pytest.raises(ValueError, match="of one length"):
        pearson([1, 2], [1, 2, 3])


def test_bootstrap_covers_and_repeats():
    draw = np.random.default_rng(0)
    x = draw.normal(size=60)
    y = 0.8 * x + 0.6 * draw.normal(size=60)
    found = correlate(x, y, clusters=np.arange(60), seed=1)
    assert found.low < found.pearson < found.high and found.low < 0.8 < found.high
    assert found == correlate(x, y, clusters=np.arange(60), seed=1)
    # Points that repeat their cluster are no further evidence: the interval stays.
    again = correlate(np.repeat(x, 4), np.repeat(y, 4), clusters=np.repeat(np.arange(60), 4), seed=1)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    independent = correlate(x, draw.normal(size=60), clusters=np.arange(60), seed=1)
    assert independent.low < 0.0 < independent.high


# command -------------------------------------------------------------------------------------------------------------
def test_command_smoke(capsys, tmp_path):
    plot = tmp_path / "points.png"
    assert main(["validate", "--smoke", "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    signals = {"sigma_s2", "sigma_r2", "delta2", "mu_star"}
    assert set(found) == {"reliability", "estimators", "falsified"} and set(found["reliability"]) == signals
    assert set(found["estimators"]) == {"coefficient", "coefficient-znorm", "logit", "hidden"}
    assert set(found["falsified"]) == {"advantages", "phi", "constant", "points"}
    for estimators in (found["estimators"], *found["falsified"].values()):
        for by_signal in estimators.values():
            assert set(by_signal) == signals
            assert all(set(cell) == {"pearson", "spearman", "low", "high"} for cell in by_signal.values())
    assert found["estimators"]["hidden"]["sigma_s2"]["pearson"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--checkpoints", "2", "--checkpoints must be at least 3, got 2"),
        ("--oracle-batches", "1", "--oracle-batches must be at least 2, got 1"),
        ("--groups", "0", "--groups must be at least 1, got 0"),
        ("--model", "/nowhere", "local model directory"),
        ("--plot", "/nowhere/a.png", "existing directory"),
    ],
)
def test_command_refuses(capsys, option, value, message):
    assert main(["validate", option, value]) == 2
    assert message in capsys.readouterr().err
