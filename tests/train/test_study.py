"""benchmarks/study.py at a size of seconds: it runs end to end, goes on where it stopped, and computes what it says."""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import gac_kernels as gk

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """The whole study at its smallest, once: (folder, what the command printed)."""
    from study.cli import main

    folder = tmp_path_factory.mktemp("study")
    (folder / "docs").mkdir()
    assert main(arguments(folder)) == 0
    return folder


def arguments(folder):
    return ["--smoke", "--seeds", "1", "--objective-seeds", "1", "--output", str(folder / "runs"), "--docs",
            str(folder / "docs")]  # fmt: skip


def results(folder):
    return json.loads((folder / "docs" / "results.json").read_text())


# the command ---------------------------------------------------------------------------------------------------------


def test_every_arm_has_its_results_tables_and_plots(smoke):
    from study.arms import SMOKE, plan

    runs = results(smoke)["runs"]
    wanted = [run for run in plan(SMOKE) if run.seed == 0]
    assert [(run["group"], run["arm"]) for run in runs] == [(run.group, run.arm) for run in wanted]
    text = (smoke / "docs" / "tables.md").read_text()
    for run in runs:
        assert f"| {run['arm']} |" in text
        for stage in run["stages"]:
            last = stage["probe"][-1][0]
            assert stage["accuracy"][-1][0] == last == len(stage["steps"]["mu"])
            assert stage["cpu_seconds"] > 0 and all(0 <= a <= 1 for _, a in stage["accuracy"])
            assert stage["probe"][0][0] == 0 and all(kl >= 0 and h >= 0 for _, kl, h in stage["probe"])
        assert runs[0]["stages"][0]["probe"][0][1] == 0.0  # at the start, the KL to the start
    tables = [part.splitlines() for part in text.split("\n\n") if part.startswith("| ")]
    assert len(tables) == 5 and all(len({line.count("|") for line in table}) == 1 for table in tables)
    plots = sorted((smoke / "docs").glob("*.png"))
    assert len(plots) == 5 and all(plot.stat().st_size < 150_000 for plot in plots)


def test_all_arms_of_a_seed_begin_from_one_model_on_the_same_tokens(smoke):
    first = {json.dumps(run["stages"][0]["probe"][0]) for run in results(smoke)["runs"]}
    assert len(first) == 1


def test_a_second_call_trains_nothing_and_writes_the_same(smoke, monkeypatch):
    from study import pool
    from study.cli import main

    before = {path.name: path.read_bytes() for path in (smoke / "docs").iterdir()}

    def forbidden(*args, **kwargs):
        raise AssertionError("a finished study started a process")

    monkeypatch.setattr(pool, "ProcessPoolExecutor", forbidden)
    assert main(arguments(smoke)) == 0
    assert {path.name: path.read_bytes() for path in (smoke / "docs").iterdir()} == before


def test_tables_and_plots_need_the_results_file_alone(smoke, tmp_path):
    from study.cli import main

    (tmp_path / "results.json").write_bytes((smoke / "docs" / "results.json").read_bytes())
    assert main(["--render", "--docs", str(tmp_path), "--output", str(tmp_path / "nowhere")]) == 0
    assert (tmp_path / "tables.md").read_bytes() == (smoke / "docs" / "tables.md").read_bytes()


def test_what_a_kill_leaves_is_not_taken_for_a_result(smoke, tmp_path):
    from study.arms import SMOKE, plan
    from study.runs import execute, read_result, result_file

    run = plan(SMOKE, ("dfpo",))[0]
    whole = result_file(run, smoke / "runs").read_bytes()
    path = result_file(run, tmp_path)
    assert read_result(path, run.fingerprint) is None
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert read_result(path, run.fingerprint) is None, cut
    again = execute(run, smoke / "runs")  # the same run once more: the same numbers but for the clock
    found, expected = json.loads(again.read_bytes()), json.loads(whole)
    for stage in (*found["stages"], *expected["stages"]):
        del stage["cpu_seconds"], stage["wall_seconds"]
    assert found == expected
    assert not list((smoke / "runs").glob(".stage-*")) and not list((smoke / "runs").glob("*.tmp"))


