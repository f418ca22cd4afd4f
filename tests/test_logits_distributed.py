"""Two ranks with ragged shares of a batch, under DDP and FSDP2, against one process that has it all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from logit_support import make
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import gac_kernels as gk

OBJECTIVE = gk.HybridObjective(kl_coef=0.1, aggregation="token-mean")
SHARES = slice(0, 1), slice(1, 4)  # the first has rollouts only
HIDDEN = 12


def everything():
    """A head, hidden states and the batch of logits it will make; the same on every rank."""
    case = make((7, 5, 9, 3), (False, True, False, True), V=37, dtype=torch.float64, seed=21, poison=False)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(HIDDEN, HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 37))
    hidden = torch.randn(*case.batch.targets.shape, HIDDEN, dtype=torch.float64)
    return model.double(), hidden, case.batch


def share(batch, part):
    names = ("targets", "mask", "is_expert", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "groups")
    return gk.TokenBatch(cu_seqlens=None, **{name: getattr(batch, name)[part] for name in names})


def worker(rank, file):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    seen = {}
    try:
        model, hidden, batch = everything()
        part = SHARES[rank]
        own = share(batch, part)
        counts = gk.Denominators.of(own, OBJECTIVE)
        for name in ("ddp", "fsdp"):
            ours = copy.deepcopy(model)
            if name == "ddp":
                ours = DistributedDataParallel(ours)
            else:
                mesh = init_device_mesh("cpu", (2,))
                for layer in (ours[0], ours[2], ours):
                    fully_shard(layer, mesh=mesh)
            logits = ours(hidden[part])
            out = gk.hybrid_loss_from_logits(logits, own, OBJECTIVE, 0.3, inplace=True, denominators=counts)
            out.loss.backward()  # both average over the ranks
            gradients = [p.grad.full_tensor() if name == "fsdp" else p.grad for p in ours.parameters()]
            rows = out.signals.all_reduce().rows
            seen[name] = (dist_sum(out.loss.detach()) / 2, gradients, rows)
        torch.save(seen, f"{file}.{rank}")
    finally:
        dist.destroy_process_group()


def dist_sum(value):
    dist.all_reduce(value)
    return value


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    file = tmp_path_factory.mktemp("ranks") / "store"
    mp.start_processes(worker, (str(file),), nprocs=2, start_method="forkserver")
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_ranks_equal_one_process(ranks, name):
    model, hidden, batch = everything()
    out = gk.hybrid_loss_from_logits(model(hidden), batch, OBJECTIVE, 0.3)
    out.loss.backward()
    for loss, gradients, rows in (rank[name] for rank in ranks):
        torch.testing.assert_close(loss, out.loss.detach(), rtol=1e-12, atol=1e-13)
        for got, want in zip(gradients, model.parameters(), strict=True):
            torch.testing.assert_close(got, want.grad, rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(rows, out.signals.rows, rtol=1e-12, atol=1e-13)
