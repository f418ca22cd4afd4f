"""Group-relative advantages as an operator: C++ for the CPU, and CUDA C++ by emulation, against the definition."""

from __future__ import annotations

import math

import cuda_emulation
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_advantages import definition, rewards_and_ids

import gac_kernels as gk
from gac_kernels import advantages

BASELINES, SCALES = advantages.BASELINES, advantages.SCALES
FORMS = {"cuda": "group_advantages_cuda", "device": "group_advantages", "reference": "group_advantages_reference"}


@pytest.fixture(scope="module", autouse=True)
def emulation():
    cuda_emulation.load()


def operator(form, rewards, ids=None, size=0, *, adjacent=False, baseline="mean", scale="group", eps=1e-6):
    codes = BASELINES.index(baseline), SCALES.index(scale)
    return getattr(torch.ops.gac_kernels, FORMS[form])(rewards, ids, size, adjacent, *codes, eps)


def close(got, want, rtol=1e-9):
    torch.testing.assert_close(got, torch.as_tensor(want, dtype=got.dtype), rtol=rtol, atol=rtol)


@settings(max_examples=40, deadline=None)
@given(
    rewards_and_ids, st.sampled_from(BASELINES), st.sampled_from(SCALES), st.sampled_from([0.0, 1e-6, 0.1]),
    st.booleans(), st.sampled_from(["cuda", "device"]),
)  # fmt: skip
def test_any_groups_by_id(rows, baseline, scale, eps, adjacent, form):
    rows = sorted(rows, key=lambda row: row[1]) if adjacent else rows
    rewards, ids = [r for r, _ in rows], [i for _, i in rows]
    got = operator(
        form, torch.tensor(rewards, dtype=torch.float64), torch.tensor(ids, dtype=torch.int64), adjacent=adjacent,
        baseline=baseline, scale=scale, eps=eps,
    )  # fmt: skip
    close(got, definition(rewards, ids, baseline, scale, eps))


@pytest.mark.parametrize("form", ["cuda", "device"])
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_many_sequences_in_groups_of_all_kinds(form, baseline, scale):
    """By size, by interleaved ids, by ids side by side: several blocks, unscored rewards, groups of one."""
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(300, generator=g, dtype=torch.float64)
    rewards[::7] = torch.tensor([math.nan, math.inf, -math.inf]).repeat(100)[:43]
    ids = torch.randint(-(2**62), 2**62, (60,), generator=g).repeat(5)
    ids[17] = 3  # alone
    keywords = {"baseline": baseline, "scale": scale}
    for dtype, rtol in ((torch.float64, 1e-11), (torch.float32, 3e-7)):
        x = rewards.to(dtype)
        want = operator("reference", x.double(), None, 5, **keywords)
        close(operator(form, x, None, 5, **keywords), want, rtol)
        want = operator("reference", x.double(), ids, **keywords)
        close(operator(form, x, ids, **keywords), want, rtol)
        beside, order = ids.sort(stable=True)
        close(operator(form, x[order], beside, adjacent=True, **keywords), want[order], rtol)


@pytest.mark.parametrize("form", ["cuda", "device"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_exact_zeros(form, baseline, scale):
    def of(rewards, **groups):
        rewards = torch.tensor(rewards, dtype=torch.float64)
        return operator(form, rewards, baseline=baseline, scale=scale, eps=0.0, **groups).tolist()

    # 0.1 + 0.1 + 0.1 does not divide back into 0.1: only max == min says that nothing differs.
    assert of([0.1] * 3 + [0.7] * 3 + [0.0, 1.0, 0.5], size=3)[:6] == [0.0] * 6
    assert of([5.0, 1.0, 2.0], ids=torch.tensor([7, 8, 8]))[0] == 0.0
    assert of([math.nan, 1.0, math.inf, 2.0, -math.inf, 4.0], ids=torch.tensor([0, 0, 1, 2, 2, 3])) == [0.0] * 6
    assert of([], size=4) == [] and of([], ids=torch.tensor([], dtype=torch.int64)) == []


@pytest.mark.parametrize("form", ["cuda", "device"])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_the_same_bits_again_and_in_any_order_of_groups(form, scale):
    """Interleaved, side by side, by size: the same members in the same order give the same bits."""
    rewards = torch.randn(24, 8, generator=torch.Generator().manual_seed(1))
    by_size = operator(form, rewards.flatten(), None, 8, scale=scale)
    ids = torch.arange(24).repeat(8)
    interleaved = operator(form, rewards.T.flatten(), ids, scale=scale)
    assert torch.equal(interleaved.view(8, 24).T, by_size.view(24, 8))
    assert torch.equal(operator(form, rewards.flatten(), ids.sort()[0], adjacent=True, scale=scale), by_size)
    again = [operator(form, rewards.T.flatten(), ids, scale="batch") for _ in range(10)]
    assert all(torch.equal(a, again[0]) for a in again)


def test_the_public_function_on_cuda():
    rewards, ids = torch.tensor([0.0, 1.0, math.nan, 2.0, 5.0, 3.0]), [1, 0, 1, 0, -7, 1]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.bfloat16, 2**-8)):
        with gk.use_backend("cuda"):
            got = gk.group_advantages(rewards.to(dtype), ids)
        assert got.dtype == dtype
        close(got, definition(rewards.tolist(), ids, "mean", "group", 1e-6), tolerance)


@pytest.mark.parametrize("form", ["cuda", "device"])
@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("rewards must have dtype float32 or float64", {0: torch.zeros(4, dtype=torch.float16)}),
        ("rewards must be contiguous", {0: torch.zeros(8)[::2]}),
        ("groups must have dtype int64", {1: torch.zeros(4, dtype=torch.int32)}),
        ("groups must have 4 elements, got 3", {1: torch.zeros(3, dtype=torch.int64)}),
        ("group_size must divide the 4 rewards, got 3", {1: None, 2: 3}),
        ("group_size must divide the 4 rewards, got 0", {1: None, 2: 0}),
        (r"baseline must be in \[0, 1\], got 2", {4: 2}),
        (r"scale must be in \[0, 2\], got -1", {5: -1}),
    ],
)
def test_arguments_are_checked_by_name(form, match, change):
    args = [torch.zeros(4), torch.zeros(4, dtype=torch.int64), 0, False, 0, 0, 1e-6]
    for position, value in change.items():
        args[position] = value
    if form == "device" and not compiled():
        pytest.skip("this install has no compiled module, or one without this operator")
    with pytest.raises(RuntimeError, match=match):
        getattr(torch.ops.gac_kernels, FORMS[form])(*args)


def compiled():
    return torch._C._dispatch_has_kernel_for_dispatch_key("gac_kernels::group_advantages", "CPU")


@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form):
    for groups, size in ((torch.tensor([0, 1, 0, 1]), 0), (None, 2)):
        torch.library.opcheck(
            getattr(torch.ops.gac_kernels, FORMS[form]).default, (torch.rand(4), groups, size, False, 0, 0, 1e-6),
            test_utils=("test_schema", "test_faketensor"),
        )  # fmt: skip
