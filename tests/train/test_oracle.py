"""The oracle against every batch's gradient at once, the falsified passes, what points say, the command's promises."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_runs import small

from gac_kernels.cli import main
from gac_kernels.objectives import HybridObjective
from gac_kernels.signals import SIGNAL_COLUMNS, concatenate, estimate
from gac_kernels.train.falsify import KINDS, estimates, fresh_signals
from gac_kernels.train.loop import Trainer
from gac_kernels.train.model import save_model
from gac_kernels.train.oracle import Half, Moments, Oracle, branch_gradient, distance2, optimum
from gac_kernels.train.shares import SHARES
from gac_kernels.train.validation import Points, conclude


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
    """Over 800 draws its mean is the true distance within 5 standard errors; the plain one is far outside."""
    draw = torch.Generator().manual_seed(0)
    shift = torch.tensor([0.5, 0.0, 0.0, -0.5], dtype=torch.float64)  # squared: 0.5; sampling adds 4 / 5 + 4 / 5
    found = torch.tensor(
        [
            distance2(
                *(moments(torch.randn(5, 4, dtype=torch.float64, generator=draw) + s) for s in (shift, 0 * shift))
            )
            for _ in range(800)
        ]
    )
    error = float(found.std()) / 800**0.5
    assert abs(float(found.mean()) - 0.5) < 5 * error < 0.5


def test_variance_needs_two_batches():
    with pytest.raises(ValueError, match="at least 2 batches, got 1"):
        _ = moments(torch.ones(1, 4)).variance


def test_optimum_by_hand():
    assert optimum((1.0, 3.0, 4.0)) == pytest.approx((0.5 * 4 + 3) / 8)
    assert optimum((1.0, 3.0, -4.0)) == pytest.approx(0.75)
    assert optimum((1.0, 3.0, 4.0), cap=0.5) == pytest.approx((0.5 * 2 + 3) / 6)
    assert np.isnan(optimum((0.0, 0.0, 0.0)))


# oracle --------------------------------------------------------------------------------------------------------------
def test_branch_gradients_are_those_of_the_mixed_loss():
    run = trainer()
    rows = run.collector.rollouts(run.policy, run.mixing).batch
    rows = replace(rows, advantages=torch.where(rows.is_expert, 0.0, torch.arange(len(rows.groups)) - 6.0))
    parts = {}
    for expert in (True, False):
        keep = rows.is_expert == expert
        alone = replace(rows, **{name: value[keep] for name, value in rows.state_dict().items()})
        parts[expert] = branch_gradient(run.policy, alone, run.config.objective, expert=expert)
    loss, _ = run.policy(rows, 1.0, run.config.objective, 0.25)  # exact in float32
    both = torch.autograd.grad(loss, list(run.model.parameters()))
    for p, s, mixed in zip(parts[False], parts[True], both, strict=True):
        # Weights of tokens are float32, and the two losses round them on their own; small gradients cancel.
        rounding = 4 * torch.finfo(torch.float32).eps * float(torch.maximum(p.abs(), s.abs()).max())
        torch.testing.assert_close(0.75 * p + 0.25 * s, mixed, rtol=0.0, atol=rounding)


def test_a_half_is_the_batches_gradients(monkeypatch):
    run = trainer()
    oracle, seen = Oracle(run, 2, 0, conditions=2), []
    draw = oracle.draw
    monkeypatch.setattr(oracle, "draw", lambda *sizes: seen.append(draw(*sizes)) or seen[-1])
    first, _ = oracle.halves(3)  # of 2 prompts and 2 demonstrations each

    def gradients(parts, *, expert):
        return torch.stack(
            [
                torch.cat([g.flatten() for g in branch_gradient(run.policy, rows, run.config.objective, expert=expert)])
                for rows in parts
            ]
        )

    # Demonstrations of which half are exchanged against verdicts as they are, so that a mixed up condition shows.
    s = gradients(oracle.supervised_batches(seen[0], 0.5, 3), expert=True)
    r = gradients(oracle.policy_batches(seen[0], 0.0, 3), expert=False)
    sigma_s2, sigma_r2, delta2 = first.signals(2, 1, 0)
    noise_s, noise_r = float(s.var(0).sum()), float(r.var(0).sum())
    assert first.supervised[1].count == len(s) == 3 and len(first.policy) == 2
    assert (sigma_s2, sigma_r2) == (pytest.approx(noise_s / 2, rel=1e-9), pytest.approx(noise_r / 2, rel=1e-9))
    apart = float((s.mean(0) - r.mean(0)).square().sum())
    assert delta2 == pytest.approx(apart - (noise_s + noise_r) / 3, rel=1e-9)


def test_conditions_change_what_they_say():
    oracle = Oracle(trainer(), 2, 0)
    drawn = oracle.draw(0, 4, 40)
    assert [row.reward for row in drawn.rollouts(0.0)] == [row.reward for row in drawn.answered]
    assert [row.reward for row in drawn.rollouts(1.0)] == [1.0 - row.reward for row in drawn.answered]
    own, half, none = ([e for _, e in drawn.shown(share)] for share in (0.0, 0.5, 1.0))
    assert own == drawn.demonstrations
    assert [e.prompt for e in none] == [e.prompt for e in own]
    assert [e.demonstration for e in none] == [e.demonstration for e in drawn.others]
    moved = sum(a != b for a, b in zip(own, half, strict=True))
    assert 8 < moved < 32  # of 40: outside with a chance of 1e-4, and the seed is fixed
    # What is exchanged or turned over at a lower share stays so at a higher one.
    assert all(a == b for a, b, c in zip(none, half, own, strict=True) if b != c)


def test_shares_never_meet_and_the_run_is_left_alone():
    run, alone = trainer(), trainer()
    run.step(), alone.step()
    oracle = Oracle(run, 2, 0)
    prompts = [
        {share.prompt(i).prompt for i in range(40)} | {share.demonstration(i).prompt for i in range(40)}
        for share in oracle.shares
    ]
    assert len(prompts) == SHARES and all(prompts)
    assert not (prompts[0] & prompts[1] or prompts[0] & prompts[2] or prompts[1] & prompts[2])
    oracle.halves(2), fresh_signals(oracle, 1)
    run.step(), alone.step()
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), alone.model.parameters(), strict=True))


def test_what_the_oracle_cannot_measure_is_refused():
    with pytest.raises(ValueError, match="prompts_per_step must be a positive multiple of 3, got 4"):
        Oracle(trainer(), 3, 0)
    with pytest.raises(ValueError, match=r"temperature must be 1\.0"):
        Oracle(trainer(temperature=0.7), 2, 0)
    with pytest.raises(ValueError, match="no KL term"):
        Oracle(trainer(reference=True, objective=HybridObjective(kl_coef=0.1)), 2, 0)


def test_halves_add_up():
    a, b = moments(torch.randn(4, 3)), moments(torch.randn(4, 3))
    assert (Half([a], [b]) + Half([a], [b])).policy[0].count == 8


# falsified passes ----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def passes():
    """kind -> (exchanged, inverted) -> columns by name of all steps' rows, in two conditions a branch."""
    oracle = Oracle(trainer(), 2, 0, conditions=2)
    draw = oracle.draw

    def varied(*sizes):  # an untrained model answers nothing right: give every group both verdicts
        drawn = draw(*sizes)
        answered = [replace(row, reward=float(place % 3 == 0)) for place, row in enumerate(drawn.answered)]
        return replace(drawn, answered=answered)

    oracle.draw = varied
    found = fresh_signals(oracle, 2)
    rows = {kind: {pair: concatenate(steps).rows for pair, steps in of.items()} for kind, of in found.items()}
    columns = {
        kind: {pair: dict(zip(SIGNAL_COLUMNS, table.T, strict=True)) for pair, table in of.items()}
        for kind, of in rows.items()
    }
    return found, columns


