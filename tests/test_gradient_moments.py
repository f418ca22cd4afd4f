"""Sums over lists of gradients against float64 arithmetic: eager, C++ for the CPU, and CUDA C++ by emulation."""

from __future__ import annotations

import math

import cuda_emulation
import pytest
import torch

import gac_kernels as gk
from gac_kernels import library
from gac_kernels.gradients import accumulate_moments_, gradient_moments

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK = 32768  # csrc/gradient_moments.h
# Around a lane group, a chunk, and several of both; a scalar; nothing.
SIZES = (0, 1, 7, 8, 9, 255, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5)


@pytest.fixture(params=["reference", "cpu", "cuda"])
def backend(request):
    if request.param == "cpu" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    if request.param == "cuda":
        cuda_emulation.load()
    with gk.use_backend(request.param):
        yield request.param


def gradients(dtype, seed, sizes=SIZES):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def products(a, b):
    """<a, b> and the sum of |a_i b_i|, which bounds what rounding can do; products of 32-bit numbers are exact."""
    terms = [x.double() * y.double() for x, y in zip(a, b, strict=True)]
    return math.fsum(v for t in terms for v in t.tolist()), math.fsum(t.abs().sum().item() for t in terms)


def close(got, want, size):
    """A sum of n numbers in float64, in chunks of eight lanes: well below 2^-53 sqrt(n) of the sum of sizes."""
    assert abs(got - want) <= 2**-53 * 300 * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_moments_against_exact_sums(dtype, backend):
    a, b = gradients(dtype, 0), gradients(dtype, 1)
    got = gradient_moments(a, b)
    assert (got.dtype, tuple(got.shape)) == (torch.float64, (3,))
    for value, pair in zip(got.tolist(), ((a, a), (b, b), (a, b)), strict=True):
        close(value, *products(*pair))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
def test_running_sums(dtype, wide, backend):
    sum_dtype = torch.float64 if wide else torch.promote_types(dtype, torch.float32)
    sums = [torch.zeros(size, dtype=sum_dtype) for size in SIZES]
    want = [torch.zeros(size, dtype=sum_dtype) for size in SIZES]
    for seed in range(3):
        batch = gradients(dtype, seed)
        got = accumulate_moments_(sums, batch)
        assert (got.dtype, tuple(got.shape)) == (torch.float64, ())
        close(got.item(), *products(batch, batch))
        for total, gradient in zip(want, batch, strict=True):
            total += gradient.to(sum_dtype)
    assert all(torch.equal(total, expected) for total, expected in zip(sums, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_16_bit_number_is_widened_exactly(dtype, backend):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    sums = [torch.zeros(2**16)]
    norm2 = accumulate_moments_(sums, [bits])
    assert torch.equal(sums[0].nan_to_num(nan=1.5), bits.float().nan_to_num(nan=1.5))
    assert norm2.isnan()
    finite = bits[bits.isfinite()]
    half = finite[finite.abs() <= 2**10].contiguous()
    close(gradient_moments([half], [half])[2].item(), *products([half], [half]))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad, backend):
    a, b = gradients(torch.float32, 0), gradients(torch.float32, 1)
    a[-1][-1] = bad
    norm_a, norm_b, dot = gradient_moments(a, b).tolist()
    assert not math.isfinite(norm_a)
    assert math.isfinite(norm_b)
    assert not math.isfinite(dot)


def test_unaligned_gradients_and_many_of_them(backend):
    """More tensors than a launch of CUDA C++ takes, of which none begins at a multiple of 16 bytes."""
    base = torch.randn(4000, generator=torch.Generator().manual_seed(3))
    views = [base[1 + 13 * i : 14 + 13 * i] for i in range(300)]
    dense = [view.clone() for view in views]
    assert torch.equal(gradient_moments(views, dense), gradient_moments(dense, dense))
    close(gradient_moments(views, dense)[0].item(), *products(views, views))
    sums = [torch.zeros(3900).narrow(0, 13 * i, 13) for i in range(300)]
    accumulate_moments_(sums, views)
    assert all(torch.equal(total, view) for total, view in zip(sums, views, strict=True))


def test_dtypes_may_differ_from_place_to_place(backend):
    a = [gradients(dtype, 0, (500, CHUNK + 3)) for dtype in DTYPES]
    flat = [tensor for pair in zip(*a, strict=True) for tensor in pair]
    close(gradient_moments(flat, flat)[0].item(), *products(flat, flat))
    sums = [torch.zeros(t.shape, dtype=torch.float64) for t in flat]
    close(accumulate_moments_(sums, flat).item(), *products(flat, flat))
    assert all(torch.equal(total, gradient.double()) for total, gradient in zip(sums, flat, strict=True))


def test_the_bits_do_not_depend_on_the_number_of_threads(backend):
    if backend == "reference":
        pytest.skip("torch's own sums promise no order")
    a, b = gradients(torch.float32, 0), gradients(torch.float32, 1)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            sums = [x.clone() for x in a]
            found.append((gradient_moments(a, b), accumulate_moments_(sums, b), *sums))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


def test_without_gradients(backend):
    assert gradient_moments([], []).tolist() == [0.0, 0.0, 0.0]
    assert accumulate_moments_([], []).item() == 0.0
    assert torch.ops.gac_kernels.gradient_moments([], []).tolist() == [0.0, 0.0, 0.0]
    assert torch.ops.gac_kernels.accumulate_moments_([], []).item() == 0.0
    assert gradient_moments([torch.zeros(0)], [torch.zeros(0)]).tolist() == [0.0, 0.0, 0.0]


def test_strided_gradients_are_copied_and_strided_sums_refused(backend):
    wide = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        gradient_moments([wide.t()], [wide.t()]), gradient_moments([wide.t().clone()], [wide.t().clone()])
    )
    total = torch.zeros(4, 6)
    accumulate_moments_([total], [wide.t()])
    assert torch.equal(total, wide.t())
    with pytest.raises(ValueError, match=r"sums\[0\] must be contiguous"):
        accumulate_moments_([torch.zeros(6, 4).t()], [wide.t()])


