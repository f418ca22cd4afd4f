"""The compiled CPU operator against the eager reference in float64: every objective, layout and edge."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from support import POLICIES, policy_name
from token_loss_arguments import (
    ADVANTAGES,
    CU_SEQLENS,
    ENTROPY,
    GROUPS,
    IS_EXPERT,
    LENGTHS,
    LOGPROBS,
    MASK,
    NAMES,
    OLD,
    REF,
    ROLLOUT,
    SEQ_LEN,
    SUM_SQ,
    TOKEN_ARGUMENTS,
    WRONG_ARGUMENTS,
    arguments,
    check,
    compiled,
    reference,
)  # fmt: skip

import gac_kernels as gk
from gac_kernels import schemas, signals

pytestmark = pytest.mark.skipif(
    not gk.backends()["cpu"].startswith("cpu:"), reason="this install has no compiled module"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_every_policy(policy, dtype):
    objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
    everything = (OLD, REF, ROLLOUT, ENTROPY, SUM_SQ)
    for packed, token_advantages, optional in itertools.product((True, False), (False, True), (everything, (OLD,), ())):
        check(arguments(objective, dtype=dtype, packed=packed, token_advantages=token_advantages, optional=optional))
    if policy != gk.DFPO("adv_orthogonal", "product"):  # e^20 - (e^20 - e^-20) leaves nothing but rounding
        check(arguments(objective, dtype=dtype, spread=60.0, seed=3))  # the clamp at 20 acts on one token in three


@pytest.mark.parametrize("aggregation", schemas.AGGREGATIONS)
@pytest.mark.parametrize("estimator", schemas.KL_ESTIMATORS)
def test_kl_and_aggregations(estimator, aggregation):
    for weighted, supervised, optional in itertools.product(
        (False, True), zip(schemas.AGGREGATIONS, ("phi", "none", "phi", "none"), strict=True), ((OLD, REF), (REF,))
    ):
        objective = gk.HybridObjective(
            gk.SAPO(), gk.NLL(supervised[1]), kl_coef=0.1, kl_estimator=estimator, kl_ratio_weighted=weighted,
            aggregation=aggregation, supervised_aggregation=supervised[0], norm_length=100.0,
        )  # fmt: skip
        check(arguments(objective, optional=optional))
        check(arguments(objective, optional=optional, denominators=(1000.0, 333.0)))
        check(arguments(objective, optional=optional, dtype=torch.float64, denominators=(None, 7.0)))


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_extreme_values_of_live_tokens(policy):
    """Infinite, vanishing, impossible and undefined log-probs, each a sequence of its own: equal to the reference, and
    a gradient that is finite wherever the inputs are no nan."""
    logps, olds, advs = (
        (-math.inf, -200.0, -95.0, -25.0, -1e-3, 0.0, -3.0, math.nan),
        (-math.inf, -1.0, 0.0, -200.0),
        (1.5, -2.0, 0.0),
    )
    rows = torch.tensor(list(itertools.product(logps, olds, advs)))
    for dtype, old, expert in itertools.product((torch.float32, torch.float64), (True, False), (True, False)):
        objective = gk.HybridObjective(policy, kl_coef=0.1, kl_ratio_weighted=True)
        args = arguments(objective, dtype=dtype, lengths=[1] * len(rows), optional=(OLD, REF) if old else (REF,))
        args[MASK], args[IS_EXPERT] = torch.ones(len(rows), dtype=torch.bool), torch.full((len(rows),), expert)
        args[LOGPROBS], args[REF] = rows[:, 0].to(dtype).contiguous(), rows[:, 0].flip(0).nan_to_num(-1.0).to(dtype)
        args[ADVANTAGES], args[GROUPS] = rows[:, 2].to(dtype).contiguous(), torch.arange(len(rows))
        if old:
            args[OLD] = rows[:, 1].to(dtype).contiguous()
        got, want = compiled(*args), reference(*args)
        known = ~rows[:, 0].isnan() & ~(rows[:, 0].isinf() & rows[:, 1].isinf() & bool(old))  # -inf - -inf
        for name in ("rows", "slope"):
            a, b = (out[NAMES.index(name)][known] for out in (got, want))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert got[4][known].isfinite().all()
        assert got[0].isnan(), "a nan among the live tokens was swallowed"
        assert got[2][rows[:, 0].isnan(), signals.NLL_SUM].isnan().all()


def test_nothing_leaks_from_dead_places():
    """The same bits with poison as with zeros in every place that is masked."""
    for policy, token_advantages in itertools.product((gk.SAPO(), gk.GSPO(), gk.DFPO()), (False, True)):
        objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        poisoned, clean = (arguments(objective, token_advantages=token_advantages, poison=p) for p in (True, False))
        for name, a, b in zip(NAMES, compiled(*poisoned), compiled(*clean), strict=True):
            assert torch.equal(a, b), name
        dead = ~poisoned[MASK]
        assert all(float(out[dead].abs().sum()) == 0 for out in compiled(*poisoned)[3:])


def bits(outputs) -> list[bytes]:
    return [out.numpy().tobytes() for out in outputs]


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GRPO(), gk.GSPO(), gk.DFPO("adv_orthogonal")], ids=policy_name)
def test_the_same_bits_again_and_on_two_threads(policy):
    args = arguments(gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), lengths=[1500, 700, 3, 0, 900] * 8)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        once = bits(compiled(*args))
        assert all(bits(compiled(*args)) == once for _ in range(250))
        torch.set_num_threads(2)
        assert all(bits(compiled(*args)) == once for _ in range(20))
    finally:
        torch.set_num_threads(before)


def test_a_sequence_alone_packed_and_padded_has_the_same_bits():
    """Rows and slopes of a sequence do not depend on its neighbours, its place or the padding to its right."""
    for policy in (gk.SAPO("erf", 10.0, 12.0), gk.CISPO(), gk.GSPO()):
        objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        args = arguments(objective, denominators=(7.0, 7.0), packed=False)
        rows, slopes = compiled(*args)[2], compiled(*args)[4].view(len(LENGTHS), -1)
        for s, length in enumerate(LENGTHS):
            alone = list(args)
            for k in TOKEN_ARGUMENTS:
                alone[k] = args[k].view(len(LENGTHS), -1)[s, :length].clone()
            for k in (IS_EXPERT, ADVANTAGES, GROUPS):
                alone[k] = args[k][s : s + 1].clone()
            alone[SEQ_LEN] = length
            out = compiled(*alone)
            assert torch.equal(out[2][0], rows[s]), (policy, length)
            assert torch.equal(out[4], slopes[s, :length]), (policy, length)


# Shapes, offsets, arguments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 3, 0)])
def test_small_and_empty_batches(lengths):
    for policy, packed in itertools.product(POLICIES, (True, False)):
        args = arguments(gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), lengths=lengths, packed=packed)
        check(args)
        args[MASK] = torch.zeros_like(args[MASK])
        assert all(float(out.abs().sum()) == 0 for out in compiled(*args))


def test_offsets_that_lie():
    """They are clamped to [0, N] and never fall: nothing is read or written out of bounds, nobody's tokens get 0."""
    for offsets, counts in (
        ([2, 5, 8], [3, 3]), ([0, 20, 30], [10, 0]), ([-5, 4, 100], [4, 6]), ([0, 8, 3], [8, 0]), ([7, 3, 9], [0, 2]),
    ):  # fmt: skip
        args = arguments(gk.HybridObjective(), lengths=(4, 6), poison=False, optional=(OLD, ENTROPY))
        args[CU_SEQLENS], args[MASK] = torch.tensor(offsets), torch.ones(10, dtype=torch.bool)
        out = compiled(*args)
        assert out[2][:, signals.TOKENS].tolist() == counts
        begin = max(0, min(offsets[0], 10))
        owned = torch.zeros(10, dtype=torch.bool)
        owned[begin : begin + sum(counts)] = True
        assert all(torch.equal(x != 0, owned) for x in (out[3], out[4]))


