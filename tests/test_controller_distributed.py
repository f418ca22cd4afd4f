"""Several ranks against one process that saw all rows: equal bits, ragged batches, ranks with nothing to show.

All scenarios run in one process group for each number of ranks, because starting processes costs more than they do. A
worker saves what it saw; the tests compare.
"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from host_reads import forbid_host_reads
from plain_controller import Row, rows_tensor

import gac_kernels as gk
from gac_kernels import controller as controller_module
from gac_kernels import distributed
from gac_kernels.signals import Signals

STEPS = 21
DEFAULT = gk.ControllerConfig(update_every=2)
KL = replace(DEFAULT, alpha=gk.KLTarget())


def some_rows(rng, experts, rollouts):
    rows = [Row(True, rng.randint(1, 9), rng.gauss(2, 1), 0.0, rng.random()) for _ in range(experts)]
    rows += [Row(False, rng.randint(1, 9), 1.0, rng.gauss(0, 1), rng.random()) for _ in range(rollouts)]
    rng.shuffle(rows)
    return rows_tensor(rows).float()


def ragged(rng, rank, t):
    return some_rows(rng, rng.randint(0, 6), rng.randint(0, 6))


def one_branch_a_rank(rng, rank, t):
    return some_rows(rng, 0, 5) if rank else some_rows(rng, 7, 0)


def only_rank_0_observes(rng, rank, t):
    return None if rank else some_rows(rng, 4, 4)


def nobody_observes(rng, rank, t):
    return None


def nobody_observes_for_long(rng, rank, t):
    return some_rows(rng, 3, 4) if t == 10 else None


def empty_batches(rng, rank, t):
    return torch.zeros((rank % 2) * 3, 12)


def nan_on_the_last_rank(rng, rank, t):
    rows = some_rows(rng, 4, 4)
    if rank and t % 4 == 0:
        rows[:, random.Random(t).choice([2, 3, 4])] = float("nan")
    return rows


def mixed_precision(rng, rank, t):
    rows = some_rows(rng, 5, 6)
    return rows.double() * 1.1 if rank else rows


SCENARIOS = {
    f.__name__: (DEFAULT, f)
    for f in (
        ragged, one_branch_a_rank, only_rank_0_observes, nobody_observes, nobody_observes_for_long, empty_batches,
        nan_on_the_last_rank, mixed_precision,
    )
}  # fmt: skip
SCENARIOS["znorm"] = (replace(DEFAULT, znorm=True), ragged)
SCENARIOS["reference"] = (replace(DEFAULT, smoothing="reference", update_every=1), ragged)
SCENARIOS["logit"] = (replace(DEFAULT, estimator="logit"), ragged)
SCENARIOS["logit, only_rank_0_observes"] = (replace(DEFAULT, estimator="logit"), only_rank_0_observes)
SCENARIOS["hidden"] = (replace(DEFAULT, estimator="hidden"), ragged)
# KL of each rank at each step: rank 0 may have no RL tokens, the last rank is nan at times.
KL_SCENARIOS = {"kl, ragged": ragged, "kl, one branch a rank": one_branch_a_rank, "kl, nobody": nobody_observes}


def signals_of(rows):
    norms = {"policy_aggregation": "seq-mean-token-sum-norm", "norm_length": 12.5}
    return Signals(rows, has_sum_sq=True, hidden=rows[:, 1:4] + 0.5, **norms)


def kl_of(rank, ranks, t):
    if rank == ranks - 1 and t % 5 == 3:
        return float("nan")
    return 0.01 * (1 + rank) * (1 + t % 3)


def batches(source, ranks):
    """[step][rank] -> rows or None, the same in every process."""
    rngs = [random.Random(100 + rank) for rank in range(ranks)]
    return [[source(rngs[rank], rank, t) for rank in range(ranks)] for t in range(STEPS)]


def final(controller, mus):
    return {"state": controller.state_dict(), "mu": torch.stack(mus)}


def run_rank(source, config, rank, ranks, with_kl=False):
    controller, mus = gk.GuidedAdaptiveController(config), []
    for t, step in enumerate(batches(source, ranks)):
        if step[rank] is not None:
            for part in step[rank].tensor_split(2):
                controller.observe(signals_of(part))
        mus.append(controller.step(kl_of(rank, ranks, t) if with_kl else None))
    return final(controller, mus)


def same(a, b):
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def error_of(function):
    try:
        function()
    except ValueError as error:
        return str(error)
    return None


def count_collectives(rank):
    """How many gathers a step makes: [[refresh, other], [refresh, other] under KLTarget]."""
    counts = []
    for config in (DEFAULT, KL):
        controller = gk.GuidedAdaptiveController(config)
        for _ in range(2):
            if rank == 0:
                controller.observe(signals_of(some_rows(random.Random(0), 2, 2)))
            with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gather:
                controller.step(0.1)
            counts.append(gather.call_count)
    return counts


def disagreements(rank):
    """What each rank is told when they do not fit together. Afterwards the group still works."""
    told = {}

    def logit_norms():
        controller = gk.GuidedAdaptiveController(gk.ControllerConfig("logit"))
        rows = torch.ones(2 + rank, 12)
        controller.observe(Signals(rows, True, "seq-mean-token-sum-norm", norm_length=7.0 + rank))
        controller.step()

    def steps():
        controller = gk.GuidedAdaptiveController()
        controller.load_state_dict({**controller.state_dict(), "step": 10 * rank})
        before = controller.state_dict()
        try:
            controller.step()
        finally:
            after = controller.state_dict()
            told["unchanged"] = all(
                torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items()
            )

    def configurations():
        gk.GuidedAdaptiveController(gk.ControllerConfig(trim=0.1 + rank / 10)).step()

    def widths():
        Signals(torch.ones(1, 12), hidden=torch.ones(1, 3 + rank)).all_reduce()

    for function in (logit_norms, steps, configurations, widths):
        told[function.__name__] = error_of(function)
    return told


def groups_of_one(rank, ranks):
    """A group of one rank keeps a controller to itself; a group without this rank is refused."""
    groups = [dist.new_group([r]) for r in range(ranks)]
    alone = gk.GuidedAdaptiveController(DEFAULT, process_group=groups[rank])
    alone.observe(signals_of(some_rows(random.Random(rank), 3, 3)))
    alone.step()
    others = gk.GuidedAdaptiveController(DEFAULT, process_group=groups[(rank + 1) % ranks])
    return alone.state_dict(), error_of(others.step)


def gathered_signals(rank):
    rows = torch.full((2 * rank, 12), float(rank))
    dtype = torch.float64 if rank == 1 else torch.float32
    out = Signals(
        rows.to(dtype), True, "token-mean", "seq-mean-token-sum", 3.5, torch.full((2 * rank, 2), 0.5)
    ).all_reduce()
    empty = Signals(torch.zeros(0, 12)).all_reduce()
    return {"rows": out.rows, "hidden": out.hidden, "metadata": out.metadata(), "empty": tuple(empty.rows.shape)}


def worker(rank, ranks, folder, backend):
    torch.set_num_threads(1)
    with gk.use_backend(backend):
        save_scenarios(rank, ranks, folder)


def save_scenarios(rank, ranks, folder):
    # Fresh memory is poisoned, as in every test: padding that nobody wrote would show. Not by
    # use_deterministic_algorithms, which imports all of inductor into every process.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = True
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    out = {name: run_rank(source, config, rank, ranks) for name, (config, source) in SCENARIOS.items()}
    out |= {name: run_rank(source, KL, rank, ranks, with_kl=True) for name, source in KL_SCENARIOS.items()}
    out["collectives"] = count_collectives(rank)
    out["told"] = disagreements(rank)
    out["alone"] = groups_of_one(rank, ranks)
    out["signals"] = gathered_signals(rank)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[(2, "cpu"), (3, "reference")], ids=str)
def ranks(request, tmp_path_factory):
    """What each rank saved; the tests run on its backend."""
    count, backend = request.param
    if backend == "cpu" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    folder = tmp_path_factory.mktemp(f"ranks{count}")
    # A plain fork after OpenMP has started threads can hang. The server imports once, before it has any, for all ranks.
    mp.get_context("forkserver").set_forkserver_preload(["torch.distributed", "gac_kernels"])
    mp.start_processes(worker, (count, str(folder), backend), count, start_method="forkserver")
    with gk.use_backend(backend):
        yield [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(count)]


@pytest.mark.parametrize("name", [*SCENARIOS, *KL_SCENARIOS])
def test_every_rank_holds_the_same_bits(ranks, name):
    for other in ranks[1:]:
        assert same(ranks[0][name], other[name])


@pytest.mark.parametrize("name", SCENARIOS)
def test_ranks_equal_one_process_with_all_rows(ranks, name):
    config, source = SCENARIOS[name]
    controller, mus = gk.GuidedAdaptiveController(config), []
    for step in batches(source, len(ranks)):
        seen = [rows for rows in step if rows is not None]
        if seen:
            controller.observe(signals_of(torch.cat(seen)))
        mus.append(controller.step())
    assert same(ranks[0][name], final(controller, mus))


def test_the_scenarios_meet_what_they_are_named_for(ranks):
    state = {name: ranks[0][name]["state"] for name in SCENARIOS}
    skipping = {name for name in state if state[name]["skipped"] > 0}
    assert skipping == {"nan_on_the_last_rank"}
    unmeasured = {name for name in state if not state[name]["measured"].any()}
    assert unmeasured == {"nobody_observes", "empty_batches"}
    assert all(state[name]["measured"].all() for name in state.keys() - unmeasured)


@pytest.mark.parametrize("name", KL_SCENARIOS)
def test_kl_is_weighted_by_live_rl_tokens(ranks, name):
    """A rank without RL tokens or with a nan does not weigh; where nobody observed, ranks weigh alike."""
    size = len(ranks)
    controller, skipped = gk.GuidedAdaptiveController(KL), 0
    for t, step in enumerate(batches(KL_SCENARIOS[name], size)):
        tokens = [0.0 if rows is None else rows[rows[:, 0] == 0, 1].sum().item() for rows in step]
        kls = [kl_of(rank, size, t) for rank in range(size)]
        fine = [(kl, n) for kl, n in zip(kls, tokens, strict=True) if not math.isnan(kl)]
        skipped += sum(math.isnan(kl) and n > 0 for kl, n in zip(kls, tokens, strict=True))
        if not any(n for _, n in fine):
            fine = [(kl, 1.0) for kl, _ in fine]
        seen = [rows for rows in step if rows is not None]
        if seen:
            controller.observe(signals_of(torch.cat(seen)))
        controller.step(sum(kl * n for kl, n in fine) / sum(n for _, n in fine))
    got, want = ranks[0][name]["state"], controller.state_dict()
    for key in ("mu", "alpha", "mu_star", "signals"):
        torch.testing.assert_close(got[key], want[key], rtol=1e-12, atol=0)
    assert got["skipped"] == skipped
    assert skipped > 0 or name == "kl, nobody"


def test_one_packed_collective_a_refresh(ranks):
    """The row counts, then the rows; nothing between refreshes. Under KLTarget one small gather more, every step."""
    assert all(rank["collectives"] == [2, 0, 3, 1] for rank in ranks)


def test_a_refresh_reads_only_the_row_counts():
    """Every read is forbidden but that of the exchanged integers. Two ranks that hold the same rows stand in."""
    rows = some_rows(random.Random(0), 6, 7)
    twice = gk.GuidedAdaptiveController(KL)
    twice.observe(signals_of(torch.cat((rows, rows))))
    twice.step(0.1)
    controller = gk.GuidedAdaptiveController(KL)
    with (
        mock.patch.object(distributed, "world_size", return_value=2),
        mock.patch.object(controller_module, "world_size", return_value=2),
        mock.patch.object(distributed, "all_gather_ints", lambda values, *_: [list(values)] * 2),
        mock.patch.object(distributed, "all_gather", lambda x, _: torch.stack((x, x))),
        forbid_host_reads() as watch,
    ):
        controller.observe(signals_of(rows))
        controller.step(0.1)
    assert watch.operators > 20
    assert same(controller.state_dict(), twice.state_dict())


def test_disagreements_are_told_to_every_rank_alike(ranks):
    told = ranks[0]["told"]
    assert all(rank["told"] == told for rank in ranks)
    for name, parts in {
        "logit_norms": ["signals of all ranks must agree", "7.0", "8.0"],
        "widths": ["signals of all ranks must agree", "width of hidden"],
        "steps": ["controllers of all ranks must agree in (step, configuration)", "[0, ", "[10, "],
        "configurations": ["controllers of all ranks must agree in (step, configuration)", "trim by rank: [0.1, 0.2"],
    }.items():
        assert all(part in told[name] for part in parts), told[name]
    assert told["unchanged"]


def test_a_group_of_one_rank_is_its_own(ranks):
    for rank, saved in enumerate(ranks):
        state, told = saved["alone"]
        expected = gk.GuidedAdaptiveController(DEFAULT)
        expected.observe(signals_of(some_rows(random.Random(rank), 3, 3)))
        expected.step()
        assert same(state, expected.state_dict())
        assert "process_group must contain this rank" in told
    assert not same(ranks[0]["alone"][0], ranks[1]["alone"][0])


def test_signals_all_reduce(ranks):
    want = torch.cat([torch.full((2 * r, 12), float(r), dtype=torch.float64) for r in range(len(ranks))])
    for rank in ranks:
        got = rank["signals"]
        assert same(got["rows"], want)
        assert same(got["hidden"], torch.full((len(want), 2), 0.5, dtype=torch.float64))
        assert got["metadata"] == (True, "token-mean", "seq-mean-token-sum", 3.5, 2)
        assert got["empty"] == (0, 12)
