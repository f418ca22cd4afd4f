"""The compiled row operators against float64: element types, transforms, widths, slopes and extremes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logit_support import DTYPES, TRANSFORMS, check_rows
from rows_arguments import DEAD, DEMONSTRATION, PLAIN, ROLLOUT, STATISTICS, RowCase, bits, fused_arguments, op
from support import POLICIES, policy_name

import gac_kernels as gk
from gac_kernels import reference, schemas

pytestmark = pytest.mark.skipif(
    not gk.backends()["cpu"].startswith("cpu:"), reason="this install has no compiled module"
)
SEPARABLE = [policy for policy in POLICIES if not isinstance(policy, (gk.GSPO, gk.DFPO))]
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


# Values ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_and_gradients(dtype, transform):
    """Widths around the vectors', then some blocks of columns and a bit."""
    for V in (1, 2, 15, 16, 17, 31, 33, 4095, 4096, 9001):
        RowCase(V=V, dtype=dtype, transform=TRANSFORMS[transform], seed=V).check()
    RowCase(V=130, dtype=dtype, transform=TRANSFORMS[transform], heat=True).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gift(dtype):
    for (beta, smooth), V in itertools.product(((20.0, 0.0), (0.0, 0.0), (3.0, 0.2), (5.0, 1.0)), (1, 33, 4200)):
        RowCase(V=V, dtype=dtype, gift=gk.GIFT(beta, smooth), seed=V).check()
        RowCase(V=V, dtype=dtype, gift=gk.GIFT(beta, smooth), transform=TRANSFORMS["all"], seed=V).check()


