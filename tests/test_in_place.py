"""What inplace=True overwrites: no leaf, and nothing that is read after it; and what other operators write."""

from __future__ import annotations

import itertools

import pytest
import torch

import gac_kernels as gk
from gac_kernels.gradients import accumulate_moments_
from gac_kernels.overlap import first_shared, overlap, overlaps_itself

S, T, V = 3, 4, 7
OBJECTIVE = gk.HybridObjective(gk.SAPO())
LEAVES = {
    "parameter": lambda p: p, "view": lambda p: p.view_as(p), "rows": lambda p: p[:, :-1],
    "flat": lambda p: p.view(-1, V),
}  # fmt: skip


def batch(shape=(S, T), **given) -> gk.TokenBatch:
    targets = torch.zeros(shape, dtype=torch.long)
    return gk.TokenBatch.from_padded(targets, torch.ones(shape), **({"advantages": torch.ones(shape[0])} | given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("how", LEAVES)
def test_leaves_are_refused(how, dtype):
    """As torch does; and the parameter keeps its values and has no gradient."""
    p = torch.nn.Parameter(torch.randn(S, T, V).to(dtype))
    before, logits = p.detach().clone(), LEAVES[how](p)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.long)
    made = batch(targets.shape) if targets.ndim == 2 else batch((len(targets), 1))
    given = logits if targets.ndim == 2 else logits[:, None]
    with pytest.raises(ValueError, match=r"logits must be computed to be overwritten with inplace=True.*leaf"):
        gk.hybrid_loss_from_logits(given, made, OBJECTIVE, 0.0, inplace=True)
    with pytest.raises(ValueError, match=r"logits must be computed to be overwritten with inplace=True.*leaf"):
        gk.token_logprobs(logits, targets, inplace=True)
    assert p.equal(before) and p.grad is None
    with torch.no_grad():  # nothing is written
        gk.hybrid_loss_from_logits(given, made, OBJECTIVE, 0.0, inplace=True)
        gk.token_logprobs(logits, targets, inplace=True)
    assert p.equal(before)


def test_leaves_under_liger_names():
    """Its tests give leaves, with inplace=True by default: their gradient is a new tensor."""
    from gac_kernels.integrations.liger import triton_grpo_loss

    leaf = torch.randn(S, T + 1, V, requires_grad=True)
    before, ids = leaf.detach().clone(), torch.zeros(S, T, dtype=torch.long)
    loss, _ = triton_grpo_loss(leaf, None, None, ids, torch.ones(S), beta=0.0, reduce=True)
    loss.backward()
    assert leaf.detach().equal(before) and leaf.grad.data_ptr() != leaf.data_ptr() and leaf.grad.ne(0).any()


class _InTheGraph(torch.autograd.Function):
    """A buffer as a model's output is to autograd: no leaf, no view of one."""

    @staticmethod
    def forward(ctx, source, holder):
        return holder[0].detach()

    @staticmethod
    def backward(ctx, grad):
        return None, None


def produced(view: torch.Tensor) -> torch.Tensor:
    return _InTheGraph.apply(torch.zeros((), requires_grad=True), [view])


SHARED = {
    "batch.base_logits": lambda b: {"base_logits": b[:, :-1]},
    "batch.old_logprobs": lambda b: {"old_logprobs": b[:, 1:, 0]},
    "batch.ref_logprobs": lambda b: {"ref_logprobs": b[:, 1:, V - 1]},
    "batch.rollout_weights": lambda b: {"rollout_weights": b[:, 1:, 2]},
    "batch.advantages": lambda b: {"advantages": b[:, 1, 0]},
}


@pytest.mark.parametrize("name", SHARED)
def test_inputs_in_the_logits_memory_are_refused_by_name(name):
    buffer = 0.1 + torch.rand(S, T + 1, V)  # a weight is not negative
    made, logits = batch(**SHARED[name](buffer)), buffer[:, 1:]
    objective = gk.HybridObjective(gk.SAPO(), gk.GIFT(3.0)) if "base" in name else OBJECTIVE
    before = buffer.clone()
    with pytest.raises(ValueError, match=rf"{name} must not share memory with logits"):
        gk.hybrid_loss_from_logits(produced(logits), made, objective, 0.5, inplace=True)
    assert buffer.equal(before)
    gk.hybrid_loss_from_logits(produced(logits), made, objective, 0.5).loss.backward()  # a new tensor


@pytest.mark.parametrize("name", ["mu", "transform.temperature", "denominators.policy", "batch.targets", "batch.mask"])
def test_settings_in_the_logits_memory_are_refused_by_name(name):
    """Numbers, a temperature a sequence, and integers and bytes that look at the same memory."""
    logits = torch.rand(S, T, V) + 0.5
    made, given, mu = batch(), {}, 0.5
    if name == "mu":
        mu = logits[0, 0, 0]
    elif name == "transform.temperature":
        given = {"transform": gk.LogitTransform(logits[:, 1, 2])}
    elif name == "denominators.policy":
        given = {"denominators": gk.Denominators(policy=logits[-1, -1, -1])}
    else:
        of = logits.view(torch.int32).mul_(0)[..., 0] if "targets" in name else logits.view(torch.bool)[..., 5]
        field = name.partition(".")[2]
        object.__setattr__(made, field, of)
    with pytest.raises(ValueError, match=rf"{name} must not share memory with logits"):
        gk.hybrid_loss_from_logits(produced(logits), made, OBJECTIVE, mu, inplace=True, **given)


def test_log_probs_in_place_take_no_shared_input():
    logits = torch.zeros(S, T, V)
    targets = logits.view(torch.int32)[..., 0]
    with pytest.raises(ValueError, match="targets must not share memory with logits"):
        gk.token_logprobs(produced(logits), targets, inplace=True)
    heat = torch.ones(S, T, V)
    with pytest.raises(ValueError, match=r"transform\.temperature must not share memory with logits"):
        gk.token_logprobs(produced(heat), targets.clone(), transform=gk.LogitTransform(heat[:, 0, 0]), inplace=True)


def test_an_upstream_gradient_in_the_logits_memory_is_read_before_it_is_written():
    one = torch.rand(S, T, 1)  # one column, so that the log-probs' gradient fits beside the logits
    logits = produced(one)
    out = gk.token_logprobs(logits, torch.zeros(S, T, dtype=torch.long), outputs=("logprobs",), inplace=True)
    (gradient,) = torch.autograd.grad(out.logprobs, logits, one[..., 0])
    assert gradient.eq(0).all()  # of a vocabulary of one


def test_what_shares_a_buffer_but_no_element_is_taken():
    """Halves, every other row, and columns beside them: the gradient in place is that of a tensor of its own."""
    buffer = torch.randn(2 * S, T, 2 * V)
    pairs = (
        (buffer[:S, :, :V], buffer[S:, :, :V]), (buffer[::2, :, :V], buffer[1::2, :, :V]),
        (buffer[:S, :, :V], buffer[:S, :, V:]), (buffer[:S, ::2, :V], buffer[:S, 1::2, :V]),
    )  # fmt: skip
    objective = gk.HybridObjective(gk.SAPO(), gk.GIFT(3.0))
    for logits, base in pairs:
        shape = logits.shape[:2]
        expert = torch.arange(shape[0]) % 2 == 0
        made = batch(shape, base_logits=base, is_expert_S=expert)
        leaf = logits.clone().requires_grad_()
        gk.hybrid_loss_from_logits(leaf, made, objective, 0.5).loss.backward()
        before, kept = buffer.clone(), base.clone()
        out = gk.hybrid_loss_from_logits(produced(logits), made, objective, 0.5, inplace=True)
        out.loss.backward()
        assert logits.equal(leaf.grad) and base.equal(kept)
        buffer.copy_(before)


def elements(view: torch.Tensor) -> set[int]:
    """Bytes of a view, one by one."""
    first = torch.tensor(view.shape)
    out = set()
    for place in itertools.product(*(range(int(n)) for n in first)):
        at = view.data_ptr() + view.element_size() * sum(p * s for p, s in zip(place, view.stride(), strict=True))
        out.update(range(at, at + view.element_size()))
    return out


def test_overlap_against_every_byte():
    g = torch.Generator().manual_seed(0)
    buffer = torch.zeros(200, dtype=torch.int16)

    def draw() -> torch.Tensor:
        whole = buffer if torch.rand((), generator=g) < 0.5 else buffer[:100].view(torch.int32)
        dims = int(torch.randint(0, 4, (), generator=g))
        shape = torch.randint(1, 4, (dims,), generator=g).tolist()
        stride = torch.randint(0, 12, (dims,), generator=g).tolist()
        return whole.as_strided(shape, stride, int(torch.randint(0, 12, (), generator=g)))

    seen = set()
    for _ in range(600):
        a, b = draw(), draw()
        want = not elements(a).isdisjoint(elements(b))
        assert overlap(a, b) is want and overlap(b, a) is want
        itself = len(elements(a)) < a.numel() * a.element_size()
        assert overlaps_itself(a) is itself
        seen.add((want, itself))
    assert len(seen) == 4
    assert not overlap(buffer[:0], buffer) and not overlap(torch.empty(3, device="meta"), torch.empty(3, device="meta"))


def test_sums_that_share_memory_are_refused():
    """Among themselves or with a gradient, as a whole or in part; then nothing has been added."""
    buffer = torch.ones(30, dtype=torch.float64)
    ones = [torch.ones(10, dtype=torch.float64) for _ in range(2)]
    for sums, gradients, match in (
        ([buffer[:10], buffer[5:15]], ones, r"sums\[\d\] overlapping sums\[\d\]"),
        ([buffer[:10], buffer[20:]], [buffer[20:], buffer[:10]], r"sums\[\d\] overlapping gradients\[\d\]"),
        ([buffer[:10], buffer[20:]], [ones[0], buffer[15:25]], r"sums\[1\] overlapping gradients\[1\]"),
        ([buffer[:10], buffer[:10]], ones, r"sums\[\d\] overlapping sums\[\d\]"),
    ):
        with pytest.raises(ValueError, match=match):
            accumulate_moments_(sums, gradients)
        assert buffer.eq(1).all()
    norm = accumulate_moments_([buffer[:10], buffer[10:20]], [buffer[20:], buffer[20:]])  # read twice, written apart
    assert norm == 20 and buffer[:20].eq(2).all() and buffer[20:].eq(1).all()
    assert first_shared([buffer[::1][:0]], [buffer]) is None
