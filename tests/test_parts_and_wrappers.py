"""Losses of a step that is spread over ranks in two ways that nothing in a batch tells: sequences in parts, and a
wrapped model whose loss is called inside or outside of its forward."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from docs_support import blocks_of
from torch.nn.parallel import DistributedDataParallel

import gac_kernels as gk

# Sequences in parts --------------------------------------------------------------------------------------------------
S, T = 4, 8
LENGTHS = torch.tensor([8, 3, 6, 5])
PARTS = slice(0, 4), slice(4, 8)  # the second has one sequence without a token


def lots():
    g = torch.Generator().manual_seed(0)
    logp = -torch.rand(S, T, generator=g, dtype=torch.float64)
    return logp, logp + 0.3 * torch.randn(S, T, generator=g, dtype=torch.float64)


def batch_of(old, part=slice(0, T)):
    mask = torch.arange(T) < LENGTHS[:, None]
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    return gk.TokenBatch.from_padded(
        torch.zeros(S, T, dtype=torch.long)[:, part], mask[:, part], is_expert_S=torch.arange(S) == 3,
        advantages=advantages, old_logprobs=old[:, part],
    )  # fmt: skip


def whole_and_parts(objective, counts=None):
    logp, old = lots()
    whole = gk.hybrid_loss(logp, batch_of(old), objective, 0.3).loss
    counts = counts or gk.Denominators.of([batch_of(old, part) for part in PARTS], objective)
    losses = [
        gk.hybrid_loss(logp[:, part], batch_of(old, part), objective, 0.3, denominators=counts).loss for part in PARTS
    ]
    return whole.item(), sum(losses).item()


@pytest.mark.parametrize("policy", [gk.GRPO(), gk.SAPO(), gk.CISPO()], ids=lambda policy: type(policy).__name__)
def test_parts_of_sequences_add_up_where_terms_and_aggregation_are_of_tokens(policy):
    whole, parts = whole_and_parts(gk.HybridObjective(policy, aggregation="token-mean"))
    assert parts == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_parts_under_a_sum_over_tokens_add_up_by_the_counts_of_whole_sequences(aggregation):
    objective = gk.HybridObjective(gk.GRPO(), aggregation=aggregation, norm_length=T)
    _, old = lots()
    whole, parts = whole_and_parts(objective, gk.Denominators.of(batch_of(old), objective))
    assert parts == pytest.approx(whole, rel=1e-12)
    assert abs(whole_and_parts(objective)[1] - whole) > 1e-3  # parts count as sequences


@pytest.mark.parametrize(
    "objective",
    [gk.HybridObjective(), gk.HybridObjective(gk.GSPO()), gk.HybridObjective(gk.GSPO(), aggregation="token-mean")],
    ids=["a mean over a sequence's tokens", "a sequence's ratio", "a sequence's ratio, token-mean"],
)
def test_parts_do_not_add_up_where_a_sequence_is_looked_at_as_one(objective):
    """Another value is right, which needs the whole sequence; docs/distributed.md says how to get it."""
    _, old = lots()
    whole, parts = whole_and_parts(objective, gk.Denominators.of(batch_of(old), objective))
    assert abs(parts - whole) > 1e-4


# A wrapped model -----------------------------------------------------------------------------------------------------
V, H = 31, 12


class Backbone(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Embedding(V, H), torch.nn.Linear(H, H), torch.nn.Tanh())

    def forward(self, input_ids):
        return SimpleNamespace(last_hidden_state=self.layers(input_ids))


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model, self.lm_head = Backbone(), torch.nn.Linear(H, V, bias=False)
        self.double()


def documented_step():
    """The class `Step` as docs/distributed.md shows it."""
    page = Path(__file__).parents[1] / "docs" / "distributed.md"
    (block,) = [block for block in blocks_of(page) if "class Step" in block.code and block.language == "python"]
    names = {"torch": torch, "gk": gk}
    exec(block.code[: block.code.index("\n\n\nstep =")], names)
    return names["Step"]


def share(rank):
    """Two sequences on rank 0, five on rank 1, of other lengths."""
    g = torch.Generator().manual_seed(rank)
    rows = (2, 5)[rank]
    ids = torch.randint(V, (rows, 7), generator=g)
    mask = torch.arange(6) < torch.randint(1, 7, (rows, 1), generator=g)
    return ids, mask, torch.arange(rows) % 2 == 0, torch.randn(rows, generator=g, dtype=torch.float64)


def batched(ids, mask, expert, advantages):
    return gk.TokenBatch.from_padded(ids[:, 1:], mask, is_expert_S=expert, advantages=advantages)


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def worker(rank, file):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    objective, seen = gk.HybridObjective(), {}
    ids, *rest = share(rank)
    batch = batched(ids, *rest)
    counts = gk.Denominators.of(batch, objective)
    model = Tiny()
    step = DistributedDataParallel(documented_step()(model))
    loss, signals = step(ids, batch, objective, 0.4, counts)
    loss.backward()
    seen["inside"], seen["tokens"] = gradients(model), signals.rows[:, 1].sum()
    model = Tiny()
    wrapper = DistributedDataParallel(model)
    wrapped = wrapper.module
    hidden = wrapped.model(ids).last_hidden_state[:, :-1]
    gk.hybrid_loss_from_hidden(
        hidden, wrapped.lm_head.weight, batch, objective, 0.4, denominators=counts
    ).loss.backward()
    seen["outside"] = gradients(model)
    torch.save(seen, f"{file}.{rank}")
    dist.destroy_process_group()


def test_a_loss_inside_the_wrapped_forward_has_the_gradients_of_all_ranks(tmp_path):
    """As documented; and outside of it nothing is averaged, which is documented as well."""
    file = str(tmp_path / "store")
    mp.start_processes(worker, (file,), nprocs=2, start_method="forkserver")
    ranks = [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(2)]
    ids, *rest = (torch.cat(parts) for parts in zip(*(share(rank) for rank in range(2)), strict=True))
    model = Tiny()
    loss, signals = documented_step()(model)(ids, batched(ids, *rest), gk.HybridObjective(), 0.4, None)
    loss.backward()
    for seen in ranks:
        torch.testing.assert_close(seen["inside"], gradients(model), rtol=1e-9, atol=1e-13)
    assert sum(seen["tokens"] for seen in ranks) == signals.rows[:, 1].sum()
    assert (ranks[0]["outside"] - ranks[1]["outside"]).abs().max() > 1e-3
