"""Ranks that fail: a batch that is not finite changes nothing on any rank, and a rank that is gone or does not call is
an error on the others and no hang."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import gac_kernels as gk
from gac_kernels.signals import concatenate

EVERY_STEP = gk.ControllerConfig(update_every=1)
PATIENCE = 8.0  # seconds that a collective waits for a rank
BOUND = 90.0  # seconds within which everyone must be done, on a machine with other work


@pytest.fixture(scope="module", autouse=True)
def server():
    """It imports once for all processes of this file."""
    mp.get_context("forkserver").set_forkserver_preload(["torch.distributed", "gac_kernels"])


def signals_of(rank: int, step: int, ranks: int) -> gk.Signals:
    """Of ragged ranks: rank 0 has no sequence, rank r has 2 r of r + 3 tokens. At step 1 the last rank's are nan."""
    generator = torch.Generator().manual_seed(10 * rank + step)
    S, T = 2 * rank, rank + 3
    logprobs = -3 * torch.rand(S, T, generator=generator)
    batch = gk.TokenBatch.from_padded(
        torch.zeros(S, T, dtype=torch.long),
        torch.rand(S, T, generator=generator) > 0.2,
        is_expert_S=torch.arange(S) % 2 == 0,
        advantages=torch.randn(S, generator=generator),
    )
    if step == 1 and rank == ranks - 1:
        logprobs = torch.where(torch.arange(T) == 1, torch.nan, logprobs)
        batch.mask[:, 1] = True
    # A loss of the whole path, not rows made by hand.
    return gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.5).signals


def steps(seen: range, ranks: int) -> list[dict]:
    """The states of a controller that sees these ranks' signals."""
    controller, states = gk.GuidedAdaptiveController(EVERY_STEP), []
    for step in range(3):
        controller.observe(concatenate([signals_of(rank, step, ranks) for rank in seen]))
        controller.step()
        states.append({k: v for k, v in controller.state_dict().items() if isinstance(v, torch.Tensor)})
    return states


def quarantined(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    torch.save(steps(range(rank, rank + 1), ranks), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_batch_that_is_not_finite_changes_nothing_on_any_of_ragged_ranks(ranks, tmp_path):
    want = steps(range(ranks), ranks)
    assert [bool(signals_of(ranks - 1, step, ranks).rows.isnan().any()) for step in range(3)] == [False, True, False]
    mp.start_processes(quarantined, (ranks, str(tmp_path)), ranks, start_method="forkserver")
    for rank in range(ranks):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for ours, theirs in zip(got, want, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs), rank
    before, during, after = want
    assert before["measured"].all() and before["skipped"] == 0
    assert during["skipped"] >= 1 and torch.equal(during["signals"][0], before["signals"][0])
    for state in want:
        assert all(value.isfinite().all() for value in state.values())
    assert not torch.equal(after["signals"], during["signals"])  # and the next good batch counts again


def left_alone(rank: int, folder: str, how: str) -> None:
    """Two good steps together; then rank 1 is killed, or never calls, while rank 0 steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    group = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    controller = gk.GuidedAdaptiveController(EVERY_STEP, process_group=group)
    rows = torch.rand(4, 12).abs() + 1
    rows[:, 0] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for _ in range(2):
        controller.observe(gk.Signals(rows))
        controller.step()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        while not Path(folder, "told").exists():
            time.sleep(0.05)
        os._exit(0)
    before, begin = controller.state_dict(), time.monotonic()
    controller.observe(gk.Signals(rows))
    told = "no error"
    try:
        controller.step()
    except RuntimeError as error:
        told = str(error)
    after = controller.state_dict()
    same = all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())
    torch.save({"told": told, "seconds": time.monotonic() - begin, "same": same}, f"{folder}/saw.pt")
    Path(folder, "told").touch()
    os._exit(0)  # an orderly end would wait for the other rank


@pytest.mark.parametrize("how", ["killed", "skipped"])
def test_a_rank_that_is_gone_or_does_not_call_is_an_error_and_no_hang(how, tmp_path):
    context = get_context("forkserver")
    processes = [context.Process(target=left_alone, args=(rank, str(tmp_path), how)) for rank in range(2)]
    try:
        for process in processes:
            process.start()
        end = time.monotonic() + BOUND
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        assert [process.exitcode for process in processes] == [0, -signal.SIGKILL if how == "killed" else 0]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    saw = torch.load(tmp_path / "saw.pt", weights_only=True)
    assert saw["told"] != "no error"
    assert saw["same"]  # what can fail comes before the first change of the state
    assert saw["seconds"] < BOUND / 2
    if how == "skipped":
        assert saw["seconds"] > PATIENCE / 2 and "imed out" in saw["told"], saw