def of_branch(columns, name, *, expert):
    return torch.cat([table[name][(table["expert"] > 0) == expert] for table in columns])


def test_shuffled_advantages_are_the_same_ones_elsewhere(passes):
    _, columns = passes
    plain, shuffled = (
        of_branch([columns[kind][0, 0], columns[kind][0, 1]], "advantage", expert=False)
        for kind in ("ordinary", "advantages")
    )
    assert len(plain.unique()) > 1 and not torch.equal(plain, shuffled)
    torch.testing.assert_close(plain.sort().values, shuffled.sort().values)
    for name in SIGNAL_COLUMNS:  # demonstrations are the ordinary ones
        a, b = (of_branch([columns[kind][1, 0]], name, expert=True) for kind in ("ordinary", "advantages"))
        torch.testing.assert_close(a, b)


def test_shuffled_phi_and_log_probs_are_the_same_ones_elsewhere(passes):
    _, columns = passes
    pairs = [(0, 0), (1, 0)]
    plain, shuffled = ([columns[kind][pair] for pair in pairs] for kind in ("ordinary", "phi"))
    for name in ("nll_sum", "cs", "cs2", "tokens"):  # sums over all demonstrations stay
        a, b = (of_branch(found, name, expert=True) for found in (plain, shuffled))
        torch.testing.assert_close(a.sum(), b.sum(), rtol=1e-5, atol=1e-6)
        assert torch.allclose(a, b) == (name == "tokens")
    for name in ("cr", "cr2", "cscr", "advantage"):
        assert not of_branch(shuffled, name, expert=True).any()
    a, b = (of_branch(found, "cr2", expert=False) for found in (plain, shuffled))
    torch.testing.assert_close(a, b)


