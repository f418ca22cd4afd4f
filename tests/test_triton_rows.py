"""The Triton row kernels against the float64 oracle, in the interpreter or on a GPU, and what they touch."""

from __future__ import annotations

import math

import pytest
import torch
import triton_watch
from logit_support import (
    DTYPES,
    ROW_POLICIES,
    TRANSFORMS,
    LogitCase,
    check,
    check_gradient,
    check_rows,
    computed,
    make,
    run,
    with_infinities,
)
from rows_arguments import RowCase, op
from triton_support import DEVICE, interpreted_only

import gac_kernels as gk
from gac_kernels import library, reference, schemas
from gac_kernels.objectives import AGGREGATIONS

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU tests/test_gpu.py runs these kernels")


@pytest.fixture(autouse=True)
def triton():
    with gk.use_backend("triton"):
        yield


def small(**options):
    return make((3, 0, 2), (False, True, True), V=options.pop("V", 37), **options)


@pytest.mark.parametrize("policy", ROW_POLICIES, ids=lambda p: f"{type(p).__name__}-{getattr(p, 'gate', '')}")
def test_objectives(policy):
    objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.05, kl_ratio_weighted=True)
    check(small(dtype=torch.float64), objective)
    check(small(packed=True), objective, inplace=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_transforms(dtype, transform):
    made = TRANSFORMS[transform]
    check(small(dtype=dtype, transform=made), gk.HybridObjective(), transform=made)
    check(small(dtype=dtype, transform=made, rollout=False), gk.HybridObjective(), transform=made, inplace=True)


def test_temperature_per_sequence():
    check(small(), gk.HybridObjective(), transform=gk.LogitTransform(torch.tensor([0.5, 1.0, 2.0])))


@pytest.mark.parametrize("gift", [gk.GIFT(), gk.GIFT(3.0, 0.1), gk.GIFT(1.0, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gift(gift, dtype):
    case = small(dtype=dtype, base=True)
    check(case, gk.HybridObjective(supervised=gift), inplace=True)
    check(case, gk.HybridObjective(gk.GSPO(), gift, entropy_coef=0.1), transform=TRANSFORMS["all"])


@pytest.mark.parametrize("V", [1, 7, 2047, 2049, 9001])
def test_vocabulary_sizes(V):
    """Around tiles and both numbers of warps; rows that begin off a 16-byte boundary."""
    for dtype in (torch.float32, torch.bfloat16):
        check(make((2, 1), (False, True), V=V, dtype=dtype, scale=8.0, holes=False), gk.HybridObjective())


@pytest.mark.parametrize("layout", ["shifted", "gaps", "swapped", "expanded"])
def test_strides(layout):
    case = make((3, 3), (False, True), V=41, poison=False)
    S, T, V = case.logits.shape
    if layout == "shifted":
        view = torch.full((S, T + 1, V), math.nan)[:, :-1]
    elif layout == "gaps":
        view = torch.full((S, T, V + 3), math.nan)[..., 1 : 1 + V]
    elif layout == "swapped":
        view = torch.full((T, S, V), math.nan).transpose(0, 1)
    else:
        view = case.logits[:, :1].expand(S, T, V)
    if layout != "expanded":
        view.copy_(case.logits)
    _, want = LogitCase(view.contiguous(), case.batch).oracle(gk.HybridObjective(), 0.3)
    for inplace in (False, True) if layout != "expanded" else (False,):
        leaf = computed(view.detach().requires_grad_())
        out = gk.hybrid_loss_from_logits(leaf, case.batch, gk.HybridObjective(), 0.3, inplace=inplace)
        (gradient,) = torch.autograd.grad(out.loss, leaf)
        check_gradient(gradient, want)


def test_infinities():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = with_infinities(5, dtype)
        want, _ = case.double().oracle(gk.HybridObjective(), 0.3)
        got, gradient = run(gk.hybrid_loss_from_logits, case, gk.HybridObjective(), 0.3)
        bound = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(got.logprobs.double(), want.logprobs, **bound)
        torch.testing.assert_close(got.token_entropy.double(), want.token_entropy, **bound)
        assert got.logprobs[0, 3] == -math.inf and torch.isfinite(gradient).all()


def test_a_target_outside_the_row():
    """nan where it belongs, nothing else touched; dead rows are not looked at."""
    logits = torch.randn(1, 4, 50)
    targets, kind = torch.tensor([3, 50, -7, 2**40]), torch.tensor([1, 1, 0, 2], dtype=torch.uint8)
    with triton_watch.bounds_checked():
        logprobs, entropy, sum_sq, normalizer, _ = library.call(
            "row_statistics", logits, targets, kind, None, None, 1.0, 0.0, 1.0, 0.0, 0.0
        )
        slope = torch.ones(4)
        gradient = library.call(
            "row_gradient", logits, targets, kind, None, None, normalizer, entropy, slope, None, 1.0, 0.0, 1.0, 0.0, 0.0
        )
    for value in (logprobs, entropy, sum_sq, gradient[0].sum(-1)):
        assert value.isnan().tolist() == [False, True, False, True] and value[2] == 0


@interpreted_only
def test_nothing_is_touched_out_of_bounds_and_no_program_waits_for_another():
    case = small(base=True, V=43)
    objective = gk.HybridObjective(supervised=gk.GIFT(2.0), kl_coef=0.1)
    want = run(gk.hybrid_loss_from_logits, case, objective, 0.3)
    for order in (
        lambda n: list(range(n))[::-1],
        lambda n: [(7 * i + 3) % n for i in range(n)] if n % 7 else list(range(n)),
    ):
        with triton_watch.bounds_checked() as lanes, triton_watch.program_order(order):
            out, gradient = run(gk.hybrid_loss_from_logits, case, objective, 0.3, inplace=True)
        assert lanes and out.loss.equal(want[0].loss) and gradient.equal(want[1])


@interpreted_only
def test_launches():
    case = small()
    with triton_watch.launches() as names:
        run(gk.hybrid_loss_from_logits, case, gk.HybridObjective(), 0.3, inplace=True)
    assert names == ["look", "spread", "row_kernel", "look", "token", "finish", "scale_kernel"]


def test_token_logprobs():
    case = small(dtype=torch.bfloat16)
    targets, mask, transform = case.batch.targets, case.batch.mask, TRANSFORMS["all"]
    leaf, wide = case.logits.clone().requires_grad_(), case.logits.double().requires_grad_()
    got = gk.token_logprobs(leaf, targets, mask=mask, transform=transform)
    want = reference.token_logprobs(wide, targets, mask, transform)
    for name in ("logprobs", "entropy", "sum_sq"):
        check_rows(getattr(got, name), getattr(want, name), torch.float32)
    (ours,) = torch.autograd.grad((got.logprobs * got.entropy).sum(), leaf)
    (theirs,) = torch.autograd.grad((want.logprobs * want.entropy).sum(), wide)
    check_gradient(ours, theirs)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_token_weights(aggregation, packed):
    case = make(packed=packed)
    batch = case.batch
    static = AGGREGATIONS.index(aggregation)
    given = (torch.tensor(9.0), None) if packed else (None, None)
    args = (
        batch.mask.reshape(-1), batch.cu_seqlens, batch.max_length or 0, batch.is_expert, batch.advantages, False,
        torch.tensor(0.3), *given, static, 0, 12.0,
    )  # fmt: skip
    got = library.call("token_weights", *args)
    with gk.use_backend("reference"):
        want = library.call("token_weights", *args)
    assert got[0].equal(want[0]) and got[2].equal(want[2])
    torch.testing.assert_close(got[1], want[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(dtype):
    for value in (torch.randn(7, 300).to(dtype), torch.randn(3, 6, 41).to(dtype)[:, :-1], torch.randn(0).to(dtype)):
        want = (value.to(torch.promote_types(dtype, torch.float32)) * 0.3).to(dtype)
        library.call("scale_", value, torch.tensor(0.3, dtype=torch.float64))
        torch.testing.assert_close(value, want, rtol=1e-7 if dtype == torch.float32 else 0, atol=0)
    poisoned = torch.tensor([math.nan, 1.0], dtype=dtype)
    library.call("scale_", poisoned, torch.ones(()))
    assert poisoned[0].isnan() and poisoned[1] == 1


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_target_in_another_shard(dtype, transform):
    """As the reference has it: no log-prob, no column with t = 1; the normaliser is that of z in both."""
    case = RowCase(1, 4, 70, dtype, transform=TRANSFORMS[transform], heat=True, dead=False)
    case.targets[:] = torch.tensor([3, schemas.ELSEWHERE, schemas.ELSEWHERE, 69])
    found = {}
    for form in ("reference", "triton"):
        statistics = op(f"row_statistics_{form}", case.logits, *case.rows, *case.static)
        given = statistics[3], statistics[1], case.slope, case.entropy_slope
        found[form] = *statistics[:4], op(f"row_gradient_{form}", case.logits, *case.rows, *given, *case.static)
    assert found["triton"][0][1:3].tolist() == [0.0, 0.0]
    for got, want in zip(found["triton"], found["reference"], strict=True):
        bound = 2.0**-7 if got.dtype == torch.bfloat16 else 4e-6
        torch.testing.assert_close(got, want, rtol=bound, atol=bound)
