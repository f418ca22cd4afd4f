"""The token-level loss and the token weights in CUDA C++, run by the emulation, against the float64 reference."""

from __future__ import annotations

import itertools
import math

import cuda_emulation
import pytest
import torch
from support import POLICIES, Case, policy_name
from token_loss_arguments import (
    ADVANTAGES,
    CU_SEQLENS,
    ENTROPY,
    GROUPS,
    IS_EXPERT,
    LENGTHS,
    LOGPROBS,
    MASK,
    MU,
    NAMES,
    OLD,
    REF,
    ROLLOUT,
    SEQ_LEN,
    SUM_SQ,
    SUPERVISED,
    TOKEN_ARGUMENTS,
    WRONG_ARGUMENTS,
    arguments,
    check,
    errors,
    reference,
)  # fmt: skip

import gac_kernels as gk
from gac_kernels import schemas, signals

EVERYTHING = (OLD, REF, ROLLOUT, ENTROPY, SUM_SQ)
# An empty sequence, one token, lengths on and off a pack, more than all threads of a block take at once.
SHORT = (5, 0, 16, 1, 33, 300)
ONE_OF_EACH = (gk.SAPO("erf"), gk.GRPO(delta=1.5), gk.CISPO(), gk.GSPO(0.05, 0.05), gk.DFPO("adv_orthogonal"))


@pytest.fixture(scope="module", autouse=True)
def emulation():
    cuda_emulation.load()


def emulated(*args):
    return torch.ops.gac_kernels.token_loss_cuda.default(*args)


