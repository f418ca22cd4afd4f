"""The compiled row operators in memory: strides, alignment, order, threads, instruction sets, arguments."""

from __future__ import annotations

import math
import mmap
import os

import pytest
import torch
from logit_support import DTYPES
from rows_arguments import PLAIN, RowCase, bits, fused_arguments, op
from test_instruction_sets import ISA_NAMES, instruction_set, run_python

import gac_kernels as gk

pytestmark = pytest.mark.skipif(
    not gk.backends()["cpu"].startswith("cpu:"), reason="this install has no compiled module"
)


# Layouts --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    """Views with any strides of the leading dimensions and any alignment have the bits of a contiguous copy."""
    case = RowCase(3, 4, 1030, dtype, seed=3)
    want = bits(case.statistics()), bits(case.gradient(case.statistics()))
    for offset in range(5):
        wide = torch.full((3, 5, 1041), math.nan, dtype=dtype)
        transposed = torch.full((4, 3, 1030 + offset), math.nan, dtype=dtype)
        flat = torch.full((offset + 12 * 1030,), math.nan, dtype=dtype)
        for view in (
            wide[:, :-1, offset : offset + 1030],  # logits[:, :-1]
            transposed.transpose(0, 1)[..., offset:],
            flat[offset:].view(3, 4, 1030),
        ):
            view.copy_(case.logits)
            statistics = case.statistics(view)
            assert bits(statistics) == want[0]
            new = case.gradient(statistics, logits=view)
            assert bits(new) == want[1] and new.is_contiguous()
            given = statistics[3], statistics[1], case.slope, case.entropy_slope
            op("row_gradient_", view, *case.rows, *given, *case.static)
            assert bits(view) == want[1]
        assert (
            wide[:, -1].isnan().all() and wide[..., :offset].isnan().all() and wide[..., offset + 1030 :].isnan().all()
        )
        assert transposed[..., :offset].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expanded_rows(dtype):
    case = RowCase(3, 4, 77, dtype, dead=False)
    case.logits = case.logits[:1, :1].expand(3, 4, 77)
    case.targets[:] = 5
    statistics = case.statistics()
    copied = RowCase(3, 4, 77, dtype, dead=False)
    copied.logits, copied.targets = case.logits.contiguous(), case.targets
    assert bits(statistics) == bits(copied.statistics())
    assert bits(case.gradient(statistics)) == bits(copied.gradient(statistics))


def test_strides_beyond_31_bits():
    """Offsets of 2^31 elements over a buffer whose pages come into being when they are touched."""
    stride, V = 2**31 + 32, 100
    memory = mmap.mmap(-1, 2 * (stride + V), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # no reserve
    view = torch.frombuffer(memory, dtype=torch.bfloat16).as_strided((2, 1, V), (stride, stride, 1))
    case = RowCase(2, 1, V, torch.bfloat16, dead=False)
    view.copy_(case.logits)
    statistics = case.statistics()
    assert bits(case.statistics(view)) == bits(statistics)
    want = case.gradient(statistics)
    given = statistics[3], statistics[1], case.slope, case.entropy_slope
    op("row_gradient_", view, *case.rows, *given, *case.static)
    assert bits(view) == bits(want)


# Bits -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits(dtype):
    """Again, on two threads, a row alone, rows in another order, in place: nothing changes."""
    case = RowCase(5, 4, 4999, dtype, seed=2)
    objective = gk.HybridObjective(kl_coef=0.1)
    args = fused_arguments(case, objective, case.statistics()[0])

    def run(logits=case.logits, args=args):
        out = op("row_statistics", logits, *args[:4], *case.static)
        given = out[3], out[1], args[4], args[5]
        gradient = op("row_gradient", logits, *args[:4], *given, *case.static)
        return (*out[:4], gradient.view(out[0].shape[0], -1)), op("fused_rows", logits, *args)

    want = bits(run()[0]), bits(run()[1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert (bits(run()[0]), bits(run()[1])) == want
    finally:
        torch.set_num_threads(before)
    three, fused = run()
    flat, order = case.logits.view(20, -1), torch.randperm(20)
    for rows in ([0], [9], order.tolist()):
        picked = tuple(v[rows] if isinstance(v, torch.Tensor) else v for v in args)
        alone = run(flat[None, rows], picked)
        assert bits(alone[0]) == bits(tuple(value[rows] for value in three))
        assert bits(alone[1][4][0]) == bits(fused[4].view(20, -1)[rows])


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_every_instruction_set(isa):
    if "GAC_KERNELS_ISA" in os.environ or ISA_NAMES.index(isa) < ISA_NAMES.index(instruction_set()):
        pytest.skip("not on this CPU; that it is refused is tested elsewhere")
    program = "import rows_arguments as r, gac_kernels._C as c; r.check_everything(); print(c.instruction_set())"
    result = run_python(program, GAC_KERNELS_ISA=isa)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [isa]


# Arguments ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logits": torch.zeros(2, 3, 4, dtype=torch.int64)}, "logits must have dtype float16"),
        ({"logits": torch.zeros(2, 3)}, r"logits must have three dimensions \(A, B, V\)"),
        ({"logits": torch.zeros(2, 4, 3).mT}, "logits must have stride 1 in its last dimension"),
        ({"logits": torch.zeros(2, 3, 0)}, "logits must have at least one column"),
        ({"targets": torch.zeros(5, dtype=torch.long)}, "targets must have 6 elements, got 5"),
        ({"targets": torch.zeros(6)}, "targets must have dtype int64"),
        ({"kind": torch.zeros(7, dtype=torch.uint8)}, "kind must have 6 elements, got 7"),
        ({"temperature": torch.ones(6, dtype=torch.float64)}, "temperature must have dtype float32"),
        ({"base": torch.zeros(2, 3, 5)}, "base_logits must have the logits' shape"),
        ({"base": torch.zeros(2, 3, 4, dtype=torch.float64)}, "base_logits must be float64 if and only if"),
    ],
)
def test_arguments_are_checked_by_name(change, message):
    given = {
        "logits": torch.zeros(2, 3, 4), "targets": torch.zeros(6, dtype=torch.long),
        "kind": torch.ones(6, dtype=torch.uint8), "temperature": None, "base": None,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=f"row_statistics: {message}"):
        op("row_statistics", *(given | change).values(), *PLAIN)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    for gift in (None, gk.GIFT(2.0)):
        case = RowCase(2, 3, 20, dtype, gift=gift, dead=False)
        statistics = case.statistics()
        given = statistics[3], statistics[1], case.slope, case.entropy_slope
        fused = fused_arguments(case, gk.HybridObjective(kl_coef=0.1), statistics[0])
        for name, args in (
            ("row_statistics", (*case.rows, *case.static)),
            ("row_gradient", (*case.rows, *given, *case.static)),
            ("row_gradient_", (*case.rows, *given, *case.static)),
            ("fused_rows", fused),
            ("fused_rows_", fused),
        ):
            operator = getattr(torch.ops.gac_kernels, name).default
            torch.library.opcheck(operator, (case.logits.clone(), *args))
