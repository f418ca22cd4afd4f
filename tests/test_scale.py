"""`scale_`, what backward does with a gradient that the forward pass made."""

from __future__ import annotations

import math

import pytest
import torch

from gac_kernels import library

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def layouts(dtype):
    """Contiguous of any shape, views of rows with gaps, nothing at all; more than a thread's piece."""
    g = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.randn(shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "scalar": rand(),
        "flat": rand(70_001),
        "grid": rand(3, 5, 7),
        "shifted": rand(3, 6, 37)[:, :-1],
        "gaps": rand(2, 3, 40)[..., 3:36],
        "swapped": rand(4, 3, 9).transpose(0, 1),
        "empty": rand(2, 0, 3),
    }


@pytest.mark.parametrize("layout", layouts(torch.float32))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(backend, dtype, layout):
    """In place, rounded once, and nothing beside the view is touched."""
    for factor in (torch.tensor(-0.3), torch.tensor(65536.0), torch.tensor(1 / 3, dtype=torch.float64)):
        value = layouts(dtype)[layout]
        whole = value if value._base is None else value._base
        before, want = whole.clone(), (value.to(torch.promote_types(dtype, torch.float32)) * factor.float())
        if dtype == torch.float64:
            want = value * factor.double()
        place = value.data_ptr()
        library.call("scale_", value, factor)
        assert value.data_ptr() == place
        torch.testing.assert_close(value, want.to(dtype), rtol=1e-7 if dtype == torch.float32 else 0, atol=0)
        kept = whole.eq(before) | torch.isnan(before)
        assert int((~kept).sum()) <= value.numel()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_leaves_every_bit(backend, dtype):
    value = torch.tensor([math.nan, math.inf, -0.0, 1.5], dtype=dtype)
    before = value.clone().view(torch.int16 if dtype.itemsize == 2 else torch.int32)
    library.call("scale_", value, torch.ones(()))
    assert value.view(before.dtype).equal(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite(backend, dtype):
    value = torch.tensor([math.nan, math.inf, -math.inf, 0.0] * 9, dtype=dtype)
    library.call("scale_", value, torch.tensor(-2.0))
    assert value[::4].isnan().all() and value[1::4].eq(-math.inf).all() and value[2::4].eq(math.inf).all()
    library.call("scale_", value, torch.tensor(math.nan))
    assert value.isnan().all()
