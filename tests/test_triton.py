"""The Triton backend against the float64 reference: in the interpreter, or compiled where there is a GPU."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from support import POLICIES, Case, policy_name
from triton_support import DEVICE, check, interpreted_only, operator
from triton_watch import bounds_checked, launches, program_order

import gac_kernels as gk
from gac_kernels import schemas, types

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
# An empty sequence, one token, lengths on and off a group of four.
LENGTHS, EXPERT = (5, 0, 16, 1, 33, 8), (False, True, True, False, False, False)
SHORT, SHORT_EXPERT = (6, 3, 7), (False, True, False)
ONE_OF_EACH = (gk.SAPO(), gk.GRPO(), gk.CISPO(), gk.GSPO(0.05, 0.05), gk.DFPO())


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_every_policy(policy, layout):
    """float64, to 1e-11; advantages by token in the packed layout, by sequence in the padded one."""
    case = Case(LENGTHS, EXPERT, seed=1, token_advantages=layout == "packed", spread=0.4)
    check(case, gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), layout=layout)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_float32(policy):
    case = Case(LENGTHS, EXPERT, seed=2, dtype=torch.float32)
    check(case, gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01))


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_float32_slopes_over_the_whole_range_of_ratios(policy):
    """Log-ratios from beyond -20 to beyond 20, not scaled down by an aggregation: 4 ulp of slopes up to 1e9."""
    case = Case((255,), (False,), seed=3, dtype=torch.float32, rollout=False, poison=False, holes=False, ref=False)
    case.logp = -25.0 * torch.rand(1, 255, generator=torch.Generator().manual_seed(0))
    reach = 2.0 if isinstance(policy, gk.DFPO) else 21.0  # its weights are differences: of large ones little remains
    case.old = case.logp - torch.linspace(-reach, reach, 255)
    for advantage in (1.7, -1.7):
        case.adv = torch.tensor([advantage])
        objective = gk.HybridObjective(policy, aggregation="seq-mean-token-sum")
        check(case, objective, mu=0.0, denominators=(1.0, 1.0))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(estimator, weighted):
    for policy, dtype in ((gk.SAPO(), torch.float64), (gk.GSPO(0.01, 0.01), torch.float32)):
        case = Case(SHORT, SHORT_EXPERT, seed=4, dtype=dtype, spread=2.0)
        check(case, gk.HybridObjective(policy, kl_coef=0.3, kl_estimator=estimator, kl_ratio_weighted=weighted), 0.4)


@pytest.mark.parametrize("denominators", [None, (1000.0, 300.0), (None, 300.0)], ids=["own", "global", "one"])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation, denominators):
    """Each on both branches; the supervised one takes its neighbour in the list."""
    supervised = AGGREGATIONS[(AGGREGATIONS.index(aggregation) + 1) % 4]
    objective = gk.HybridObjective(
        gk.GRPO(), gk.NLL("none"), aggregation=aggregation, supervised_aggregation=supervised, norm_length=50.0
    )
    check(Case((5, 0, 4, 3), (False, True, True, False), seed=5), objective, 0.6, denominators=denominators)


@pytest.mark.parametrize("absent", ["old", "ref", "rollout", "entropy", "sum_sq", "all"])
def test_optional_inputs(absent):
    names = ("old", "ref", "rollout", "entropy", "sum_sq") if absent == "all" else (absent,)
    for policy in (gk.SAPO(), gk.GSPO(), gk.DFPO("adv_orthogonal")):
        check(
            Case(SHORT, SHORT_EXPERT, seed=6, **dict.fromkeys(names, False)), gk.HybridObjective(policy), 0.5, "packed"
        )


@pytest.mark.parametrize("policy", ONE_OF_EACH, ids=policy_name)
def test_more_tokens_than_a_block(policy):
    case = Case((1500, 1027), (False, True), seed=7, token_advantages=True)
    check(case, gk.HybridObjective(policy), layout="packed")


def test_a_sequence_longer_than_65535():
    """Liger's kernels put the length on a grid axis that ends there."""
    case = Case((66_000,), (False,), seed=8, dtype=torch.float32, ref=False, entropy=False, sum_sq=False)
    check(case, gk.HybridObjective(gk.GRPO(), aggregation="token-mean"))


