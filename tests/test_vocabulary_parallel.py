"""A head spread over 2 and 4 ranks against one process that has it whole: even, uneven, empty and padded shards."""

from __future__ import annotations

from functools import cache

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hidden_support import HEAD, HiddenCase

import gac_kernels as gk
from gac_kernels import reference
from gac_kernels.schemas import ELSEWHERE
from gac_kernels.shards import VocabularyShard

V, PADDED = 37, 44
SHARDS = {
    2: {"even": (19, 18), "uneven": (30, 7), "empty": (37, 0), "padded": (22, 22), "all padding": (37, 7)},
    4: {"even": (10, 9, 9, 9), "uneven": (1, 20, 3, 13), "empty": (0, 18, 0, 19), "padded": (11, 11, 11, 11)},
}
OBJECTIVES = {
    "SAPO": gk.HybridObjective(kl_coef=0.1, entropy_coef=0.05),
    "DFPO": gk.HybridObjective(gk.DFPO()),
    "GSPO": gk.HybridObjective(gk.GSPO(), entropy_coef=0.1),
}
HEAT = gk.LogitTransform(0.7, softcap=5.0, scale=1.3)


def make(dtype=torch.float64, V=V) -> HiddenCase:
    return HiddenCase(dtype=dtype, V=V, transform=HEAT)


def part_of(sizes, rank):
    start = sum(sizes[:rank])
    return slice(start, start + sizes[rank])


def run_rank(case, sizes, rank, objective, **options):
    """This rank's loss, its gradients (its own rows of the head's) and what else there is."""
    columns = part_of(sizes, rank)
    rows = torch.cat((case.weight, torch.full((PADDED - V, 12), 30.0, dtype=case.weight.dtype)))
    biases = torch.cat((case.bias, torch.full((PADDED - V,), 30.0, dtype=case.weight.dtype)))
    hidden, weight, bias = (
        value.detach().clone().requires_grad_() for value in (case.hidden, rows[columns], biases[columns])
    )
    size = V if sum(sizes) > V else None
    out = gk.hybrid_loss_from_hidden(
        hidden, weight, case.batch, objective, 0.3, bias=bias, transform=HEAT, chunk_tokens=4,
        tp_group=dist.group.WORLD, vocab_size=size, **options,
    )  # fmt: skip
    (-1.5 * out.loss).backward()
    rows = {"loss": out.loss.detach(), "logprobs": out.logprobs, "entropy": out.token_entropy, "rows": out.signals.rows}
    rows |= {"hidden_means": out.signals.hidden, "hidden": hidden.grad, "weight": weight.grad, "bias": bias.grad}
    hidden, weight, bias = (value.detach().clone().requires_grad_() for value in (hidden, weight, bias))
    alone = gk.token_logprobs_from_hidden(
        hidden, weight, case.batch.targets, mask=case.batch.mask, bias=bias, transform=HEAT, chunk_tokens=5,
        tp_group=dist.group.WORLD, vocab_size=size,
    )  # fmt: skip
    (alone.logprobs.square() + alone.entropy).sum().backward()
    rows |= {f"alone_{n}": v.grad for n, v in (("hidden", hidden), ("weight", weight), ("bias", bias))}
    return rows | {"alone_logprobs": alone.logprobs.detach(), "alone_sum_sq": alone.sum_sq}


def worker(rank, file, world):
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=world)
    seen = {}
    try:
        for name, sizes in SHARDS[world].items():
            for objective in OBJECTIVES:
                seen[name, objective] = run_rank(make(), sizes, rank, OBJECTIVES[objective])
        seen["bfloat16"] = run_rank(make(torch.bfloat16), SHARDS[world]["uneven"], rank, OBJECTIVES["SAPO"])
        case = make()
        case.batch.targets[0, :3] = V + 2  # beyond the vocabulary: only an accelerator gets so far
        seen["nowhere"] = lost_targets(case, SHARDS[world]["even"], rank)
        seen["infinite"] = masses(SHARDS[world]["even"], rank)
        seen["errors"] = errors(rank, world)
        torch.save(seen, f"{file}.{rank}")
    finally:
        dist.destroy_process_group()


def lost_targets(case, sizes, rank):
    columns = part_of(sizes, rank)
    shard = VocabularyShard.of(dist.group.WORLD, sizes[rank], None, torch.device("cpu"))
    from gac_kernels import linear

    kind = case.batch.mask.reshape(-1).to(torch.uint8)
    none = (None, None, None, None)
    return linear.linear_statistics(
        case.hidden, case.weight[columns], None, case.batch.targets.reshape(-1), kind, None, *none, 5, 1.0, 0.0, 1.0,
        0.0, 0.0, shard=shard,
    )[0]  # fmt: skip


def masses(sizes, rank):
    """Shards of nothing but -inf, a target at -inf, and one infinite logit elsewhere."""
    shard = VocabularyShard.of(dist.group.WORLD, sizes[rank], None, torch.device("cpu"))
    logits, targets = infinite_logits()
    columns = part_of(sizes, rank)
    kind = torch.ones(len(targets), dtype=torch.uint8)
    static = (1.0, 0.0, 1.0, 0.0, 0.0)
    own = torch.ops.gac_kernels.row_statistics(
        logits[None, :, columns].contiguous(), shard.local(targets), kind, None, None, *static
    )
    return torch.stack(shard.merge(targets, own[:4], reference.RowTransform(1.0, 0.0, 1.0))[:3])