def same_bits(a, b) -> bool:
    return all(x.numpy().tobytes() == y.numpy().tobytes() for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_every_policy(policy, dtype):
    objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
    check(arguments(objective, dtype=dtype), emulated)
    check(arguments(objective, dtype=dtype, lengths=SHORT, packed=False, token_advantages=True), emulated)
    check(arguments(objective, dtype=dtype, lengths=SHORT, optional=(OLD,), token_advantages=True), emulated)
    check(arguments(objective, dtype=dtype, lengths=SHORT, packed=False, optional=()), emulated)
    if policy != gk.DFPO("adv_orthogonal", "product"):  # e^20 - (e^20 - e^-20) leaves nothing but rounding
        check(arguments(objective, dtype=dtype, lengths=SHORT, spread=60.0, seed=3), emulated)  # the clamp at 20 acts


@pytest.mark.parametrize("aggregation", schemas.AGGREGATIONS)
@pytest.mark.parametrize("estimator", schemas.KL_ESTIMATORS)
def test_kl_aggregations_and_denominators(estimator, aggregation):
    """Each aggregation on the policy's branch beside its neighbour in the list on the other one."""
    names = schemas.AGGREGATIONS
    for weighted in (False, True):
        objective = gk.HybridObjective(
            gk.SAPO(), gk.NLL("none" if weighted else "phi"), kl_coef=0.1, kl_estimator=estimator,
            kl_ratio_weighted=weighted, aggregation=aggregation,
            supervised_aggregation=names[(names.index(aggregation) + 1) % 4], norm_length=100.0,
        )  # fmt: skip
        check(arguments(objective, lengths=SHORT, optional=(OLD, REF), spread=2.0), emulated)
        check(arguments(objective, lengths=SHORT, optional=(REF,), denominators=(1000.0, 333.0)), emulated)
        given = arguments(objective, lengths=SHORT, dtype=torch.float64, denominators=(None, 7.0))
        check(given, emulated)


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_values_of_the_supervised_term(policy):
    """GIFT's, which are no multiple of the log-prob: in place of c_s logp, whose slope is then -1."""
    for dtype in (torch.float32, torch.float64):
        args = arguments(gk.HybridObjective(policy, gk.NLL("none")), dtype=dtype, lengths=SHORT)
        args[SUPERVISED] = torch.rand(args[LOGPROBS].shape, dtype=dtype)
        args[SUPERVISED][~args[MASK]] = math.nan
        check(args, emulated)


def test_a_sequence_of_70000_tokens():
    """Beyond a grid axis of 65,535 and far beyond what a block takes at once."""
    for policy in (gk.GRPO(), gk.GSPO()):
        objective = gk.HybridObjective(policy, kl_coef=0.05, aggregation="token-mean")
        check(arguments(objective, lengths=[70_000, 3], optional=(OLD, REF, SUM_SQ)), emulated)


@pytest.mark.parametrize("policy", ONE_OF_EACH, ids=policy_name)
def test_extreme_values_of_live_tokens(policy):
    """Infinite, vanishing, impossible and undefined log-probs, each a sequence of its own: equal to the reference, and
    a gradient that is finite wherever the inputs are no nan."""
    logps = (-math.inf, -200.0, -25.0, -1e-3, 0.0, math.nan)
    rows = torch.tensor(list(itertools.product(logps, (-math.inf, 0.0, -200.0), (1.5, -2.0))))
    for dtype, old in itertools.product((torch.float32, torch.float64), (True, False)):
        objective = gk.HybridObjective(policy, kl_coef=0.1, kl_ratio_weighted=True)
        args = arguments(objective, dtype=dtype, lengths=[1] * len(rows), optional=(OLD, REF) if old else (REF,))
        args[MASK] = torch.ones(len(rows), dtype=torch.bool)
        args[LOGPROBS], args[REF] = rows[:, 0].to(dtype).contiguous(), rows[:, 0].flip(0).nan_to_num(-1.0).to(dtype)
        args[ADVANTAGES], args[GROUPS] = rows[:, 2].to(dtype).contiguous(), torch.arange(len(rows))
        if old:
            args[OLD] = rows[:, 1].to(dtype).contiguous()
        got, want = emulated(*args), reference(*args)
        known = ~rows[:, 0].isnan() & ~(rows[:, 0].isinf() & rows[:, 1].isinf() & bool(old))  # -inf - -inf
        for name in ("rows", "slope"):
            a, b = (out[NAMES.index(name)][known] for out in (got, want))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert got[4][known].isfinite().all()
        assert got[0].isnan(), "a nan among the live tokens was swallowed"
        assert got[2][rows[:, 0].isnan(), signals.NLL_SUM].isnan().all()


@pytest.mark.parametrize("where", [LOGPROBS, OLD, REF, ROLLOUT, ADVANTAGES, ENTROPY, SUM_SQ])
def test_live_nan(where):
    """What the trainer made travels as in the reference: into the loss, its own sums and slopes, and nowhere else. What
    engines return is left out."""
    for policy in (gk.GRPO(delta=2.0), gk.GSPO(), gk.DFPO(), gk.DFPO("adv_orthogonal", "product")):
        objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.1)
        args = arguments(objective, dtype=torch.float64, lengths=(4, 4), token_advantages=True, poison=False)
        args[MASK], args[IS_EXPERT] = torch.ones(8, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
        args[GROUPS] = torch.zeros(2, dtype=torch.int64)
        args[where][1] = math.nan
        check(args, emulated)  # which compares the places of nan
        assert emulated(*args)[0].isnan() == (where in (LOGPROBS, ADVANTAGES, ENTROPY))


def test_nothing_leaks_from_dead_places():
    """The same bits with poison as with zeros in every place that is masked."""
    for policy, token_advantages in itertools.product((gk.SAPO(), gk.GSPO(), gk.DFPO()), (False, True)):
        objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        poisoned, clean = (
            arguments(objective, lengths=SHORT, token_advantages=token_advantages, poison=p) for p in (True, False)
        )
        got = emulated(*poisoned)
        assert same_bits(got, emulated(*clean))
        assert all(float(out[~poisoned[MASK]].abs().sum()) == 0 for out in got[3:])


def test_rollouts_without_advantages_are_not_zero():
    for policy in (gk.SAPO(), gk.GSPO()):
        args = arguments(gk.HybridObjective(policy), lengths=(4,))
        args[ADVANTAGES] = None
        assert emulated(*args)[0].isnan()


# Order ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO("adv_orthogonal")], ids=policy_name)
def test_the_same_bits_again(policy):
    args = arguments(gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), lengths=[300, 70, 3, 0, 90])
    once = emulated(*args)
    assert all(same_bits(emulated(*args), once) for _ in range(10))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_a_sequence_alone_packed_padded_and_unaligned_has_the_same_bits(dtype):
    """Rows and slopes of a sequence do not depend on its neighbours, its place or the padding to its right."""
    for policy in (gk.SAPO("erf", 10.0, 12.0), gk.GSPO()):
        objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        args = arguments(objective, dtype=dtype, lengths=LENGTHS[:8], denominators=(7.0, 7.0), packed=False)
        S = len(args[IS_EXPERT])
        rows, slopes = emulated(*args)[2], emulated(*args)[4].view(S, -1)
        for s, length in enumerate(LENGTHS[:S]):
            alone = list(args)
            for k in TOKEN_ARGUMENTS:
                own = args[k].view(S, -1)[s, :length]
                alone[k] = torch.cat([own[:0].new_zeros(s), own])[s:]  # begins s elements behind an aligned place
            for k in (IS_EXPERT, ADVANTAGES, GROUPS):
                alone[k] = args[k][s : s + 1].clone()
            alone[SEQ_LEN] = length
            out = emulated(*alone)
            assert torch.equal(out[2][0], rows[s]), (policy, length)
            assert torch.equal(out[4], slopes[s, :length]), (policy, length)


