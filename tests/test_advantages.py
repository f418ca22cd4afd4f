"""Group-relative advantages against the definition, written out with the statistics module."""

import math
import statistics

import pytest
import torch
from host_reads import forbid_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st

import gac_kernels as gk
from gac_kernels import eager

BASELINES, SCALES = ("mean", "leave_one_out"), ("group", "batch", "none")


def definition(rewards, ids, baseline, scale, eps):
    """One sequence at a time, in Python floats."""
    scored = [r for r in rewards if math.isfinite(r)]
    batch_std = statistics.stdev(scored) if len(scored) > 1 else 0.0
    out = []
    for i, (reward, group) in enumerate(zip(rewards, ids, strict=True)):
        others = [r for j, r in enumerate(rewards) if ids[j] == group and j != i and math.isfinite(r)]
        members = [*others, reward]
        if not math.isfinite(reward) or max(members) == min(members):
            out.append(0.0)
            continue
        advantage = reward - statistics.mean(members if baseline == "mean" else others)
        if scale != "none":
            advantage /= (statistics.stdev(members) if scale == "group" else batch_std) + eps
        out.append(advantage)
    return out


def check(rewards, groups, ids, baseline, scale, eps=1e-6):
    got = gk.group_advantages(
        torch.tensor(rewards, dtype=torch.float64), groups, baseline=baseline, scale=scale, eps=eps
    )
    want = torch.tensor(definition(rewards, ids, baseline, scale, eps), dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_groups_by_size(baseline, scale):
    rewards = [0.0, 1.0, 1.0, 0.5, -2.0, 3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0]
    check(rewards, 4, [0] * 4 + [1] * 4 + [2] * 4, baseline, scale)


rewards_and_ids = st.lists(
    st.tuples(
        st.one_of(
            st.sampled_from([0.0, 1.0, 0.1, math.nan, math.inf, -math.inf]),
            st.floats(-100, 100).map(lambda x: round(x, 3)),
        ),
        st.integers(-(2**62), 2**62) | st.integers(-2, 2),
    ),
    max_size=14,
)


@pytest.mark.usefixtures("backend")
@settings(max_examples=150, deadline=None)
@given(rewards_and_ids, st.sampled_from(BASELINES), st.sampled_from(SCALES), st.sampled_from([0.0, 1e-6, 0.1]))
def test_any_groups_by_id(rows, baseline, scale, eps):
    rewards, ids = [r for r, _ in rows], [i for _, i in rows]
    check(rewards, torch.tensor(ids, dtype=torch.int64), ids, baseline, scale, eps)


@pytest.mark.usefixtures("backend")
@settings(max_examples=50, deadline=None)
@given(rewards_and_ids, st.randoms(use_true_random=False))
def test_order_of_sequences_is_free(rows, random):
    """Interleaving groups changes nothing, bit for bit, while the order inside each group stays."""
    by_group = {}
    for row in rows:
        by_group.setdefault(row[1], []).append(row)
    tags = [i for _, i in rows]
    random.shuffle(tags)
    iterators = {i: iter(rs) for i, rs in by_group.items()}
    mixed = [next(iterators[i]) for i in tags]

    def advantages(rows):
        rewards = torch.tensor([r for r, _ in rows], dtype=torch.float64)
        return gk.group_advantages(rewards, torch.tensor([i for _, i in rows], dtype=torch.int64)).tolist()

    want = {}
    for (_, i), a in zip(rows, advantages(rows), strict=True):
        want.setdefault(i, []).append(a)
    got = {}
    for (_, i), a in zip(mixed, advantages(mixed), strict=True):
        got.setdefault(i, []).append(a)
    assert got == want


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("baseline", BASELINES)
def test_exact_zeros(baseline, scale):
    def advantages(rewards, groups):
        rewards = torch.tensor(rewards, dtype=torch.float64)
        return gk.group_advantages(rewards, groups, baseline=baseline, scale=scale, eps=0.0).tolist()

    # 0.1 + 0.1 + 0.1 does not divide back into 0.1: only max == min says that nothing differs.
    assert advantages([0.1] * 3 + [0.7] * 3 + [0.0, 1.0, 0.5], 3)[:6] == [0.0] * 6
    assert advantages([5.0, 1.0, 2.0], torch.tensor([7, 8, 8]))[0] == 0.0
    assert advantages([math.nan, 1.0, math.inf, 2.0, -math.inf, 4.0], torch.tensor([0, 0, 1, 2, 2, 3])) == [0.0] * 6
    assert advantages([], 4) == []
    assert advantages([], torch.tensor([], dtype=torch.int64)) == []


@pytest.mark.usefixtures("backend")
def test_a_nan_reward_leaves_its_group_as_if_it_were_not_there():
    with_nan = gk.group_advantages(torch.tensor([1.0, math.nan, 2.0, 4.0]), 4)
    without = gk.group_advantages(torch.tensor([1.0, 2.0, 4.0]), 3)
    assert with_nan[[0, 2, 3]].tolist() == without.tolist()
    assert with_nan[1] == 0


@pytest.mark.parametrize(
    ("given_dtype", "dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.int64, torch.float32),
        (torch.bool, torch.float32),
    ],
)
def test_dtypes(given_dtype, dtype):
    got = gk.group_advantages(torch.tensor([0, 1, 1, 0, 0, 1]).to(given_dtype), 3)
    want = torch.tensor(definition([0.0, 1.0, 1.0, 0.0, 0.0, 1.0], [0, 0, 0, 1, 1, 1], "mean", "group", 1e-6))
    assert got.dtype == dtype
    torch.testing.assert_close(got, want.to(dtype), rtol=1e-6 if dtype != torch.bfloat16 else 2**-8, atol=0)


def test_ids_of_any_integer_dtype_and_layout():
    rewards = torch.tensor([0.0, 1.0, 3.0, 0.5])
    want = gk.group_advantages(rewards, [0, 1, 0, 1])
    for dtype in (torch.int8, torch.uint8, torch.int32, torch.int64):
        ids = torch.tensor([[3, 0], [9, 0], [3, 0], [9, 0]], dtype=dtype)[:, 0]  # strided
        assert torch.equal(gk.group_advantages(rewards, ids), want)


def test_no_gradient_and_inputs_untouched():
    rewards = torch.tensor([1.0, math.nan, 3.0, 0.0], requires_grad=True)
    before = rewards.detach().clone()
    assert not gk.group_advantages(rewards, 2).requires_grad
    assert torch.equal(rewards.detach().nan_to_num(-9), before.nan_to_num(-9))


@pytest.mark.parametrize("groups", [2, "ids"])
@pytest.mark.parametrize("scale", SCALES)
def test_reads_nothing_from_the_device(groups, scale):
    rewards = torch.tensor([0.0, 1.0, math.nan, 2.0])
    groups = torch.tensor([1, 0, 1, 0]) if groups == "ids" else groups
    ids, size = (None, groups) if isinstance(groups, int) else (groups, 0)
    with forbid_host_reads() as watch:
        gk.group_advantages(rewards, groups, scale=scale)
        eager.group_advantages(rewards, ids, size, False, 0, SCALES.index(scale), 1e-6)  # what is inside the operator
    assert watch.operators > 5  # it did watch


@pytest.mark.parametrize("scale", SCALES)
def test_many_sequences_are_sorted_first(scale, monkeypatch):
    """The same advantages, and no read of the device."""
    rewards, ids = torch.tensor([0.0, 1.0, math.nan, 2.0, 5.0, 3.0]), torch.tensor([1, 0, 1, 0, -7, 1])
    want = gk.group_advantages(rewards, ids, scale=scale)
    monkeypatch.setattr(gk.advantages, "SORTED_BEYOND", 5)
    with forbid_host_reads() as watch:
        got = gk.group_advantages(rewards, ids, scale=scale)
    assert watch.operators > 3  # it did sort
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)