def test_a_run_that_fails_ends_the_study_and_leaves_no_result(smoke):
    from study.arms import SMOKE, plan
    from study.pool import run_all
    from study.runs import result_file

    run = plan(SMOKE, ("controllers",))[0]
    broken = replace(run, stages=({**run.stages[0], "max_new_tokens": 2},))  # too short for a demonstration
    with pytest.raises(ValueError, match="max_new_tokens must hold every demonstration"):
        run_all([broken], smoke / "runs", 1)
    assert not result_file(broken, smoke / "runs").exists()


# configurations do not mix -------------------------------------------------------------------------------------------


def test_the_fingerprint_tells_configurations_apart():
    from study.arms import SMOKE, plan

    runs = plan(SMOKE)
    prints = [run.fingerprint for run in runs]
    assert len(set(prints)) == len(runs) and prints == [run.fingerprint for run in plan(SMOKE)]
    changed = {"steps": 5, "warm_steps": 4, "hidden": 24, "probe_every": 1, "problems": 9, "prompts": 3}
    for name, value in changed.items():
        other = plan(replace(SMOKE, **{name: value}))[0]
        assert other.name == runs[0].name and other.fingerprint != runs[0].fingerprint, name
    more_seeds = plan(replace(SMOKE, seeds=3))[0]
    assert more_seeds.fingerprint == runs[0].fingerprint  # a larger study takes the smaller one's runs over


def test_gates_and_dfpo_take_several_steps_on_a_batch():
    from study.arms import Size, plan

    stages = [stage for run in plan(Size(), ("gates", "dfpo")) for stage in run.stages]
    assert stages and all(stage["updates_per_rollout"] == Size().updates > 1 for stage in stages)
    assert len({str(stage["objective"]) for stage in stages}) == 12


def test_the_result_of_another_configuration_is_refused(smoke, tmp_path):
    from study.arms import SMOKE, plan
    from study.pool import run_all
    from study.runs import result_file

    run = plan(SMOKE)[0]
    other = replace(run, size=replace(SMOKE, steps=5), stages=({**run.stages[0], "steps": 5},))
    path = result_file(other, tmp_path)
    path.write_bytes(result_file(run, smoke / "runs").read_bytes())  # as if renamed by hand
    with pytest.raises(ValueError, match=f"must be of the configuration {other.fingerprint}, got '{run.fingerprint}'"):
        run_all([other], tmp_path, 1)


# what is measured ----------------------------------------------------------------------------------------------------


def test_the_probe_against_plain_softmax(smoke):
    from study.arms import SMOKE, plan
    from study.runs import Probe, start_directory

    from gac_kernels.train.loop import Trainer

    run = plan(SMOKE)[0]
    model = start_directory(0, SMOKE, smoke / "runs") / "warm-start" / "model"
    trainer = Trainer(run.config(0, Path("unused"), str(model)))
    probe = Probe(trainer, 3, 0)
    start = torch.nn.ModuleList([trainer.model])[0].state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    assert probe.measure(trainer)[0] == 0.0
    for _ in range(2):
        trainer.step()
    measured, kls, entropies = probe.measure(trainer), [], []
    now = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    rows = probe.rows
    for row in range(3):  # one by one, without any padding
        ids = torch.cat([rows.input_ids[row, : rows.prompt_mask.shape[1]][rows.prompt_mask[row]],
                         rows.targets[row][rows.response_mask[row]]])  # fmt: skip
        first = int(rows.prompt_mask[row].sum())
        logits = []
        for weights in (now, start):
            trainer.model.load_state_dict(weights)
            with torch.no_grad():
                logits.append(trainer.model(ids[None]).logits[0, first - 1 : -1].double().tolist())
        for new, old in zip(*logits, strict=True):
            p, p0 = ([math.exp(z - max(line)) for z in line] for line in (new, old))
            p, p0 = [v / sum(p) for v in p], [v / sum(p0) for v in p0]
            kls.append(sum(a * math.log(a / b) for a, b in zip(p, p0, strict=True)))
            entropies.append(-sum(a * math.log(a) for a in p))
    assert measured[0] == pytest.approx(statistics.fmean(kls), rel=1e-4) and measured[0] > 0
    assert measured[1] == pytest.approx(statistics.fmean(entropies), rel=1e-4)