# Shapes, offsets, arguments -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lengths", [(), (0,), (0, 0, 0), (1,), (0, 3, 0)])
def test_small_and_empty_batches(lengths):
    for policy, packed in itertools.product(ONE_OF_EACH, (True, False)):
        args = arguments(gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), lengths=lengths, packed=packed)
        check(args, emulated)
        args[MASK] = torch.zeros_like(args[MASK])
        assert all(float(out.abs().sum()) == 0 for out in emulated(*args))


@pytest.mark.parametrize("expert", [True, False])
def test_a_branch_without_tokens(expert):
    for policy in ONE_OF_EACH:
        args = arguments(gk.HybridObjective(policy, kl_coef=0.05), lengths=SHORT, dtype=torch.float64)
        args[IS_EXPERT] = torch.full_like(args[IS_EXPERT], expert)
        check(args, emulated)


def test_mu_and_what_it_leaves():
    """mu and 1 - mu in float32 give what mu gives in float64, where mu alone, rounded, does not."""
    mu = 0.9999
    args = arguments(gk.HybridObjective(), lengths=SHORT, dtype=torch.float64)
    args[MU] = torch.tensor(mu, dtype=torch.float64)
    want = weights(emulated, args)[1]
    narrow = [
        value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in args
    ]
    narrow[MU] = torch.tensor([mu, 1.0 - mu])
    torch.testing.assert_close(weights(emulated, narrow)[1].double(), want, rtol=2.0**-22, atol=0)
    torch.testing.assert_close(emulated(*narrow)[0].double(), emulated(*args)[0], rtol=1e-6, atol=1e-6)
    narrow[MU] = torch.tensor(mu)
    assert (weights(emulated, narrow)[1].double() / want - 1).abs().nan_to_num().max() > 1e-5


@pytest.mark.parametrize("offsets", [(0, 4, 9), (-5, 4, 99), (7, 2, 9), (3, 5, 6), (9, 9, 9), (0, 0, 0), (99, -1, 50)])
def test_offsets_from_anywhere(offsets):
    """Offsets that only an accelerator holds are not checked: they are clamped and never fall, and what no sequence
    covers is 0."""
    args = arguments(gk.HybridObjective(), lengths=(4, 5), poison=False, optional=(OLD, ENTROPY))
    args[CU_SEQLENS], args[MASK] = torch.tensor(offsets), torch.ones(9, dtype=torch.bool)
    rising = list(itertools.accumulate(args[CU_SEQLENS].clamp(0, 9).tolist(), max))
    covered = torch.zeros(9, dtype=torch.bool)
    covered[rising[0] : rising[-1]] = True
    out = emulated(*args)
    assert out[2][:, signals.TOKENS].tolist() == [last - first for first, last in itertools.pairwise(rising)]
    assert out[3].ne(0).equal(covered) and out[4].ne(0).equal(covered) and not out[5][~covered].any()
    kind, weight, _ = weights(emulated, args)
    assert kind.ne(0).equal(covered) and weight.ne(0).equal(covered)


def test_any_nonzero_mask_byte_is_live():
    args = arguments(gk.HybridObjective(gk.GSPO()), lengths=(200,))
    bytes_ = args[MASK].to(torch.uint8) * torch.arange(1, 201, dtype=torch.uint8)
    assert same_bits(emulated(*args), emulated(*args[:MASK], bytes_.view(torch.bool), *args[MASK + 1 :]))
    assert float(emulated(*args)[2][0, signals.TOKENS]) == float(args[MASK].sum())


