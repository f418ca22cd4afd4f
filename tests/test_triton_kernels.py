"""Parts of the Triton backend on their own: elementary functions, offsets, loops over sequences; and the watchers."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
import triton
import triton.language as tl
from triton_support import DEVICE, interpreted_only
from triton_watch import bounds_checked, program_order

from gac_kernels._triton.first_look import LOOKERS, look, transform
from gac_kernels._triton.math import arctan, exp_expm1, gate_term
from gac_kernels._triton.memory import read, span, write
from gac_kernels._triton.token_loss import Batch, Looked
from gac_kernels._triton.token_pass import finish
from gac_kernels.objectives import GATES
from gac_kernels.reference.terms import gate

SIZE = 4096


@triton.jit
def evaluate(x, low, out, tau: tl.float64, FUNCTION: tl.constexpr, GATE: tl.constexpr, SIZE: tl.constexpr):
    lanes = tl.arange(0, SIZE)
    value = tl.load(x + lanes)
    if FUNCTION == 0:
        first, second = exp_expm1(value, tl.load(low + lanes))
    elif FUNCTION == 1:
        first, second = arctan(value), value
    else:
        first, second = gate_term(value, tl.full([SIZE], tau, value.dtype), GATE)
    tl.store(out + lanes, first)
    tl.store(out + SIZE + lanes, second)


def on_lanes(function: int, x: torch.Tensor, low: torch.Tensor | None = None, tau: float = 1.0, gate: int = 0):
    """First and second result of a function of math.py, elementwise, float64 on the CPU."""
    padded = torch.nn.functional.pad(x, (0, SIZE - x.numel())).to(DEVICE)
    low = torch.zeros_like(padded) if low is None else torch.nn.functional.pad(low, (0, SIZE - x.numel())).to(DEVICE)
    out = torch.empty(2, SIZE, dtype=x.dtype, device=DEVICE)
    evaluate[(1,)](padded, low, out, tau, FUNCTION=function, GATE=gate, SIZE=SIZE, enable_fp_fusion=False)
    return out[:, : x.numel()].double().cpu()


def ulps(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error in units in the last place of ``want``."""
    near = want.to(dtype).abs()
    unit = (torch.nextafter(near, torch.tensor(math.inf, dtype=dtype)) - near).double()
    return float(((got - want).abs() / unit).max())


# Elementary functions --------------------------------------------------------------------------------------------
def test_exp_and_expm1():
    """Below 1.5 ulp everywhere, expm1 near 0 included, and the error of the argument is taken in."""
    x = torch.cat([torch.linspace(-86, 88, 2000), torch.linspace(-0.5, 0.5, 1999), torch.tensor([0.0, 1e-30, -1e-8])])
    value, less_one = on_lanes(0, x)
    assert ulps(value, x.double().exp(), torch.float32) < 1.5
    assert ulps(less_one, torch.expm1(x.double()), torch.float32) < 1.5
    low = 0.4 * (torch.nextafter(x, torch.tensor(math.inf)) - x)
    exact = (x.double() + low.double()).exp()
    assert ulps(on_lanes(0, x, low)[0], exact, torch.float32) < 1.5
    assert ulps(value, exact, torch.float32) > 5, "without it exp is off by many ulp: the test can tell"