def test_unshuffled_phi_gives_the_ordinary_signals(monkeypatch):
    """The detour of the falsified pass changes nothing but the order: without it every estimate is the ordinary one."""
    oracle = Oracle(trainer(), 2, 0, conditions=2)
    monkeypatch.setattr(oracle, "shuffle", lambda values: values)
    found = fresh_signals(oracle, 1)
    for pair, steps in found["ordinary"].items():
        for kind in ("advantages", "phi", "both"):
            want, got = estimates(steps), estimates(found[kind][pair])
            assert list(got) == list(want) and "hidden" in got
            for name in want:
                assert got[name] == pytest.approx(want[name], rel=1e-5)


def test_constant_coefficients_tell_the_coefficient_estimator_nothing(passes):
    found, columns = passes
    table = columns["constant"][1, 1]
    torch.testing.assert_close(table["cs2"], table["tokens"])
    torch.testing.assert_close(table["nll_sum"][table["expert"] > 0], table["tokens"][table["expert"] > 0])
    torch.testing.assert_close(table["cr2"], torch.where(table["expert"] > 0, 0.0, table["tokens"]))
    values = [estimates(found["constant"][pair])["coefficient"] for pair in found["constant"]]
    assert all(value == pytest.approx(values[0]) for value in values)


def test_estimates_are_means_over_steps(passes):
    found, _ = passes
    assert set(found) == set(KINDS)
    steps = found["ordinary"][0, 1]
    each = [estimate(signals, "hidden", trim=0.1, znorm=False).values_3 for signals in steps]
    assert len(steps) == 2 and estimates(steps)["hidden"][:3] == pytest.approx(torch.stack(each).mean(0).tolist())


# what the points say -------------------------------------------------------------------------------------------------
def planted(strength, checkpoints=12):
    """Points with a trend that all share, an oracle of two noisy halves, and an estimator of the given strength."""
    draw = np.random.default_rng(3)
    points = Points()
    for checkpoint in range(checkpoints):
        for pair in [(i, j) for i in range(3) for j in range(3)]:
            truth = draw.normal(size=4)
            points.place.append((0, checkpoint))
            points.condition.append(pair)
            first, second = (checkpoint + truth + 0.3 * draw.normal(size=4) for _ in range(2))
            for values, value in (
                (points.first, first),
                (points.second, second),
                (points.oracle, first / 2 + second / 2),
            ):
                values.append(value.tolist())
            noise = draw.normal(size=(2, 4))
            for kind in KINDS:
                weight = strength if kind == "ordinary" else 0.0
                for name, other in (("coefficient", noise[0]), ("hidden", weight * truth + (1 - weight) * noise[1])):
                    points.kinds.setdefault(kind, {}).setdefault(name, []).append((checkpoint + other).tolist())
    return points


