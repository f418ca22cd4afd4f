"""The CUDA C++ row kernels against the float64 oracle, on host threads (cuda_emulation.py): what they compute, what
they touch, and that a row's result depends on nothing but the row."""

from __future__ import annotations

import math

import cuda_emulation
import pytest
import torch
from logit_support import DTYPES, ROW_POLICIES, TRANSFORMS, LogitCase, check, check_gradient, check_rows, make, run
from rows_arguments import PLAIN, RowCase, bits, check_conversions, op

import gac_kernels as gk
from gac_kernels.objectives import AGGREGATIONS


@pytest.fixture(scope="module", autouse=True)
def emulated():
    cuda_emulation.load()
    with gk.use_backend("cuda"):
        yield


def small(**options):
    return make((2, 0, 1), (False, True, True), V=options.pop("V", 37), **options)


@pytest.mark.parametrize("policy", ROW_POLICIES, ids=lambda p: f"{type(p).__name__}-{getattr(p, 'gate', '')}")
def test_objectives(policy):
    objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.05, kl_ratio_weighted=True)
    check(small(dtype=torch.float64), objective)
    check(small(packed=True), objective, inplace=True)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradients(dtype, transform):
    RowCase(A=1, B=4, V=203, dtype=dtype, transform=TRANSFORMS[transform]).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", [1, 7, 33, 1024, 4101, 20_000])
def test_widths(V, dtype):
    """Around vectors and threads; rows off a 16-byte boundary; more than shared memory holds (12 KB a block here)."""
    RowCase(A=1, B=4, V=V, dtype=dtype, seed=V).check()


