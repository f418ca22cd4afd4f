"""What holds of the losses from logits whatever they compute: bits, relations between calls, memory, one derivative."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logit_support import DTYPES, LogitCase, check, check_gradient, check_rows, make, run

import gac_kernels as gk
from gac_kernels import reference

pytestmark = pytest.mark.usefixtures("backend")
OBJECTIVE = gk.HybridObjective(kl_coef=0.1, entropy_coef=0.02)
POLICIES = [gk.SAPO(), gk.GSPO()]
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@QUICK
@given(
    lengths=st.lists(st.integers(0, 3), min_size=0, max_size=3), V=st.integers(1, 300), seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]), dtype=st.sampled_from(DTYPES), inplace=st.booleans(),
    packed=st.booleans(),
)  # fmt: skip
def test_any_batch(lengths, V, seed, scale, dtype, inplace, packed):
    scale = min(scale, 1e3) if dtype == torch.float16 else scale
    expert = [(seed >> i) & 1 == 1 for i in range(len(lengths))]
    case = make(lengths, expert, V=V, seed=seed, scale=scale, dtype=dtype, packed=packed)
    check(case, gk.HybridObjective(), inplace=inplace)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits(dtype, policy):
    """Repeats, 1 and 2 threads, padded further, reordered, in place: not a bit changes. A row's results do not depend
    on which rows lie beside it."""
    objective = gk.HybridObjective(policy, kl_coef=0.1)
    case = make((5, 9, 7, 3, 8, 2), (False, True) * 3, V=3001, dtype=dtype, seed=4)
    want, want_gradient = run(gk.hybrid_loss_from_logits, case, objective, 0.3)

    def same(case, select=lambda value: value, **options):
        out, gradient = run(gk.hybrid_loss_from_logits, case, objective, 0.3, **options)
        assert select(gradient).equal(want_gradient), options
        assert select(out.logprobs).equal(want.logprobs) and select(out.token_entropy).equal(want.token_entropy)
        assert select(out.signals.rows).equal(want.signals.rows)
        return out

    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 2, 1):
            torch.set_num_threads(count)
            assert same(case).loss.equal(want.loss) and same(case, inplace=True).loss.equal(want.loss)
    finally:
        torch.set_num_threads(threads)
    order = torch.tensor([3, 0, 5, 2, 4, 1])
    names = ("targets", "mask", "is_expert", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "groups")
    moved = gk.TokenBatch(cu_seqlens=None, **{name: getattr(case.batch, name)[order] for name in names})
    same(LogitCase(case.logits[order], moved), lambda value: value[order.argsort()])


def test_a_row_alone():
    """token_logprobs of one row has the bits that the row has in a batch, wherever it lies in memory."""
    for dtype in DTYPES:
        logits, targets = (4 * torch.randn(9, 2050)).to(dtype), torch.randint(0, 2050, (9,))
        together = gk.token_logprobs(logits, targets)
        for i in range(9):
            shifted = torch.empty(2050 + i, dtype=dtype)[i:]
            shifted.copy_(logits[i])
            alone = gk.token_logprobs(shifted, targets[i])
            for name in ("logprobs", "entropy", "sum_sq"):
                assert getattr(alone, name).equal(getattr(together, name)[i])


def test_relations():
    """A shift of a row changes nothing; a permutation of the vocabulary moves the gradient with it."""
    case = make(dtype=torch.float64, V=61)
    want, want_gradient = run(gk.hybrid_loss_from_logits, case, OBJECTIVE, 0.3)
    out, gradient = run(gk.hybrid_loss_from_logits, LogitCase(case.logits + 100.0, case.batch), OBJECTIVE, 0.3)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-9, atol=1e-12)
    order = torch.randperm(61)
    batch = make(dtype=torch.float64, V=61).batch
    batch.targets[batch.mask] = order.argsort()[batch.targets[batch.mask]]
    out, gradient = run(gk.hybrid_loss_from_logits, LogitCase(case.logits[..., order], batch), OBJECTIVE, 0.3)
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient, want_gradient[..., order], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_gradcheck(policy):
    case = make((3, 2), (False, True), V=6, dtype=torch.float64, holes=False, poison=False)
    objective = gk.HybridObjective(policy, gk.NLL("none"), kl_coef=0.1, entropy_coef=0.05)
    transform = gk.LogitTransform(0.8, softcap=5.0, scale=0.9)

    def loss(logits):
        return gk.hybrid_loss_from_logits(logits, case.batch, objective, 0.3, transform=transform).loss

    assert torch.autograd.gradcheck(loss, case.logits.clone().requires_grad_())


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_in_place(policy):
    """The gradient takes the logits' place, scaled by what comes from above; once."""
    objective = gk.HybridObjective(policy)
    for dtype in DTYPES:
        case = make(dtype=dtype)
        leaf = case.logits.clone().requires_grad_()
        scaled = gk.hybrid_loss_from_logits(leaf, case.batch, objective, 0.3).loss * 4.0
        (want,) = torch.autograd.grad(scaled, leaf)
        upstream = leaf * 1.0
        place = upstream.data_ptr()
        out = gk.hybrid_loss_from_logits(upstream, case.batch, objective, 0.3, inplace=True)
        seen = []
        upstream.register_hook(lambda grad, seen=seen: seen.append(grad.data_ptr()))
        (out.loss * 4.0).backward(retain_graph=True)
        assert leaf.grad.equal(want) and seen == [place]
        with pytest.raises(RuntimeError, match="second backward"):
            out.loss.backward()