def test_the_residual_of_a_group_against_plain_numbers():
    from study.runs import group_residual

    force = torch.tensor([1.0, -3.0, 2.0, 2.0, 0.0, 0.0, 5.0], dtype=torch.float64)
    groups = torch.tensor([7, 2, 7, 2, 4, 4, 9])  # interleaved; group 4 has no force
    assert float(group_residual(force, groups)) == pytest.approx((1.0 + 1.0 / 5.0 + 1.0) / 3)
    assert float(group_residual(torch.zeros(2), torch.tensor([0, 0]))) == 0.0


@pytest.mark.parametrize("policy", [gk.GRPO(), gk.GSPO(), gk.DFPO("min_replace"), gk.DFPO("adv_orthogonal")], ids=str)
def test_the_watched_forces_are_those_of_the_objective(policy):
    """F_i = A_i w_i written out, for two groups of ragged sequences with ratios on both sides of the clip."""
    from study.runs import ResidualWatch

    torch.manual_seed(3)
    lengths, groups = [3, 5, 2, 4, 4, 1], [0, 0, 0, 1, 1, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    old = -torch.rand(6, 5, dtype=torch.float64)
    now = old + 0.6 * torch.randn(6, 5, dtype=torch.float64)
    adv = [1.0, -0.5, -0.5, 1.2, -0.7, -0.5]
    batch = gk.TokenBatch.from_padded(
        torch.zeros(6, 5, dtype=torch.long), mask, is_expert_S=torch.zeros(6, dtype=torch.bool),
        advantages=torch.tensor(adv), old_logprobs=old, groups=torch.tensor(groups),
    )  # fmt: skip
    objective = gk.HybridObjective(policy)
    watch = ResidualWatch(0.0, objective)
    watch.observe(gk.hybrid_loss(now, batch, objective, 0.0), batch)

    ratios = [[math.exp(float(now[s, t] - old[s, t])) for t in range(n)] for s, n in enumerate(lengths)]
    mean = [math.exp(statistics.fmean(math.log(r) for r in row)) for row in ratios]

    def clipped(r, a):
        return (a > 0 and r > 1.2) or (a < 0 and r < 0.8)

    def weights(members):
        if isinstance(policy, gk.GRPO):
            return [statistics.fmean(0.0 if clipped(r, adv[s]) else r for r in ratios[s]) for s in members]
        if isinstance(policy, gk.GSPO):
            return [0.0 if clipped(mean[s], adv[s]) else mean[s] for s in members]
        own = [mean[s] for s in members]
        if policy.transform == "min_replace":
            return [min(own)] * len(own)
        part = sum(w * adv[s] for w, s in zip(own, members, strict=True)) / sum(adv[s] ** 2 for s in members)
        return [w - part * adv[s] for w, s in zip(own, members, strict=True)]

    residuals = []
    for members in ([0, 1, 2], [3, 4, 5]):
        force = [adv[s] * w for s, w in zip(members, weights(members), strict=True)]
        residuals.append(abs(sum(force)) / sum(map(abs, force)))
    assert float(watch.metrics()["residual"]) == pytest.approx(statistics.fmean(residuals), rel=1e-5, abs=1e-6)


# tables --------------------------------------------------------------------------------------------------------------


def made_up(group, arm, seed, accuracy, mu, probe, **steps):
    stage = {"accuracy": [[0, 0.1], [4, accuracy]], "probe": probe, "steps": {"mu": mu, **steps}, "cpu_seconds": 0.4,
             "wall_seconds": 0.5}  # fmt: skip
    return {"group": group, "arm": arm, "seed": seed, "fingerprint": "0", "stages": [stage]}


def test_the_numbers_of_a_run():
    from study import tables

    run = made_up("controllers", "x", 0, 0.7, [0.5, 0.52, 0.515, 0.6], [[0, 0.0, 2.0], [1, 0.2, 1.5], [4, 0.4, 1.0]],
                  entropy=[1.0, 2.0, 3.0, 5.0])  # fmt: skip
    assert tables.accuracy(run) == 0.7 and tables.gain(run) == pytest.approx(0.6)
    assert tables.kl_area(run) == pytest.approx(0.5 * 0.2 + 3 * 0.3)
    assert tables.probe_entropy(run) == 1.0
    assert tables.large_steps(run, 0.01) == pytest.approx(2 / 3) and tables.large_steps(run, 0.05) == pytest.approx(
        1 / 3
    )
    assert tables.tail(run, "entropy") == 5.0 and tables.tail(run, "entropy", 0.5) == 4.0
    assert tables.off_policy(run, "entropy", 2) == pytest.approx((2.0 + 5.0) / 2)
    assert tables.step_milliseconds(run) == pytest.approx(100.0)


def test_intervals_against_plain_python():
    from study import tables

    values = [0.61, 0.7, 0.66, 0.58]
    mean, half = tables.interval(values)
    assert mean == pytest.approx(statistics.fmean(values))
    assert half == pytest.approx(3.182 * statistics.stdev(values) / 2)  # t of 3 degrees of freedom
    assert tables.interval([0.5])[0] == 0.5 and math.isnan(tables.interval([0.5])[1])
    assert tables.interval(list(range(101)))[1] == pytest.approx(1.96 * statistics.stdev(range(101)) / 101**0.5)
    # Student's t by integrating its density
    for freedom in (1, 2, 5, 30):
        scale = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        grid = [tables.T975[freedom - 1] * (i + 0.5) / 20000 for i in range(20000)]
        mass = sum(scale * (1 + t * t / freedom) ** (-(freedom + 1) / 2) for t in grid) * 2 * grid[0]
        assert mass == pytest.approx(0.475, abs=1e-4)


def test_the_comparison_is_paired_and_marks_what_leaves_out_0(tmp_path):
    from study import tables

    probe = [[0, 0.0, 1.0], [4, 0.2, 1.0]]
    twice = [[0, 0.0, 1.0], [4, 0.4, 1.0]]
    ours, worse, alike = (0.80, 0.60, 0.70), (0.70, 0.51, 0.59), (0.60, 0.80, 0.75)
    runs = []
    for seed in range(3):
        mu = [0.5] * 4
        runs += [
            made_up("controllers", "GAC coefficient", seed, ours[seed], mu, probe),
            made_up("controllers", "worse", seed, worse[seed], mu, twice),
            made_up("controllers", "alike", seed, alike[seed], [0.1, 0.4, 0.1, 0.4], probe),
        ]
    found = {"runs": runs, "size": {"steps": 4}, "versions": {"torch": "x"}, "machine": "y"}
    lines = tables.write_tables(found, tmp_path).read_text().splitlines()
    gains = [100 * (a - b) for a, b in zip(ours, worse, strict=True)]
    zero = [100 * (a - b) for a, b in zip(ours, alike, strict=True)]
    half, half_zero = (4.303 * statistics.stdev(g) / 3**0.5 for g in (gains, zero))
    assert f"| worse | {statistics.fmean(gains):+.1f} ± {half:.1f} * | -50 [-50, -50] * |" in lines
    mean, half = statistics.fmean(ours), 4.303 * statistics.stdev(ours) / 3**0.5
    row = f"| GAC coefficient | {100 * mean:.1f} ± {100 * half:.1f} | {100 * mean - 10:.1f} ± {100 * half:.1f} | "
    assert row + "0.40 ± 0.00 | 0 | 0 | 0.50 | 100 |" in lines
    against = lines[lines.index(f"| alike | {statistics.fmean(zero):+.1f} ± {half_zero:.1f} | +0 [+0, +0] |")]
    assert "*" not in against
    assert any(line.startswith("| alike | 71.7") and line.endswith("| 100 | 100 | 0.40 | 100 |") for line in lines)