@QUICK
@given(
    A=st.integers(1, 3), B=st.integers(0, 3), V=st.integers(1, 300), dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_size(A, B, V, dtype, scale, seed):
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    RowCase(A, B, V, dtype, scale=scale, seed=seed).check()


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_base_logits_of_another_type(base_dtype):
    case = RowCase(dtype=torch.bfloat16, V=600, gift=gk.GIFT(4.0))
    case.base = case.base.to(base_dtype)
    case.check()
    strided = torch.full((3, 5, 640), math.nan, dtype=base_dtype)
    strided[:, 1:, 3:603] = case.base
    want = bits(case.statistics())
    case.base = strided[:, 1:, 3:603]
    assert bits(case.statistics()) == want


@pytest.mark.parametrize("policy", SEPARABLE, ids=policy_name)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_is_statistics_slope_and_gradient(dtype, policy):
    """In one pass as in three: the statistics to the bit, the gradient as the oracle has it for the token's slope."""
    for gift, bonus, phi in ((None, 0.0, "phi"), (None, 0.02, "none"), (gk.GIFT(3.0), 0.02, "phi")):
        supervised = gk.NLL(phi) if gift is None else gift
        objective = gk.HybridObjective(policy, supervised, kl_coef=0.1, entropy_coef=bonus)
        case = RowCase(V=1100, dtype=dtype, gift=gift, seed=7)
        statistics = case.statistics()
        args = fused_arguments(case, objective, statistics[0])
        *results, gradient = op("fused_rows", case.logits, *args)
        inplace = case.logits.clone()
        assert bits(op("fused_rows_", inplace, *args)) == bits(tuple(results))
        assert bits(inplace) == bits(gradient)
        assert bits(tuple(results)) == bits((*statistics[:3], statistics[4]))
        tokens = (value.double() for value in args[4:9])
        slope, bonuses = reference.token_slopes(statistics[0].double(), case.kind, *tokens, objective)
        case.slope, case.entropy_slope = slope, bonuses
        _, want = case.oracle(bonus=True)
        error = (gradient.double() - want).abs().max() / want.abs().max()
        assert error <= {torch.float64: 1e-11, torch.float32: 4e-6, torch.bfloat16: 2.0**-8}.get(dtype, 2.0**-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("policy", SEPARABLE, ids=policy_name)
def test_slopes_are_those_of_token_loss_to_the_bit(policy, dtype):
    """Where p of the target is below half an ulp of 1 its gradient is the slope itself, denormal numbers aside."""
    N = 500
    g = torch.Generator().manual_seed(0)
    logits = torch.zeros(1, N, 2, dtype=dtype)
    logits[0, :, 1] = 40 + 20 * torch.rand(N, generator=g)
    kind = torch.tensor([1, 1, 2], dtype=torch.uint8).repeat(N)[:N]
    old, ref, rollout = (torch.rand(N, generator=g, dtype=dtype) for _ in range(3))
    old, ref = -logits[0, :, 1] + 6 * (old - 0.5), -logits[0, :, 1] + 6 * (ref - 0.5)
    advantages = torch.randn(N, generator=g, dtype=dtype)
    objective = gk.HybridObjective(policy, gk.NLL("none"), kl_coef=0.05, aggregation="seq-mean-token-sum")
    mask, expert, mu = torch.ones(N, dtype=torch.bool), kind == DEMONSTRATION, torch.tensor(0.375, dtype=dtype)
    batch = mask, None, 1, expert, advantages, False
    kinds, weight, _ = op("token_weights", *batch, mu, None, None, *schemas.encode_weights(objective, None))
    assert torch.equal(kinds, kind)
    for tokens in ((old, ref, rollout), (old, None, None), (None, None, None)):
        # fused_rows finds what weighs a demonstration in its weight
        own = weight if tokens[2] is None else torch.where(expert, weight * tokens[2], weight)
        rows = torch.zeros(N, dtype=torch.long), kind, None, None, own, advantages, *tokens
        *results, gradient = op("fused_rows", logits, *rows, *PLAIN, *schemas.encode_term(objective))
        out = op(
            "token_loss", results[0], *batch, *tokens, None, None, None, None, mu, None, None,
            *schemas.encode(objective, None),
        )  # fmt: skip
        tiny = torch.finfo(dtype).tiny
        assert torch.equal(*(torch.where(value.abs() < tiny, 0.0, value) for value in (gradient[0, :, 0], out[4])))


# Extremes -------------------------------------------------------------------------------------------------------
INF, NAN = math.inf, math.nan


def extreme_rows(V: int) -> dict[str, list[float]]:
    """Rows whose target is column 1, described by a few values and what fills the rest."""
    rest = V - 3
    return {
        "one infinite": [0.5, 1.0, -INF] + [0.25] * rest,
        "target infinite": [0.5, -INF, 1.0] + [0.25] * rest,
        "all but the target": [-INF, 2.0, -INF] + [-INF] * rest,
        "all but another": [-INF, -INF, 2.0] + [-INF] * rest,
        "beginning infinite": [-INF] * (V - 1) + [3.0],
        "target far below": [0.0, -300.0, 5.0] + [0.0] * rest,
        "huge": [1e4, 9999.0, -1e4] + [0.0] * rest,
        "tiny probabilities": [0.0, 0.0, 0.0] + [-87.2 - 0.01 * (k % 50) for k in range(rest)],
        "flat": [3.0] * V,
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_extreme_rows(dtype):
    """Finite gradients and the reference's values, also where whole blocks hold nothing but -infinity."""
    for V in (3, 40, 9000):
        case = RowCase(1, len(extreme_rows(V)), V, dtype, dead=False)
        case.logits = torch.tensor(list(extreme_rows(V).values()), dtype=torch.float64).to(dtype)[None]
        case.targets[:] = 1
        case.kind[:] = ROLLOUT
        case.check()
        *_, gradient = op("fused_rows", case.logits, *fused_arguments(case, gk.HybridObjective(), torch.zeros(case.N)))
        assert gradient.isfinite().all()
        masked = case.logits == -INF
        masked[..., 1] = False
        assert float(gradient[masked].abs().sum()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_undefined_rows_are_nan_and_alone(dtype):
    """A nan or +infinity among the logits, or no finite logit at all: that row is nan everywhere, its neighbours are
    as they were."""
    for V, bad in itertools.product((5, 70, 9000), ("nan", "infinity", "nothing")):
        case = RowCase(1, 8, V, dtype, dead=False)
        before = case.statistics()
        args = fused_arguments(case, gk.HybridObjective(), before[0])
        gradient_before = op("fused_rows", case.logits, *args)[4]
        if bad == "nothing":
            case.logits[0, 2] = -INF
        else:
            case.logits[0, 2, V // 2] = NAN if bad == "nan" else INF
        after, out = case.statistics(), op("fused_rows", case.logits, *args)
        rest = torch.arange(8) != 2
        for name, a, b in zip(STATISTICS, before, after, strict=False):
            assert b[2].isnan() and torch.equal(a[rest], b[rest]), name
        assert out[4][0, 2].isnan().all() and torch.equal(out[4][0, rest], gradient_before[0, rest])


@pytest.mark.parametrize("wide", [True, False], ids=["int64", "int32"])
def test_targets_outside_the_vocabulary(wide):
    """Their rows are nan, and memory beside the row is neither read nor written."""
    for dtype, wrong in itertools.product(DTYPES, (-1, 50, 2**31 - 1, 1 - 2**31, *((2**40,) if wide else ()))):
        case = RowCase(1, 4, 50, dtype, dead=False)
        right = case.statistics()
        case.targets[2] = wrong
        case.targets = case.targets if wide else case.targets.int()
        got = case.statistics()
        rest = torch.tensor([0, 1, 3])
        for name, a, b in zip(STATISTICS, got, right, strict=False):
            assert a[2].isnan() and torch.equal(a[rest], b[rest]), name
        gradient = case.gradient(got)
        assert gradient[0, 2].isnan().all() and not gradient[0, rest].isnan().any()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_target_in_another_shard(transform):
    """Everything but the target's own log-prob and column is as in a row whose target is one of these columns."""
    for dtype, heat in itertools.product(DTYPES, (False, True)):
        case = RowCase(2, 4, 70, dtype, transform=TRANSFORMS[transform], heat=heat, dead=False)
        right = case.statistics()
        gradient = case.gradient(right)
        targets, case.targets = case.targets, torch.full_like(case.targets, schemas.ELSEWHERE)
        got = case.statistics()
        assert not got[0].any()
        assert all(torch.equal(a, b) for a, b in zip(got[1:4], right[1:4], strict=True))
        other = case.gradient(right)
        column = torch.zeros_like(gradient, dtype=torch.bool).view(case.N, -1).scatter_(1, targets[:, None], True)
        column = column.view(gradient.shape)
        assert torch.equal(gradient[~column], other[~column])
        # With t = 1 in the target's column the two differ by the slope there, through the transform.
        twin = RowCase(2, 4, 70, dtype, transform=TRANSFORMS[transform], heat=heat, dead=False)
        rows = reference.Rows.of(twin.logits.double(), twin.targets, twin.kind, None if not heat else
                                 twin.temperature.double(), None, *twin.static)  # fmt: skip
        dz_NV = rows.transform.derivative(rows.raw_NV)
        factor = dz_NV.expand(case.N, 70).gather(1, targets[:, None])[:, 0]
        want = gradient[column].double() - case.slope.double() * factor
        bound = {torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9, torch.float64: 1e-13}.get(dtype, 4e-6)
        assert float((other[column].double() - want).abs().max()) <= bound * float(case.slope.abs().max()) * 3


def test_dead_rows():
    """Whatever they hold, their results and gradients are zeros and the live rows do not notice."""
    for dtype, poison in itertools.product(DTYPES, (NAN, INF, -INF, 1.0)):
        case = RowCase(2, 6, 300, dtype, gift=gk.GIFT(2.0))
        case.logits.view(case.N, -1)[~case.live] = poison
        case.base.view(case.N, -1)[~case.live] = poison
        out = case.statistics()
        assert all(float(value[~case.live].abs().sum()) == 0 for value in out)
        case.check()
        case.kind[:] = DEAD
        assert all(float(value.abs().sum()) == 0 for value in (*case.statistics(), case.gradient(out)))


def test_statistics_keep_their_precision():
    """4 ulp + 1e-6 of float64, and well below on long rows."""
    for V, scale in ((32000, 0.01), (32000, 2.0), (151936, 3.0), (32000, 10.0), (1000, 30.0)):
        case = RowCase(1, 8, V, scale=scale, dead=False)
        want, _ = case.oracle()
        for name, value in zip(STATISTICS, case.statistics(), strict=False):
            check_rows(value, want[name], torch.float32)
            error = (value.double() - want[name]).abs() / (4 * 2.0**-23 * want[name].abs() + 1e-6)
            assert float(error.max()) < 0.5, (name, V, scale)