@pytest.mark.parametrize("gift", [gk.GIFT(), gk.GIFT(3.0, 0.1), gk.GIFT(1.0, 1.0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_gift(gift, dtype):
    RowCase(A=1, B=4, V=2100, dtype=dtype, gift=gift).check()
    case = small(dtype=dtype, base=True)
    check(case, gk.HybridObjective(supervised=gift), inplace=True)
    check(case, gk.HybridObjective(gk.GSPO(), gift, entropy_coef=0.1), transform=TRANSFORMS["all"])


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.float16], ids=str)
def test_base_logits_of_another_type(base_dtype):
    case = RowCase(A=1, B=4, V=70, dtype=torch.bfloat16, gift=gk.GIFT(4.0))
    case.base = case.base.to(base_dtype)
    case.check()


def test_temperature_per_sequence():
    check(small(), gk.HybridObjective(), transform=gk.LogitTransform(torch.tensor([0.5, 1.0, 2.0])))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(aggregation):
    check(small(), gk.HybridObjective(aggregation=aggregation, supervised_aggregation=aggregation, norm_length=5.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversions(dtype):
    check_conversions(dtype, sample=1001)


@pytest.mark.parametrize("layout", ["shifted", "gaps", "swapped", "expanded"])
def test_strides(layout):
    case = make((2, 2), (False, True), V=41, poison=False)
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
    _, gradient = run(gk.hybrid_loss_from_logits, LogitCase(view, case.batch), gk.HybridObjective(), 0.3)
    check_gradient(gradient, want)


def test_a_rows_bits_depend_on_the_row_alone():
    """Alone, beside others, in another order, off a 16-byte boundary, after a copy: the same bits."""
    case = RowCase(A=1, B=4, V=203, dtype=torch.bfloat16, dead=False)
    whole = case.statistics()
    gradient = case.gradient(whole)
    order = torch.tensor([2, 0, 3, 1])
    for n in range(4):
        shifted = torch.empty(1, 1, 204, dtype=torch.bfloat16)[..., 1:]
        shifted.copy_(case.logits[:, n : n + 1])
        rows = case.targets[n : n + 1], case.kind[n : n + 1], None, None
        for logits in (case.logits[:, n : n + 1], shifted):
            alone = op("row_statistics", logits, *rows, *PLAIN)
            assert bits(alone[:4]) == bits([value[n : n + 1] for value in whole[:4]])
            given = alone[3], alone[1], case.slope[n : n + 1], case.entropy_slope[n : n + 1]
            assert bits(op("row_gradient", logits, *rows, *given, *PLAIN)) == bits(gradient[:, n : n + 1])
    moved = op("row_statistics", case.logits[:, order], case.targets[order], case.kind[order], None, None, *PLAIN)
    assert bits(moved[:4]) == bits([value[order] for value in whole[:4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extremes(dtype):
    """All but one -inf, blocks of -inf first, a nan, an infinity, nothing finite, logits of 1e4."""
    V, low = 600, -math.inf
    rows = torch.full((1, 7, V), low, dtype=dtype)
    rows[0, 0, 599] = 3.0
    rows[0, 1, 500:] = torch.randn(100).to(dtype)
    rows[0, 2] = torch.randn(V).to(dtype)
    rows[0, 2, 17] = math.nan
    rows[0, 3] = torch.randn(V).to(dtype)
    rows[0, 3, 580] = math.inf
    rows[0, 5] = (1e4 + torch.arange(V) / 64).to(dtype)
    rows[0, 6] = torch.randn(V).to(dtype)
    rows[0, 6, 5] = low
    targets, kind = torch.tensor([599, 510, 3, 3, 3, 9, 5]), torch.ones(7, dtype=torch.uint8)
    logprobs, entropy, sum_sq, normalizer, _ = op("row_statistics", rows, targets, kind, None, None, *PLAIN)
    want = torch.log_softmax(rows.double(), dim=-1)[0]
    for n in (0, 1, 5):
        check_rows(logprobs[n], want[n, targets[n]], torch.float32)
        p = want[n].exp()
        check_rows(entropy[n], -torch.where(p > 0, p * want[n], 0.0).sum(), torch.float32)
        check_rows(sum_sq[n], p.square().sum(), torch.float32)
    assert logprobs[6] == low and entropy[6].isfinite()
    for n in (2, 3, 4):
        assert logprobs[n].isnan() and entropy[n].isnan() and sum_sq[n].isnan()
    slope = torch.ones(7)
    gradient = op("row_gradient", rows, targets, kind, None, None, normalizer, entropy, slope, None, *PLAIN)[0]
    for n in (0, 1, 5, 6):
        expected = -want[n].exp()
        expected[targets[n]] += 1
        assert float((gradient[n].double() - expected).abs().max()) < (1e-6 if dtype == torch.float32 else 8e-3)
    for n in (2, 3, 4):
        assert gradient[n].isnan().all()


def test_a_target_outside_makes_its_row_nan_and_touches_nothing_else():
    logits = torch.randn(1, 3, 50)
    kind = torch.ones(3, dtype=torch.uint8)
    for bad in (50, -1, 2**40, -(2**31) - 1):
        out = op("row_statistics", logits, torch.tensor([1, bad, 2]), kind, None, None, *PLAIN)
        assert out[0][1].isnan() and out[0][[0, 2]].isfinite().all()


def test_columns_of_another_shard():
    """ELSEWHERE: log-prob 0, and a gradient without a target."""
    logits, kind = torch.randn(1, 2, 60), torch.ones(2, dtype=torch.uint8)
    targets = torch.tensor([-(2**31), 3])
    out = op("row_statistics", logits, targets, kind, None, None, *PLAIN)
    assert out[0][0] == 0
    gradient = op("row_gradient", logits, targets, kind, None, None, out[3], out[1], torch.ones(2), None, *PLAIN)
    torch.testing.assert_close(gradient[0, 0], -logits[0, 0].softmax(-1), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaling(dtype):
    for shape in ((3,), (2, 3, 37), (70_000,)):
        value = torch.randn(shape).to(dtype)
        factor = torch.tensor(0.37, dtype=torch.promote_types(dtype, torch.float32))
        want = (value.double() * factor.double()).to(dtype)
        scaled, same = value.clone(), value.clone()
        op("scale_", scaled, factor)
        torch.testing.assert_close(scaled, want, rtol=torch.finfo(dtype).eps, atol=0)
        op("scale_", same, torch.tensor(1.0))
        assert bits(same) == bits(value)
    strided = torch.zeros(2, 3, 40, dtype=dtype)
    strided[..., :37] = 1
    op("scale_", strided[..., :37], torch.tensor(2.0))
    assert float(strided.double().sum()) == 2 * 3 * 37 * 2


def test_nothing_else_is_served():
    """Devices and dtypes that the operators do not take are refused by name."""
    case = RowCase(A=1, B=2, V=9, dead=False)
    with pytest.raises(RuntimeError, match="targets must have"):
        op("row_statistics", case.logits, case.targets[:1], case.kind, None, None, *PLAIN)
    with pytest.raises(RuntimeError, match="logits must have dtype"):
        op("row_statistics", case.logits.long(), case.targets, case.kind, None, None, *PLAIN)
