"""Two ranks under DDP and FSDP2 against one process: the same steps, one mu, exact resume; whole runs by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from small_runs import small

import gac_kernels as gk
from gac_kernels.train import train
from gac_kernels.train.checkpoint import load_checkpoint
from gac_kernels.train.loop import Trainer
from gac_kernels.train.metrics import read_metrics
from gac_kernels.train.ranks import Ranks
from gac_kernels.train.rollouts import RolloutBatch

KINDS = ("ddp", "fsdp")
STEPS = 4
CONTROLLER = gk.ControllerConfig(update_every=1, change_cap=0.2, ema_beta=0.5, prior=None, init_mu=0.4)
OBJECTIVES = {
    "auto": gk.HybridObjective(kl_coef=0.1, entropy_coef=0.01, aggregation="token-mean"),
    "logits": gk.HybridObjective(gk.GRPO()),
}


def settings(head, fsdp=False, **more):
    return small(
        prompts_per_step=4, group_size=3, demonstrations_per_step=3, micro_batches=2, steps=STEPS, reference=True,
        dtype="float64", controller_config=CONTROLLER, objective=OBJECTIVES[head], head=head, fsdp=fsdp,
        learning_rate=1e-2, **more,
    )  # fmt: skip


def in_bfloat16(fsdp=False):
    return replace(settings("auto", fsdp), dtype="bfloat16", learning_rate=1e-4)


def batches() -> list[RolloutBatch]:
    """Two batches of random rows: four groups of three rollouts, three demonstrations, lengths ragged."""
    made = []
    for seed in (1, 2):
        g = torch.Generator().manual_seed(seed)
        micro = torch.tensor([0] * 8 + [1] * 7)
        groups = torch.tensor([0, 0, 0, 2, 2, 2, -1, -1, 1, 1, 1, 3, 3, 3, -1])
        expert = groups < 0
        lengths = torch.randint(1, 8, (15,), generator=g)
        made.append(
            RolloutBatch(
                input_ids=torch.randint(2, 15, (15, 12), generator=g),
                prompt_mask=torch.arange(5)[None] >= torch.randint(0, 4, (15, 1), generator=g),
                response_mask=torch.arange(7)[None] < lengths[:, None],
                is_expert=expert,
                advantages=torch.randn(15, generator=g).masked_fill(expert, 0.0),
                groups=groups,
                micro=micro,
                ref_logprobs=-3 * torch.rand(15, 7, generator=g, dtype=torch.float64),
            )
        )
    return made


# The second rank has a single demonstration, and none in its second micro-batch.
SHARES = (torch.tensor([0, 1, 2, 6, 8, 9, 10, 14]), torch.tensor([3, 4, 5, 7, 11, 12, 13]))


def take_steps(trainer: Trainer, share=None) -> dict:
    """Four steps on given batches; what they leave."""
    trainer.steps_done, trainer.reference = trainer.config.warmup_sft_steps, trainer.policy
    logged = []
    for batch in batches() * (STEPS // 2):
        rows = batch if share is None else RolloutBatch(**{n: v[share] for n, v in batch.state_dict().items()})
        metrics, _ = trainer._update(rows, trainer.config.objective, trainer.mixing.mu, trainer.mixing.scale)
        trainer.steps_done += 1
        logged.append({name: float(value) for name, value in metrics.items()})
    weights = {name: value.clone() for name, value in trainer.engine.weights().items()}
    return {"weights": weights, "mu": trainer.mixing.mu.clone(), "logged": logged}


def resumed(head, fsdp, ranks) -> bool:
    """Two steps, state to another trainer, two more: the weights and mu of four steps in one go."""
    straight = Trainer(settings(head, fsdp), ranks)
    for _ in range(2):
        straight.step()
    saved = straight.state_dict()
    saved = torch.load(_stored(saved, ranks), weights_only=True)
    other = Trainer(settings(head, fsdp), ranks)
    other.load_state_dict(saved)
    for _ in range(2):
        seen, again = straight.step(), other.step()
    same = all(seen[name] == again[name] for name in seen if not name.endswith("seconds"))
    mine, theirs = straight.engine.weights(), other.engine.weights()
    return same and all(torch.equal(mine[name], theirs[name]) for name in mine)


def _stored(saved, ranks):
    path = f"{os.environ['RANKS_FILE']}.state{ranks.rank}"
    torch.save(saved, path)
    return path


def worker(rank, file):
    os.environ["RANKS_FILE"] = file
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        ranks, seen = Ranks(rank, 2), {}
        for kind in KINDS:
            for head in OBJECTIVES:
                seen[kind, head] = take_steps(Trainer(settings(head, kind == "fsdp"), ranks), SHARES[rank])
                seen[kind, head, "resumed"] = resumed(head, kind == "fsdp", ranks)
            seen[kind, "bfloat16"] = take_steps(Trainer(in_bfloat16(kind == "fsdp"), ranks), SHARES[rank])
        torch.save(seen, f"{file}.{rank}")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "store"
    mp.start_processes(worker, (str(file),), nprocs=2, start_method="forkserver")
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("head", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_take_the_steps_of_one_process(ranks, kind, head):
    want = take_steps(Trainer(settings(head)))
    assert want["mu"] != 0.4  # it has moved
    for found in ranks:
        got = found[kind, head]
        assert torch.equal(got["mu"], ranks[0][kind, head]["mu"])  # to the bit
        torch.testing.assert_close(got["mu"], want["mu"], rtol=1e-6, atol=1e-7)
        for name, value in want["weights"].items():
            assert torch.equal(got["weights"][name], ranks[0][kind, head]["weights"][name])
            torch.testing.assert_close(got["weights"][name], value, rtol=1e-6, atol=1e-7, msg=name)
        for mine, theirs in zip(got["logged"], want["logged"], strict=True):
            assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_in_bfloat16_keep_float32_weights(ranks, kind):
    """Rows are summed in another order, so products that round to bfloat16 may round to its neighbour."""
    want = take_steps(Trainer(in_bfloat16()))
    for found in ranks:
        got = found[kind, "bfloat16"]
        for name, value in want["weights"].items():
            assert got["weights"][name].dtype == value.dtype == torch.float32
            assert torch.equal(got["weights"][name], ranks[0][kind, "bfloat16"]["weights"][name])
        for mine, theirs in zip(got["logged"], want["logged"], strict=True):
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=0.02, abs=1e-3)
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)


@pytest.mark.parametrize("head", OBJECTIVES)
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact(ranks, kind, head):
    assert all(found[kind, head, "resumed"] for found in ranks)


@pytest.mark.parametrize(("controller", "fsdp"), [("gac", True), ("hpt", False)], ids=["gac-fsdp", "hpt-ddp"])
def test_torchrun(tmp_path, controller, fsdp):
    """The command line unchanged, on two ranks; the run goes on from its checkpoint, and another count is refused."""
    arguments = [
        "train", "--tiny-hidden", "16", "--tiny-layers", "1", "--warmup-sft-steps", "2", "--warmup-sft-batch", "4",
        "--steps", "3", "--prompts-per-step", "3", "--group-size", "2", "--demonstrations-per-step", "2",
        "--max-new-tokens", "24", "--eval-size", "5", "--checkpoint-every", "2", "--controller", controller,
        "--reference", "--output", str(tmp_path / "run"), "--json", *(["--fsdp"] if fsdp else []),
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "gac_kernels", *arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(results) == 1 and results[0]["steps"] == 3
    log = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5]
    assert all(value == value for line in log for value in line.values())
    checkpoint = load_checkpoint(tmp_path / "run" / "checkpoints")
    assert len(checkpoint.state["ranks"]) == 2
    model = small(model=str(tmp_path / "run" / "model"), output=tmp_path / "next", steps=1, warmup_sft_steps=0)
    assert train(model, progress=False).steps == 1
    alone = subprocess.run(
        [sys.executable, "-m", "gac_kernels", *arguments, "--resume"], capture_output=True, text=True, timeout=300
    )
    assert alone.returncode != 0 and "as many ranks as the run it continues: 2, got 1" in alone.stderr


def test_counts_that_ranks_cannot_share():
    for changes, text in (
        ({"prompts_per_step": 1, "micro_batches": 1}, "prompts_per_step must be >= 2"),
        ({"warmup_sft_batch": 1, "warmup_sft_steps": 1}, "warmup_sft_batch must be >= 2"),
        ({"advantage_scale": "batch"}, "advantage_scale='batch' is not supported"),
    ):
        with pytest.raises(ValueError, match=text):
            Trainer(replace(settings("auto"), **changes), Ranks(0, 2))


def test_an_incomplete_environment(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="RANK must be set where WORLD_SIZE is 2: start the run with torchrun"):
        Ranks.from_environment("cpu")