def test_any_nonzero_mask_byte_is_live():
    args = arguments(gk.HybridObjective(), lengths=(40,))
    bytes_ = args[MASK].to(torch.uint8) * torch.arange(1, 41, dtype=torch.uint8)
    assert bits(compiled(*args)) == bits(compiled(*args[:MASK], bytes_.view(torch.bool), *args[MASK + 1 :]))


def test_many_groups():
    """DFPO on 30,000 sequences of interleaved groups (far beyond what S x S could do), against a scatter."""
    S = 30_000
    g = torch.Generator().manual_seed(0)
    args = arguments(gk.HybridObjective(gk.DFPO()), lengths=[1] * S, optional=(OLD,), poison=False, dtype=torch.float64)
    args[MASK], args[GROUPS] = (
        torch.ones(S, dtype=torch.bool),
        torch.randint(-(2**40), 2**40, (S // 4,), generator=g).repeat(4),
    )
    weight = (args[LOGPROBS] - args[OLD]).exp()
    weight[args[IS_EXPERT]] = math.inf
    _, ids = args[GROUPS].unique(return_inverse=True)
    smallest = torch.full((S,), math.inf, dtype=torch.float64).scatter_reduce(0, ids, weight, "amin")[ids]
    want = torch.where(args[IS_EXPERT], 0.0, -smallest * args[ADVANTAGES])
    torch.testing.assert_close(compiled(*args)[2][:, signals.CR], want, rtol=1e-13, atol=0)


@pytest.mark.parametrize(("position", "value", "message"), WRONG_ARGUMENTS)
def test_arguments_are_checked_by_name(position, value, message):
    args = arguments(gk.HybridObjective(), lengths=(4, 6))
    args[GROUPS] = None
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        compiled(*args)


def test_padded_size_is_checked():
    args = arguments(gk.HybridObjective(), lengths=(4, 6), packed=False)
    for seq_len in (0, 5, 7, -6):
        args[SEQ_LEN] = seq_len
        with pytest.raises(RuntimeError, match=r"logprobs must have S \* seq_len elements, got 12"):
            compiled(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_opcheck(dtype):
    for optional, packed in (((OLD, REF, ROLLOUT, ENTROPY, SUM_SQ), True), ((), False)):
        args = arguments(
            gk.HybridObjective(), dtype=dtype, lengths=(3, 0, 20), optional=optional, packed=packed, poison=False
        )
        torch.library.opcheck(torch.ops.gac_kernels.token_loss.default, tuple(args))