def test_many_groups():
    """DFPO on 100 sequences of interleaved groups: more than a block has threads, and spread over the blocks."""
    S = 100
    g = torch.Generator().manual_seed(0)
    for transform in ("min_replace", "adv_orthogonal"):
        objective = gk.HybridObjective(gk.DFPO(transform))
        args = arguments(objective, lengths=[1] * S, optional=(OLD,), poison=False, dtype=torch.float64)
        args[GROUPS] = torch.randint(-(2**40), 2**40, (S // 5,), generator=g).repeat(5)
        check(args, emulated)


@pytest.mark.parametrize(("position", "value", "message"), WRONG_ARGUMENTS)
def test_arguments_are_checked_by_name(position, value, message):
    args = arguments(gk.HybridObjective(), lengths=(4, 6))
    args[GROUPS] = None
    args[position] = value
    with pytest.raises(RuntimeError, match=message):
        emulated(*args)


def test_padded_size_is_checked():
    args = arguments(gk.HybridObjective(), lengths=(4, 6), packed=False)
    for seq_len in (0, 5, 7, -6):
        args[SEQ_LEN] = seq_len
        with pytest.raises(RuntimeError, match=r"logprobs must have S \* seq_len elements, got 12"):
            emulated(*args)


def test_opcheck():
    for optional, packed in ((EVERYTHING, True), ((), False)):
        args = arguments(
            gk.HybridObjective(gk.GSPO()), lengths=(3, 0, 20), optional=optional, packed=packed, poison=False
        )
        torch.library.opcheck(
            torch.ops.gac_kernels.token_loss_cuda.default, tuple(args), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_public_loss(layout):
    batch, extra = getattr(Case((6, 3, 7), (False, True, False), seed=6), layout)()
    logprobs = extra.pop("logprobs").requires_grad_()
    objective = gk.HybridObjective(gk.GRPO(), kl_coef=0.05, norm_length=8.0)
    outcome = {}
    for backend in ("cuda", "reference"):
        with gk.use_backend(backend):
            out = gk.hybrid_loss(logprobs, batch, objective, 0.3, **extra)
            outcome[backend] = (out.loss.detach(), *torch.autograd.grad(out.loss, logprobs), out.signals.rows)
    for a, b in zip(outcome["cuda"], outcome["reference"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# Token weights --------------------------------------------------------------------------------------------------------
def weights(operator, args):
    """kind, weight and advantages of the tokens, by the operator beside token_loss's ``operator``."""
    form = "token_weights_cuda" if operator is emulated else "token_weights_reference"
    return getattr(torch.ops.gac_kernels, form)(*args[MASK : TOKEN_ADVANTAGES + 1], *args[MU : MU + 3], *args[-3:])


TOKEN_ADVANTAGES = ADVANTAGES + 1


@pytest.mark.parametrize("aggregation", schemas.AGGREGATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_token_weights(aggregation, dtype):
    """The reference's, to rounding; kinds and advantages bit for bit, and nan where rollouts have no advantages."""
    objective = gk.HybridObjective(aggregation=aggregation, supervised_aggregation="seq-mean-token-sum")
    for packed, per_token, given in itertools.product((True, False), repeat=3):
        args = arguments(
            objective, dtype=dtype, lengths=SHORT, packed=packed, token_advantages=per_token,
            denominators=(3.5, 2.0) if given else (None, 2.0),
        )  # fmt: skip
        for advantages in (args[ADVANTAGES], None):
            args[ADVANTAGES] = advantages
            args[TOKEN_ADVANTAGES] = per_token and advantages is not None
            (kind, weight, adv), want = weights(emulated, args), weights(reference, args)
            assert kind.dtype == torch.uint8 and kind.equal(want[0])
            torch.testing.assert_close(weight, want[1], rtol=3e-7 if dtype == torch.float32 else 1e-14, atol=0)
            torch.testing.assert_close(adv, want[2], rtol=0, atol=0, equal_nan=True)
            assert advantages is not None or adv[kind == schemas.ROLLOUT].isnan().all()


def test_token_weights_are_those_of_the_loss():
    """A rollout's entropy slope is -entropy_coef times its weight; and the same bits again."""
    args = arguments(gk.HybridObjective(entropy_coef=0.5), lengths=SHORT, dtype=torch.float64)
    kind, weight, _ = weights(emulated, args)
    rollout = kind == schemas.ROLLOUT
    torch.testing.assert_close(emulated(*args)[5], torch.where(rollout, -0.5 * weight, 0.0), rtol=1e-15, atol=0)
    assert all(same_bits(weights(emulated, args), weights(emulated, args)) for _ in range(5))


def test_token_weights_of_empty_batches():
    for lengths in ((), (0, 0)):
        args = arguments(gk.HybridObjective(), lengths=lengths)
        assert all(out.shape == (0,) for out in weights(emulated, args))


def test_the_comparison_can_fail():
    """A slope off by 3e-6, or a nan too many, is seen."""
    args = arguments(gk.HybridObjective(), lengths=SHORT)

    def off(*given):
        *rest, slope, last = emulated(*given)
        return *rest, slope + 3e-6, last

    with pytest.raises(AssertionError, match="slope"):
        check(args, off)
    assert errors(args, off)["slope"] > 1e-6