@pytest.mark.parametrize(
    ("error", "match", "call"),
    [
        (
            ValueError,
            r"policy must have as many tensors as supervised, 1, got 2",
            lambda x: gradient_moments([x], [x, x]),
        ),
        (
            ValueError,
            r"policy\[1\] must have shape \(3,\), got \(4,\)",
            lambda x: gradient_moments([x, x], [x, x.new_ones(4)]),
        ),
        (
            TypeError,
            r"policy\[0\] must have the dtype of supervised\[0\].*float32.*bfloat16",
            lambda x: gradient_moments([x], [x.bfloat16()]),
        ),
        (TypeError, r"supervised\[0\] must be float16.*int64", lambda x: gradient_moments([x.long()], [x.long()])),
        (ValueError, r"policy\[0\] must lie on cpu, got meta", lambda x: gradient_moments([x], [x.to("meta")])),
        (ValueError, r"gradients\[0\] must have shape", lambda x: accumulate_moments_([x], [x[:2]])),
        (
            ValueError,
            r"sums must be memory of their own, got sums.1. overlapping sums.0.",
            lambda x: accumulate_moments_([x, x], [x + 1, x + 2]),
        ),
        (
            TypeError,
            r"sums\[0\] must be float64, or float32 .* got torch.bfloat16",
            lambda x: accumulate_moments_([x.bfloat16()], [x.bfloat16()]),
        ),
        (
            TypeError,
            r"sums\[0\] must be float64, .* got torch.float32 for torch.float64",
            lambda x: accumulate_moments_([x], [x.double()]),
        ),
    ],
)
def test_errors_name_the_tensor(error, match, call, backend):
    x = torch.ones(3)
    with pytest.raises(error, match=match):
        call(x)
    assert torch.equal(x, torch.ones(3))


@pytest.mark.parametrize(
    ("match", "name", "first", "second"),
    [
        ("of one length, got 1 and 2", "gradient_moments", [torch.ones(2)], [torch.ones(2)] * 2),
        (
            r"supervised\[0\] and .*policy\[0\] must be of one size, got 2 and 3",
            "gradient_moments",
            [torch.ones(2)],
            [torch.ones(3)],
        ),
        (r"must be of one dtype", "gradient_moments", [torch.ones(2)], [torch.ones(2).half()]),
        (r"policy\[0\] must be contiguous", "gradient_moments", [torch.ones(2, 2)], [torch.ones(2, 4)[:, ::2]]),
        (
            r"supervised\[0\] must have dtype float16, bf",
            "gradient_moments",
            [torch.ones(2).int()],
            [torch.ones(2).int()],
        ),
        (
            r"sums\[0\] must have dtype float64, or float32",
            "accumulate_moments_",
            [torch.ones(2).half()],
            [torch.ones(2).half()],
        ),
    ],
)
def test_the_operators_refuse_what_they_cannot_sum(match, name, first, second, backend):
    with pytest.raises(RuntimeError, match=match):
        library.call(name, first, second)


def test_operators_are_registered_as_they_should(backend):
    a, b = gradients(torch.float32, 0, (3, 70)), gradients(torch.float32, 1, (3, 70))
    for name in ("gradient_moments", "accumulate_moments_"):
        form = name if backend == "cpu" else f"{name}_{backend}"
        torch.library.opcheck(getattr(torch.ops.gac_kernels, form).default, (a, b))