@hypothesis.given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=4),
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(POLICIES),
    spread=st.sampled_from([0.0, 0.01, 1.0, 30.0]),
    mu=st.floats(0, 1),
    layout=st.sampled_from(["padded", "packed"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
@hypothesis.settings(max_examples=25, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_random_batches(lengths, seed, policy, spread, mu, layout, dtype):
    if policy == gk.DFPO("adv_orthogonal", "product"):
        spread = min(spread, 1.0)  # e^20 - (e^20 - e^-20) leaves nothing but rounding
    case = Case(lengths, [(seed >> i) & 1 == 1 for i in range(len(lengths))], seed=seed, spread=spread, dtype=dtype)
    check(case, gk.HybridObjective(policy, kl_coef=0.1), mu, layout)


# Edges -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_branches_without_tokens(policy, layout):
    for lengths, expert in (((4, 3), (True, True)), ((4, 3), (False, False)), ((0, 0), (False, True)), ((), ())):
        out = check(Case(lengths, expert, seed=9, holes=False), gk.HybridObjective(policy), layout=layout)
        assert torch.isfinite(out.loss) and all(torch.isfinite(v) for v in out.metrics.values())


def test_no_place_at_all():
    case = Case((0, 0), (False, True))
    case.T, empty = 0, torch.zeros(2, 0, dtype=torch.float64)
    case.logp = case.old = case.ref = case.rollout = case.entropy = case.sum_sq = empty
    case.mask, case.targets = empty.bool(), empty.long()
    assert check(case, gk.HybridObjective()).loss == 0


@pytest.mark.parametrize("policy", [gk.SAPO("erf"), gk.GRPO(delta=2.0), gk.GSPO()], ids=policy_name)
@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, at a rounding error that is not taken
def test_infinite_logprob_on_a_live_token(policy, old):
    case = Case((3, 3, 3), (False, False, True), seed=10, holes=False, poison=False, old=old)
    case.logp[:, 0] = float("-inf")
    check(case, gk.HybridObjective(policy, kl_coef=0.1))


@pytest.mark.parametrize("where", ["logp", "adv", "entropy", "sum_sq"])
def test_live_nan_is_loud(where):
    """nan travels as in the reference: into the loss, its own sums and slopes, and nowhere else. What engines return is
    another matter: ``tests/test_weights.py`` has it."""
    for policy in (gk.SAPO("arctan"), gk.GRPO(delta=2.0), gk.GSPO(), gk.DFPO(), gk.DFPO("adv_orthogonal", "product")):
        case = Case((4, 4), (False, False), seed=11, holes=False, groups=(0, 0))
        odd = getattr(case, where).clone()
        odd.view(-1)[1] = float("nan")
        if where == "adv":
            case.unchecked = {"advantages": odd}
        else:
            setattr(case, where, odd)
        out = check(case, gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.1))
        assert out.loss.isnan() == (where != "sum_sq")


def test_a_penalty_that_is_off_reaches_no_slope():
    case = Case((4, 4), (False, True), seed=19, holes=False)
    case.unchecked = {"ref_logprobs": case.ref.index_fill(1, torch.tensor(1), float("nan"))}
    assert check(case, gk.HybridObjective(kl_coef=0.0)).signals.rows.isfinite().all()


def test_rollouts_without_advantages_are_not_zero():
    loss, *_ = operator("token_loss_triton", Case((4,), (False,), seed=12), gk.HybridObjective(), advantages=None)
    assert loss.isnan()


@pytest.mark.parametrize("offsets", [(0, 4, 9), (-5, 4, 99), (7, 2, 9), (3, 5, 6), (9, 9, 9), (0, 0, 0), (99, -1, 50)])
def test_offsets_from_anywhere(offsets):
    """Offsets that only an accelerator holds are not checked: they are clamped and never fall, and what no sequence
    covers is 0."""
    case = Case((4, 5), (False, True), seed=13, holes=False)
    cu = torch.tensor(offsets)
    with bounds_checked() as lanes:
        out = operator("token_loss_triton", case, gk.HybridObjective(), "packed", cu_seqlens=cu)
    assert sum(lanes) > 0
    rising = list(itertools.accumulate(cu.clamp(0, 9).tolist(), max))
    assert out[2][:, 1].tolist() == [last - first for first, last in itertools.pairwise(rising)]
    covered = torch.zeros(9, dtype=torch.bool)
    covered[rising[0] : rising[-1]] = True
    for value in out[3:]:
        assert not value[~covered].any() and value.isfinite().all()
    assert out[3].ne(0).equal(covered)


def test_unaligned_inputs():
    """Memory is taken wherever it begins. The operator wants it contiguous; public functions take any strides."""
    case = Case((6, 3, 7), (False, True, False), seed=14)
    batch, extra = case.padded()

    def strided(value):
        return torch.stack([value, value], dim=-1)[..., 1]

    want = operator("token_loss_triton", case, gk.HybridObjective(gk.GSPO()))
    names = ("old_logprobs", "ref_logprobs", "rollout_weights", "is_expert", "advantages", "groups")
    changed = {n: strided(getattr(batch, n).reshape(-1)) for n in names} | {"mask": strided(batch.mask.reshape(-1))}
    changed |= {n: strided(extra[n].reshape(-1)) for n in ("logprobs", "entropy", "sum_sq")}
    with pytest.raises(ValueError, match="logprobs must be contiguous"):
        operator("token_loss_triton", case, gk.HybridObjective(gk.GSPO()), **changed)
    off = {n: torch.cat([v.new_zeros(1), v.contiguous()])[1:] for n, v in changed.items()}
    got = operator("token_loss_triton", case, gk.HybridObjective(gk.GSPO()), **off)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# Reproducible ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_a_sequence_is_the_same_wherever_it_lies(policy, dtype):
    """Alone, among others, packed at an odd offset, padded further: the same bits of slopes and signals."""
    objective = gk.HybridObjective(policy, kl_coef=0.1)
    case = Case((6, 5, 11, 13), (True, False, True, False), seed=15, dtype=dtype, groups=(0, 1, 2, 3), holes=False)
    wide = Case((6, 5, 11, 13), (True, False, True, False), seed=15, dtype=dtype, groups=(0, 1, 2, 3), holes=False)
    for name in ("logp", "old", "ref", "rollout", "entropy", "sum_sq"):
        setattr(wide, name, torch.nn.functional.pad(getattr(case, name), (0, 6), value=7.0))
    wide.mask, wide.targets = (torch.nn.functional.pad(v, (0, 6)) for v in (case.mask, case.targets))
    wide.T = case.T + 6
    given = {f"{b}_denominator": torch.ones((), dtype=dtype) for b in ("policy", "supervised")}
    results = []
    for each, layout in ((case, "padded"), (case, "packed"), (wide, "padded")):
        _, _, rows, _, slope, _ = operator("token_loss_triton", each, objective, layout, **given)
        ends = (
            list(itertools.accumulate(case.lengths))
            if layout == "packed"
            else [i * each.T + n for i, n in enumerate(case.lengths)]
        )
        results.append((rows, [slope[end - n : end] for end, n in zip(ends, case.lengths, strict=True)]))
    for rows, slopes in results[1:]:
        assert rows.equal(results[0][0])
        assert all(a.equal(b) for a, b in zip(slopes, results[0][1], strict=True))


def test_the_same_call_gives_the_same_bits():
    case = Case(LENGTHS, EXPERT, seed=16, dtype=torch.float32)
    first = operator("token_loss_triton", case, gk.HybridObjective(gk.DFPO()))
    for _ in range(2 if DEVICE == "cpu" else 250):
        again = operator("token_loss_triton", case, gk.HybridObjective(gk.DFPO()))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@interpreted_only
@pytest.mark.parametrize("policy", [gk.GRPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_programs_do_not_race(policy):
    """Backwards or shuffled, the programs of every grid give the same bits."""
    case = Case(LENGTHS, EXPERT, seed=17)
    want = operator("token_loss_triton", case, gk.HybridObjective(policy), "packed")
    for order in (lambda n: list(range(n))[::-1], lambda n: torch.randperm(n).tolist()):
        with program_order(order):
            got = operator("token_loss_triton", case, gk.HybridObjective(policy), "packed")
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("policy", ONE_OF_EACH, ids=policy_name)
def test_no_lane_out_of_bounds(policy, dtype):
    for layout in ("padded", "packed"):
        case = Case(LENGTHS, EXPERT, seed=18, dtype=dtype, token_advantages=True)
        with bounds_checked() as lanes:
            check(case, gk.HybridObjective(policy), layout=layout)
        assert sum(lanes) > 100


@interpreted_only
@pytest.mark.parametrize(
    ("policy", "count"), [(gk.SAPO(), 3), (gk.GSPO(), 3), (gk.DFPO(), 4)], ids=["sapo", "gspo", "dfpo"]
)
def test_launches(policy, count):
    with launches() as names:
        operator("token_loss_triton", Case(SHORT, SHORT_EXPERT), gk.HybridObjective(policy))
    assert len(names) == count, names


# The operator ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_opcheck(layout):
    """Schema, fake and aliasing of the operator's Triton form."""
    seen = []
    form = torch.ops.gac_kernels.token_loss_triton.default

    class Catch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is form:
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Catch():
        operator(
            "token_loss_triton", Case((3, 2), (False, True), dtype=torch.float32), gk.HybridObjective(gk.GSPO()), layout
        )
    torch.library.opcheck(form, seen[0], test_utils=("test_schema", "test_faketensor"))


def test_half_precision_dtype_is_refused():
    case = Case((3,), (False,), dtype=torch.float32)
    with pytest.raises(TypeError, match="logprobs must have dtype float32 or float64, got bfloat16"):
        operator("token_loss_triton", case, gk.HybridObjective(), logprobs=torch.zeros(3, dtype=torch.bfloat16))


def test_cpu_tensors_need_the_interpreter():
    code = """
import torch, gac_kernels as gk
ones = torch.ones(1, 2)
batch = gk.TokenBatch.from_padded(ones.long(), ones, advantages=torch.ones(1))
with gk.use_backend("triton"):
    gk.hybrid_loss(ones, batch, gk.HybridObjective(), 0.5)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, env=environment)
    assert run.returncode != 0 and "RuntimeError" in run.stderr and "TRITON_INTERPRET=1" in run.stderr


def test_codes_are_those_of_the_schema():
    from gac_kernels._triton import codes, terms
    from gac_kernels.objectives import GATES, KL_ESTIMATORS
    from gac_kernels.reference.terms import LOG_RATIO_BOUND

    assert {name: getattr(codes, name.upper()).value for name in schemas.POLICY_CODES} == schemas.POLICY_CODES
    assert [getattr(codes, gate.upper()).value for gate in GATES] == [0, 1, 2, 3]
    assert [getattr(codes, name.upper()).value for name in KL_ESTIMATORS] == [1, 2, 3]
    assert [getattr(codes, name.replace("-", "_").upper()).value for name in AGGREGATIONS] == [0, 1, 2, 3]
    for names in (schemas.DFPO_TRANSFORMS, schemas.DFPO_RATIOS):
        assert [getattr(codes, name.upper()).value for name in names] == [0, 1]
    assert terms.BOUND.value == LOG_RATIO_BOUND
    assert types.SCALARS == (
        "policy_loss", "supervised_loss", "kl", "entropy", "ratio_mean", "ratio_max", "approx_kl",
        "effective_update_ratio", "clip_fraction", "cancellation_residual",
    )  # fmt: skip