@pytest.mark.parametrize("groups", [2, torch.zeros(4, dtype=torch.int64, device="meta")])
def test_runs_where_there_is_nothing_to_read(groups):
    got = gk.group_advantages(torch.zeros(4, device="meta"), groups)
    assert got.shape == (4,)
    assert got.dtype == torch.float32
    assert got.device.type == "meta"


@pytest.mark.parametrize(
    ("error", "match", "arguments", "keywords"),
    [
        (TypeError, "rewards_S", ([1.0], 1), {}),
        (TypeError, "rewards_S", (torch.zeros(2, dtype=torch.complex64), 1), {}),
        (ValueError, r"rewards_S .*\(2, 2\)", (torch.zeros(2, 2), 2), {}),
        (ValueError, "groups .* divide the 3 rewards, got 2", (torch.zeros(3), 2), {}),
        (ValueError, "groups .* got 0", (torch.zeros(3), 0), {}),
        (TypeError, "groups .* bool", (torch.zeros(3), True), {}),
        (TypeError, "groups .* torch.float32", (torch.zeros(3), torch.zeros(3)), {}),
        (TypeError, "groups .* torch.bool", (torch.zeros(3), torch.zeros(3, dtype=torch.bool)), {}),
        (ValueError, r"groups .* \(3,\) .* \(2,\)", (torch.zeros(3), torch.tensor([0, 1])), {}),
        (ValueError, "groups .* cpu .* meta", (torch.zeros(3), torch.zeros(3, dtype=torch.int64, device="meta")), {}),
        (ValueError, "baseline .* 'median'", (torch.zeros(3), 3), {"baseline": "median"}),
        (ValueError, "scale .* 'std'", (torch.zeros(3), 3), {"scale": "std"}),
        (ValueError, "eps .* -1", (torch.zeros(3), 3), {"eps": -1}),
        (ValueError, "eps .* nan", (torch.zeros(3), 3), {"eps": math.nan}),
    ],
)
def test_errors_name_the_argument(error, match, arguments, keywords):
    with pytest.raises(error, match=match):
        gk.group_advantages(*arguments, **keywords)