def test_exp_at_its_ends():
    inf, nan = math.inf, math.nan
    x = torch.tensor([inf, -inf, nan, 100.0, -100.0, -103.0, 89.0])
    value, less_one = on_lanes(0, x)
    assert torch.equal(value.nan_to_num(nan=7.0, posinf=inf), torch.tensor([inf, 0, 7, inf, 0, 0, inf]).double())
    assert torch.equal(less_one.nan_to_num(nan=7.0, posinf=inf), torch.tensor([inf, -1, 7, inf, -1, -1, inf]).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arctan(dtype):
    size = torch.cat(
        [torch.logspace(-12, 12, 1500, dtype=torch.float64), torch.linspace(0.3, 3, 500, dtype=torch.float64)]
    )
    edges = torch.tensor([0.0, 0.41421356237309503, 1.0, 2.414213562373095, math.inf], dtype=torch.float64)
    x = torch.cat([size, -size, edges]).to(dtype)
    got = on_lanes(1, x)[0]
    assert ulps(got, x.double().atan(), dtype) < 2.5
    assert on_lanes(1, torch.tensor([math.nan], dtype=dtype))[0].isnan().all()


@pytest.mark.parametrize("tau", [1.0, 1.05, 12.0])
@pytest.mark.parametrize("name", GATES)
def test_gates(name, tau):
    """Values and slopes to 4 ulp + 1e-6 in float32, to 1e-14 in float64, from u = -1 to ratios of e^20."""
    u = torch.cat([torch.linspace(-1, 2, 1500), torch.expm1(torch.linspace(-20, 20, 1500))])
    for dtype, bound in ((torch.float32, None), (torch.float64, 1e-14)):
        got = on_lanes(2, u.to(dtype), tau=tau, gate=GATES.index(name))
        for result, want in zip(got, gate(name, u.to(dtype).double(), tau), strict=True):
            near = want.float().abs()
            unit = (torch.nextafter(near, torch.tensor(math.inf)) - near).double()
            limit = 4 * unit + 1e-6 if bound is None else bound * (1 + want.abs())
            assert ((result - want).abs() <= limit).all()


# Offsets and loops -----------------------------------------------------------------------------------------------
@triton.jit
def copy_sequence(source, target, s, T: tl.int64, N: tl.int64, BLOCK: tl.constexpr):
    start, length = span(None, s, T, N)
    write(target, 0, 0, length, read(source, start, 0, length, BLOCK), BLOCK)


def test_offsets_past_32_bits(tmp_path):
    """Sequence 300 of 10,000,001 tokens begins past 2^31, in a file that is one hole."""
    T, s = 10_000_001, 300
    source = torch.from_file(str(tmp_path / "hole"), shared=True, size=(s + 1) * T, dtype=torch.uint8)
    source[s * T : s * T + 8] = torch.arange(1, 9, dtype=torch.uint8)
    target = torch.zeros(16, dtype=torch.uint8, device=DEVICE)
    with bounds_checked() if DEVICE == "cpu" else nullcontext():  # a wrong address is a failure here, not a crash
        copy_sequence[(1,)](source.to(DEVICE), target, s, T, (s + 1) * T, BLOCK=16)
    assert target[:8].tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_more_sequences_than_lookers():
    """Few programs, many sequences: each takes every so many."""
    S, T, programs = 23, 5, 4
    mask = torch.rand(S, T, generator=torch.Generator().manual_seed(0)) < 0.7
    mask[7] = False
    expert = torch.arange(S) % 3 == 0
    looked = Looked(*(torch.empty(n, dtype=torch.int64, device=DEVICE) for n in (S, 2 * LOOKERS.value)))
    batch = Batch(mask.to(DEVICE), None, expert.to(DEVICE))
    for tokens in (True, False):
        look[(programs,)](
            batch, looked, S, T, S * T, 0.0, 0.0, POLICY=0, PRODUCT=False, AGGREGATION=0 if tokens else 1,
            SUPERVISED_AGGREGATION=1 if tokens else 0, PER_TOKEN=False, BLOCK=16,
        )  # fmt: skip
        count = mask.sum(-1)
        assert looked.count.cpu().equal(count)
        policy, supervised = looked.total[: 2 * programs].view(-1, 2).sum(0).tolist()
        unit = lambda rows, tokens: int(rows.sum() if tokens else (rows > 0).sum())  # noqa: E731
        assert policy == unit(count[~expert], tokens) and supervised == unit(count[expert], not tokens)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_groups_larger_than_a_block(orthogonal):
    S, block = 40, 16
    g = torch.Generator().manual_seed(1)
    ratio, adv = torch.rand(S, generator=g, dtype=torch.float64) + 0.5, torch.randn(S, generator=g, dtype=torch.float64)
    groups, expert = torch.randint(-1, 2, (S,), generator=g), torch.arange(S) % 7 == 0
    count = torch.full((S,), 3)
    count[5] = 0
    weight, residual = (torch.empty(n, dtype=torch.float64, device=DEVICE) for n in (S, 2 * S))
    looked = Looked(*(v.to(DEVICE) for v in (count, torch.empty(0), ratio, adv)))
    transform[(S,)](
        groups.to(DEVICE), expert.to(DEVICE), looked, weight, residual, S, ORTHOGONAL=orthogonal, BLOCK=block
    )
    member = (count > 0) & ~expert
    residuals = []
    for group in groups[member].unique():
        own = member & (groups == group)
        A, w = adv[own], ratio[own]
        new = w - (A @ w) / (A @ A) * A if orthogonal else w.min().expand_as(w)
        torch.testing.assert_close(weight.cpu()[own], new, rtol=1e-12, atol=1e-13)
        residuals.append(float((A @ new).abs() / (A * new).abs().sum()))
    assert not weight.cpu()[~member].any()
    share, of = residual.cpu().view(S, 2).sum(0).tolist()
    assert of == pytest.approx(len(residuals)) and share == pytest.approx(sum(residuals), abs=1e-12)


def test_scalars_of_more_sequences_than_a_block():
    S, block = 50, 16
    g = torch.Generator().manual_seed(2)
    part = torch.rand(S, 8, generator=g, dtype=torch.float64)
    expert, count = torch.arange(S) % 4 == 0, torch.randint(1, 9, (S,), generator=g)
    part[expert, 1:] = 0
    loss, scalars = (torch.empty(n, dtype=torch.float64, device=DEVICE) for n in ((), 10))
    mu = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    finish[(1,)](
        expert.to(DEVICE),
        count.to(DEVICE),
        None,
        part.to(DEVICE),
        mu,
        loss,
        scalars,
        S,
        0.5,
        0.25,
        CLIPS=True,
        BOTH=False,
        BLOCK=block,
    )
    policy, supervised = part[~expert, 0].sum(), part[expert, 0].sum()
    kl, entropy, ratio, divergence, update = part[:, 1:6].sum(0)
    tokens = count[~expert].sum()
    want = [
        policy,
        supervised,
        kl,
        entropy,
        ratio / tokens,
        part[~expert, 6].max(),
        divergence / tokens,
        update / tokens,
    ]
    want = torch.stack([*want, 1 - update / tokens, torch.zeros(())])
    torch.testing.assert_close(scalars.cpu(), want, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(loss.cpu(), 0.7 * (policy + 0.5 * kl - 0.25 * entropy) + 0.3 * supervised)


# The watchers can fail -------------------------------------------------------------------------------------------
@triton.jit
def off_by_one(x, y, N, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    tl.store(y + lanes, tl.load(x + lanes, mask=lanes <= N, other=0), mask=lanes < N)


@triton.jit
def running_sum(x, y):
    s = tl.program_id(0)
    tl.store(y, tl.load(y) * 2 + tl.load(x + s))


@interpreted_only
def test_bounds_are_watched():
    x, y = torch.zeros(5), torch.zeros(5)
    with bounds_checked(), pytest.raises(Exception, match="a lane reads out of bounds"):
        off_by_one[(1,)](x, y, 5, BLOCK=8)
    with bounds_checked() as lanes:
        off_by_one[(1,)](x, y, 4, BLOCK=8)
    assert sum(lanes) == 9


@interpreted_only
def test_a_race_shows():
    def run():
        y = torch.zeros(1)
        running_sum[(5,)](torch.arange(5.0), y)
        return float(y)

    with program_order(lambda n: list(range(n))[::-1]):
        backwards = run()
    assert run() != backwards