def infinite_logits():
    logits = torch.randn(5, V, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    logits[0, :25] = -torch.inf
    logits[1, 20:] = -torch.inf
    logits[2, :] = -torch.inf
    logits[2, 5] = 1.0
    logits[3, 9] = -torch.inf
    return logits, torch.tensor([30, 30, 5, 9, 36])


def errors(rank, world):
    """What disagreeing ranks and bad arguments raise, on every rank alike."""
    case, texts = make(), []
    for options in ({"vocab_size": 30 + rank}, {"vocab_size": 200}, {}):
        weight = case.weight if "vocab_size" in options else case.weight[:0]
        try:
            gk.hybrid_loss_from_hidden(
                case.hidden, weight, case.batch, OBJECTIVES["SAPO"], 0.3, tp_group=dist.group.WORLD, **options
            )
        except ValueError as error:
            texts.append(str(error))
    try:
        objective = gk.HybridObjective(supervised=gk.GIFT())
        gk.hybrid_loss_from_hidden(case.hidden, case.weight, case.batch, objective, 0.3, tp_group=dist.group.WORLD)
    except ValueError as error:
        texts.append(str(error))
    return texts


@cache
def ranks(world, directory):
    file = f"{directory}/store{world}"
    mp.start_processes(worker, (file, world), nprocs=world, start_method="forkserver")
    return [torch.load(f"{file}.{rank}", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("world", "name"), [(world, name) for world, sizes in SHARDS.items() for name in sizes])
def test_shards_equal_one_process(directory, world, name, objective):
    case, sizes = make(), SHARDS[world][name]
    want, gradients = case.oracle(OBJECTIVES[objective], transform=HEAT, scale=-1.5)
    leaves = case.leaves()
    live = torch.where(case.batch.mask[..., None], leaves["hidden"], 0.0)
    logits = live @ leaves["weight"].t() + leaves["bias"]
    alone = reference.token_logprobs(logits, case.batch.targets, case.batch.mask, HEAT)
    (alone.logprobs.square() + alone.entropy).sum().backward()
    near = {"rtol": 1e-10, "atol": 1e-13}
    for rank, found in enumerate(ranks(world, directory)):
        got, columns = found[name, objective], part_of(sizes, rank)
        torch.testing.assert_close(got["loss"], want.loss.detach(), **near)
        torch.testing.assert_close(got["logprobs"], want.logprobs, **near)
        torch.testing.assert_close(got["entropy"], want.token_entropy, **near)
        torch.testing.assert_close(got["rows"], want.signals.rows, **near)
        torch.testing.assert_close(got["alone_logprobs"], alone.logprobs.detach(), **near)
        torch.testing.assert_close(got["alone_sum_sq"], alone.sum_sq, **near)
        for key in HEAD:
            for mine, theirs in ((got[key], gradients[key]), (got[f"alone_{key}"], leaves[key].grad)):
                if key != "hidden":
                    assert mine.shape[0] == sizes[rank] and not mine[max(0, V - columns.start) :].any()
                    mine, theirs = mine[: max(0, V - columns.start)], theirs[columns]
                torch.testing.assert_close(mine, theirs, **near)
        first = ranks(world, directory)[0][name, objective]
        for key in ("loss", "logprobs", "entropy", "rows", "hidden", "hidden_means"):
            assert torch.equal(got[key], first[key]), f"{key} differs between ranks"


@pytest.mark.parametrize("world", SHARDS)
def test_sixteen_bits(directory, world):
    case = make(torch.bfloat16)
    want, gradients = case.oracle(OBJECTIVES["SAPO"], transform=HEAT, scale=-1.5)
    for rank, found in enumerate(ranks(world, directory)):
        got, columns = found["bfloat16"], part_of(SHARDS[world]["uneven"], rank)
        torch.testing.assert_close(got["logprobs"].double(), want.logprobs, rtol=2e-6, atol=4e-6)
        for key in HEAD:
            theirs = gradients[key] if key == "hidden" else gradients[key][columns]
            error = (got[key].double() - theirs).abs().max()
            assert got[key].dtype == torch.bfloat16 and error <= 2.0**-8 * gradients[key].abs().max()


@pytest.mark.parametrize("world", SHARDS)
def test_a_target_in_no_shard_makes_its_row_nan(directory, world):
    case = make()
    lost = torch.zeros_like(case.batch.mask)
    lost[0, :3] = True
    for found in ranks(world, directory):
        got = found["nowhere"].view(lost.shape)
        assert torch.equal(got.isnan(), lost & case.batch.mask)


@pytest.mark.parametrize("world", SHARDS)
def test_shards_without_mass(directory, world):
    logits, targets = infinite_logits()
    want = reference.token_logprobs(logits, targets)
    for found in ranks(world, directory):
        logprobs, entropy, sum_sq = found["infinite"]
        torch.testing.assert_close(logprobs, want.logprobs, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(entropy, want.entropy, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(sum_sq, want.sum_sq, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("world", SHARDS)
def test_errors_are_the_same_on_all_ranks(directory, world):
    for found in ranks(world, directory):
        disagree, large, empty, gift = found["errors"]
        assert "vocab_size must be the same on all ranks" in disagree
        assert f"vocab_size must be in [1, {world * V}]" in large
        assert "got empty shards on all" in empty
        assert "tp_group is not supported with objective.supervised = GIFT" in gift


def test_columns_of_a_shard():
    shard = VocabularyShard(None, 10, 5, 30)
    targets = torch.tensor([9, 10, 14, 15, -100], dtype=torch.int32)
    assert shard.local(targets).tolist() == [ELSEWHERE, 0, 4, ELSEWHERE, ELSEWHERE]
    assert shard.local(targets).dtype == torch.int32