def test_in_place_is_seen_by_whoever_saved_the_logits():
    case = make(poison=False)
    leaf = case.logits.clone().requires_grad_()
    squashed = torch.tanh(leaf)  # saves its output
    out = gk.hybrid_loss_from_logits(squashed, case.batch, OBJECTIVE, 0.3, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1.0
    out = gk.hybrid_loss_from_logits(logits, case.batch, OBJECTIVE, 0.3, inplace=True)
    logits.detach().zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_in_place_without_a_gradient_leaves_the_logits():
    case = make()
    before = case.logits.clone()
    out = gk.hybrid_loss_from_logits(case.logits, case.batch, OBJECTIVE, 0.3, inplace=True)
    assert not out.loss.requires_grad
    torch.testing.assert_close(case.logits, before, rtol=0, atol=0, equal_nan=True)
    with torch.no_grad():
        leaf = case.logits.requires_grad_()
        assert gk.hybrid_loss_from_logits(leaf, case.batch, OBJECTIVE, 0.3, inplace=True).loss.equal(out.loss)


@pytest.mark.parametrize("policy", POLICIES, ids=lambda p: type(p).__name__)
def test_repeated_backward(policy):
    """A kept graph gives the right gradient every time, and what it gave before stays as it was."""
    case = make(poison=False)
    leaf = case.logits.clone().requires_grad_()
    loss = gk.hybrid_loss_from_logits(leaf, case.batch, gk.HybridObjective(policy), 0.3).loss
    (first,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(loss, leaf, torch.tensor(3.0), retain_graph=True)
    (third,) = torch.autograd.grad(loss, leaf)
    assert first.equal(kept) and third.equal(kept)
    torch.testing.assert_close(second, 3 * kept, rtol=1e-6, atol=0)


def test_one_derivative_only():
    case = make(poison=False)
    leaf = case.logits.clone().requires_grad_()
    for inplace in (False, True):
        loss = gk.hybrid_loss_from_logits(leaf * 1.0, case.batch, OBJECTIVE, 0.3, inplace=inplace).loss
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            torch.autograd.grad(gradient.sum() + leaf.sum(), leaf)
    logprobs = gk.token_logprobs(leaf, case.batch.targets, mask=case.batch.mask).logprobs
    (gradient,) = torch.autograd.grad(logprobs.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(gradient.sum() + leaf.sum(), leaf)


def test_the_logits_memory_is_freed():
    """Out of place, what the graph keeps is the gradient, not the logits."""
    import weakref

    case = make(poison=False)
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1.0
    alive = weakref.ref(logits.untyped_storage())
    out = gk.hybrid_loss_from_logits(logits, case.batch, OBJECTIVE, 0.3)
    del logits
    assert alive() is None
    out.loss.backward()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_logprobs(dtype):
    """Values and both gradients, for upstream gradients that differ from place to place and are strided."""
    case = make(dtype=dtype, V=203)
    targets, mask = case.batch.targets, case.batch.mask
    transform = gk.LogitTransform(0.7, 5.0, 1.5)
    leaf, wide = case.logits.clone().requires_grad_(), case.logits.double().requires_grad_()
    got = gk.token_logprobs(leaf, targets, mask=mask, transform=transform)
    want = reference.token_logprobs(wide, targets, mask, transform)
    acc = torch.promote_types(dtype, torch.float32)
    upstream = torch.randn(*targets.shape, 2, dtype=torch.float64)
    for name in ("logprobs", "entropy", "sum_sq"):
        check_rows(getattr(got, name), getattr(want, name), acc)
    assert not got.sum_sq.requires_grad
    for weights in ((1, 1), (1, 0), (0, 1)):
        parts = [(a * b, c) for a, b, c in zip(weights, upstream.unbind(-1), ("logprobs", "entropy"), strict=True)]
        chosen = [(grad, name) for grad, name in parts if weights[name == "entropy"]]
        (ours,) = torch.autograd.grad(
            [getattr(got, name) for _, name in chosen], leaf, [grad.to(acc) for grad, _ in chosen], retain_graph=True
        )
        (theirs,) = torch.autograd.grad(
            [getattr(want, name) for _, name in chosen], wide, [grad for grad, _ in chosen], retain_graph=True
        )
        check_gradient(ours, theirs)


def test_token_logprobs_of_any_shape():
    logits = torch.randn(2, 3, 2, 4, 17, dtype=torch.float64)
    targets = torch.randint(0, 17, (2, 3, 2, 4))
    want = reference.token_logprobs(logits, targets)
    for view in (logits, logits.transpose(0, 2).contiguous().transpose(0, 2)):  # the latter is copied
        check_rows(gk.token_logprobs(view, targets).logprobs, want.logprobs, torch.float64)
    one = gk.token_logprobs(logits[0, 0, 0, 0], targets[0, 0, 0, 0])
    assert one.logprobs.shape == () and math.isclose(one.logprobs, want.logprobs[0, 0, 0, 0])
    assert gk.token_logprobs(logits[:0], targets[:0]).logprobs.shape == (0, 3, 2, 4)
    assert gk.token_logprobs(logits, targets.int()).entropy.shape == targets.shape


def test_errors_name_the_argument():
    case = make()
    loss, batch = gk.hybrid_loss_from_logits, case.batch
    with pytest.raises(ValueError, match=r"logits must have shape \(4, 9, V\) to match targets, got \(4, 9\)"):
        loss(case.logits[..., 0], batch, OBJECTIVE, 0.3)
    with pytest.raises(TypeError, match=r"logits must have dtype float16 or bfloat16 or float32 or float64, got int64"):
        loss(case.logits.long(), batch, OBJECTIVE, 0.3)
    with pytest.raises(ValueError, match="logits must have at least one column"):
        loss(case.logits[..., :0], batch, OBJECTIVE, 0.3)
    with pytest.raises(TypeError, match=r"logits must be a torch\.Tensor, got NoneType"):
        loss(None, batch, OBJECTIVE, 0.3)
    with pytest.raises(TypeError, match=r"transform must be a LogitTransform, .*got float"):
        loss(case.logits, batch, OBJECTIVE, 0.3, transform=0.7)
    with pytest.raises(ValueError, match=r"batch\.base_logits must be given"):
        loss(case.logits, batch, gk.HybridObjective(supervised=gk.GIFT()), 0.3)
    with pytest.raises(ValueError, match=r"mu must be finite and in \[0, 1\], got 2"):
        loss(case.logits, batch, OBJECTIVE, 2)
    live = batch.mask.nonzero()[0].tolist()
    for wrong in (37, -1, 2**40):
        batch.targets[tuple(live)] = wrong
        before = case.logits.clone()
        with pytest.raises(ValueError, match=r"batch\.targets must be in \[0, 37\) or -100, got"):
            loss(case.logits.requires_grad_(), batch, OBJECTIVE, 0.3, inplace=True)
        assert torch.equal(case.logits.detach().nan_to_num(), before.nan_to_num())