def test_a_shared_trend_counts_in_all_and_not_within():
    found = conclude(planted(0.9), 0)
    control = found["falsified"]["constant"]["hidden"]["mu_star"]
    assert control.pearson > 0.8 and control.low > 0.0  # the trend alone
    inside = found["within"]
    assert all(abs(inside["falsified"]["constant"]["hidden"][s].pearson) < 0.3 for s in found["reliability"])
    assert inside["estimators"]["hidden"]["mu_star"].low > 0.8
    assert (
        inside["estimators"]["coefficient"]["mu_star"].low < 0.0 < inside["estimators"]["coefficient"]["mu_star"].high
    )
    assert inside["ahead"]["hidden"]["mu_star"].low > 0.5
    # Halves with noise 0.3 about a truth of size 1 agree at 1 / 1.09; the whole has half the noise's variance.
    assert inside["reliability"]["mu_star"].pearson == pytest.approx(1 / (1 + 0.09 / 2), abs=0.02)
    band = inside["falsified"]["points"]["hidden"]["mu_star"]
    assert abs(band.pearson) < 0.02 and band.low < 0.0 < band.high < inside["estimators"]["hidden"]["mu_star"].low
    assert found["mu_error"]["hidden"].value < found["mu_error"]["coefficient"].low


def test_an_estimator_that_knows_nothing_is_not_ahead():
    inside = conclude(planted(0.0), 0)["within"]
    ahead = inside["ahead"]["hidden"]["mu_star"]
    assert ahead.low < 0.0 < ahead.high
    assert abs(inside["estimators"]["hidden"]["mu_star"].pearson) < 0.3


# command -------------------------------------------------------------------------------------------------------------
SIGNALS = {"sigma_s2", "sigma_r2", "delta2", "mu_star"}
WITHOUT_HIDDEN = {"coefficient", "coefficient-znorm", "logit", "logit-capped"}


def check_object(found, estimators):
    assert {"reliability", "estimators", "falsified", "within", "run", "mu_error"} <= set(found)
    for view in (found, found["within"], found["run"]):
        assert set(view["reliability"]) == SIGNALS and set(view["estimators"]) == estimators
        assert set(view["falsified"]) == {"advantages", "phi", "both", "constant", "points"}
        for by_name in (view["estimators"], *view["falsified"].values()):
            for by_signal in by_name.values():
                assert set(by_signal) == SIGNALS
                assert all(set(cell) == {"pearson", "spearman", "low", "high"} for cell in by_signal.values())
    assert set(found["mu_error"]) == estimators


def test_command_smoke(capsys, tmp_path):
    plot = tmp_path / "points.png"
    assert main(["validate", "--smoke", "--json", "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    check_object(found, WITHOUT_HIDDEN | {"hidden"})
    assert found["estimators"]["hidden"]["sigma_s2"]["pearson"] is not None
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("understood", [True, False])
def test_command_with_a_users_model_and_task(capsys, tmp_path, understood):
    """A directory and a file such as a user has; `hidden` is left out, and that said, where the head is unknown."""
    task = tmp_path / "user.jsonl"
    lines = [{"prompt": f"what is {i}? ", "answer": str(i), "demonstration": f"it is {i}"} for i in range(60)]
    task.write_text("".join(json.dumps(line) + "\n" for line in lines))
    start = Trainer(small(task=str(task), demonstration_pool=None))
    if not understood:
        start.model.config.update({"logit_scale": 3.0})  # which the model itself knows nothing of
    save_model(start.model, start.tokenizer, tmp_path / "model", start.model.state_dict())
    size = ["--runs", "2", "--checkpoints", "2"] if understood else ["--conditions", "1"]  # several processes, and one
    arguments = ["--model", str(tmp_path / "model"), "--task", str(task), *size]
    assert main(["validate", "--smoke", "--json", *arguments]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out.splitlines()[-1])
    check_object(found, WITHOUT_HIDDEN | {"hidden"} if understood else WITHOUT_HIDDEN)
    assert ("hidden: left out" in captured.err) == (not understood)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--checkpoints", "1", "--checkpoints must be at least 2, got 1"),
        ("--oracle-batches", "1", "--oracle-batches must be at least 2, got 1"),
        ("--groups", "0", "--groups must be at least 1, got 0"),
        ("--runs", "0", "--runs must be at least 1, got 0"),
        ("--conditions", "4", "--conditions must be at most 3, got 4"),
        ("--model", "/nowhere", "local model directory"),
        ("--plot", "/nowhere/a.png", "existing directory"),
    ],
)
def test_command_refuses(capsys, option, value, message):
    assert main(["validate", option, value]) == 2
    assert message in capsys.readouterr().err
