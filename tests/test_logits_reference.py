"""Log-probs, transforms and GIFT from logits, against formulas written out with `math` and mpmath-free float64."""

from __future__ import annotations

import math

import pytest
import torch
from support import Case

import gac_kernels as gk
from gac_kernels import reference

V = 11


def rows(count=6, seed=0, scale=3.0):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(count, V, generator=g, dtype=torch.float64), torch.randint(0, V, (count,), generator=g)


def by_hand(logits, target, *, scale=1.0, cap=None, temperature=1.0):
    z = [scale * x for x in logits]
    z = [x if cap is None else cap * math.tanh(x / cap) for x in z]
    z = [x / temperature for x in z]
    m = max(z)
    total = sum(math.exp(x - m) for x in z)
    p = [math.exp(x - m) / total for x in z]
    logp = z[target] - m - math.log(total)
    entropy = -sum(q * (x - m - math.log(total)) for q, x in zip(p, z, strict=True) if q > 0)
    return logp, entropy, sum(q * q for q in p)


@pytest.mark.parametrize(
    "transform",
    [{}, {"temperature": 0.7}, {"cap": 2.0}, {"scale": 0.25}, {"scale": 2.0, "cap": 3.0, "temperature": 1.3}],
)
def test_token_logprobs(transform):
    logits, targets = rows()
    keywords = {{"cap": "softcap"}.get(k, k): v for k, v in transform.items()}
    out = gk.token_logprobs(logits, targets, transform=gk.LogitTransform(**keywords))
    want = [by_hand(row.tolist(), int(y), **transform) for row, y in zip(logits, targets, strict=True)]
    for got, column in zip((out.logprobs, out.entropy, out.sum_sq), zip(*want, strict=True), strict=True):
        torch.testing.assert_close(got, torch.tensor(column, dtype=torch.float64), rtol=1e-12, atol=1e-13)


def test_temperature_per_sequence_and_gradients():
    logits, targets = rows(6)
    logits, targets = logits.view(2, 3, V), targets.view(2, 3)
    warm = torch.tensor([0.5, 2.0], dtype=torch.float64)
    out = gk.token_logprobs(logits, targets, transform=gk.LogitTransform(temperature=warm))
    for s in range(2):
        alone = gk.token_logprobs(logits[s], targets[s], transform=gk.LogitTransform(temperature=float(warm[s])))
        torch.testing.assert_close(out.logprobs[s], alone.logprobs)

    def values(z):
        got = gk.token_logprobs(z, targets, transform=gk.LogitTransform(temperature=0.7, softcap=2.5, scale=0.5))
        assert not got.sum_sq.requires_grad
        return got.logprobs, got.entropy

    assert torch.autograd.gradcheck(values, logits.requires_grad_())


def test_masked_rows_are_selected_before_arithmetic():
    logits, targets = rows(4)
    logits[1], logits[2] = float("nan"), float("inf")
    targets[3] = -100
    logits.requires_grad_()
    out = gk.token_logprobs(logits, targets, mask=torch.tensor([True, False, False, True]))
    assert out.logprobs[1:].eq(0).all() and out.entropy[1:].eq(0).all() and out.sum_sq[1:].eq(0).all()
    (out.logprobs.sum() + out.entropy.sum()).backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[1:].eq(0).all()


def test_infinite_logits():
    """One -inf logit, all but one -inf, and a -inf target: entropy stays finite, logp is -inf where it must."""
    logits = torch.full((3, V), -math.inf, dtype=torch.float64)
    logits[0, :4] = 0.0
    logits[1, 2] = 5.0
    logits[2, 0] = 1.0
    out = gk.token_logprobs(logits, torch.tensor([1, 2, 3]))
    torch.testing.assert_close(out.entropy, torch.tensor([math.log(4.0), 0.0, 0.0], dtype=torch.float64))
    assert out.logprobs[1] == 0.0 and out.logprobs[2] == -math.inf
    torch.testing.assert_close(out.sum_sq, torch.tensor([0.25, 1.0, 1.0], dtype=torch.float64))


def test_errors():
    logits, targets = rows(3)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 11\) or -100, got 0 to 11"):
        gk.token_logprobs(logits, torch.tensor([0, 1, 11]))
    with pytest.raises(ValueError, match=r"logits must have shape \(3, V\)"):
        gk.token_logprobs(logits[None], targets)
    with pytest.raises(ValueError, match="mask must have the targets' shape"):
        gk.token_logprobs(logits, targets, mask=torch.ones(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="outputs must be among"):
        gk.token_logprobs(logits, targets, outputs=("logp",))
    assert gk.token_logprobs(logits, targets, outputs=("logprobs",)).entropy is None


@pytest.mark.parametrize(("beta", "smooth"), [(0.0, 0.0), (1.5, 0.0), (20.0, 0.0), (5.0, 0.3), (2.0, 1.0)])
def test_gift_closed_form(beta, smooth):
    """SPEC's closed form for the loss, and p - q for its gradient."""
    (logits, targets), (base, _) = rows(5, 1), rows(5, 2)
    logits.requires_grad_()
    loss = reference.gift_loss(logits, base, targets, gk.GIFT(beta, smooth))
    loss.sum().backward()
    p0 = (1 - smooth) * torch.softmax(base, -1) + smooth / V
    for i, y in enumerate(targets.tolist()):
        d = 1.0 + float(p0[i, y]) * math.expm1(beta)
        q = [float(p0[i, k]) * (math.exp(beta) if k == y else 1.0) / d for k in range(V)]
        z = logits[i].tolist()
        lse = math.log(sum(math.exp(x) for x in z))
        assert math.isclose(float(loss[i].detach()), lse - sum(a * b for a, b in zip(q, z, strict=True)), rel_tol=1e-11)
        want = torch.softmax(logits[i].detach(), -1) - torch.tensor(q, dtype=torch.float64)
        torch.testing.assert_close(logits.grad[i], want, rtol=1e-9, atol=1e-12)


def test_gift_limits_and_small_probabilities():
    """beta = 0 distils the base; a large beta is plain SFT; beta = 20 with p0_y = 1e-12 has the ratio e^20 1e-12."""
    (logits, targets), (base, _) = rows(5, 3), rows(5, 4)
    log_p = torch.log_softmax(logits, -1)
    distil = reference.gift_loss(logits, base, targets, gk.GIFT(0.0))
    torch.testing.assert_close(distil, -(torch.softmax(base, -1) * log_p).sum(-1))
    plain = reference.gift_loss(logits, base, targets, gk.GIFT(200.0))
    torch.testing.assert_close(plain, -log_p.gather(-1, targets[:, None])[:, 0])
    base = torch.zeros(1, 2, dtype=torch.float64)
    base[0, 0] = math.log(1e-12)
    logits = torch.tensor([[0.3, -0.2]], dtype=torch.float64)
    odds = 1e-12 * math.exp(20.0)
    q = odds / (1.0 + odds)
    lp = torch.log_softmax(logits, -1)[0]
    got = reference.gift_loss(logits, base, torch.tensor([0]), gk.GIFT(20.0))
    torch.testing.assert_close(got[0], -(q * lp[0] + (1 - q) * lp[1]), rtol=1e-12, atol=0)


def test_gift_in_the_hybrid_loss():
    """The supervised branch takes the GIFT term, the policy branch is what it is from log-probs."""
    case = Case((4, 6), (False, True), seed=51, ref=False, rollout=False, poison=False)
    g = torch.Generator().manual_seed(5)
    shape = (*case.targets.shape, V)
    logits, base = (torch.randn(shape, generator=g, dtype=torch.float64) for _ in range(2))
    batch = gk.TokenBatch.from_padded(
        case.targets % V, case.mask, is_expert_S=torch.tensor([False, True]), advantages=case.adv, base_logits=base
    )
    gift = gk.GIFT(3.0, 0.1)
    out = reference.hybrid_loss_from_logits(logits.requires_grad_(), batch, gk.HybridObjective(supervised=gift), 0.4)
    live = case.mask[1]
    want = reference.gift_loss(logits[1][live], base[1][live], batch.targets[1][live], gift).mean()
    torch.testing.assert_close(out.supervised_loss, want.detach())
    plain = reference.hybrid_loss_from_logits(logits, batch, gk.HybridObjective(), 0.4)
    torch.testing.assert_close(out.policy_loss, plain.policy_loss)
    out.loss.backward()
    assert logits.grad[~case.mask].eq(0).all() and logits.grad[case.mask].ne(0).any()


@pytest.mark.parametrize("smooth", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("floor", [1e-10, 1e-3])
def test_gift_with_the_floor_of_its_published_code(every_backend, floor, smooth):
    """zzy1127/GIFT (fsdp_gift_trainer.py) takes ``log(p0 + 1e-10)``, the paper ``log p0``: a token to which the
    base model gives 7e-13 has q = 4.6 % at beta = 20, and 0.03 % by the paper. The paper's is the default; the floor is
    an option, from logits and from hidden states."""
    count, beta, g = 5, 20.0, torch.Generator().manual_seed(1)
    base = 4.0 * torch.randn(1, count, V, generator=g, dtype=torch.float64)
    targets = torch.randint(V, (1, count), generator=g)
    base.scatter_(-1, targets[..., None], -28.0)
    student = torch.randn(1, count, V, generator=g, dtype=torch.float64)
    p0 = (1 - smooth) * base.softmax(-1) + smooth / V
    z = torch.log(p0 + floor) + beta * torch.zeros_like(base).scatter_(-1, targets[..., None], 1.0)
    q = z.softmax(-1)
    for dtype, rtol in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        if dtype == torch.float64 and every_backend == "triton":
            rtol = 1e-10
        leaf = student.to(dtype, copy=True).requires_grad_()
        objective = gk.HybridObjective(
            supervised=gk.GIFT(beta, smooth, floor=floor), supervised_aggregation="token-mean"
        )
        batch = gk.TokenBatch.from_padded(
            targets, torch.ones(1, count), is_expert_S=torch.ones(1, dtype=torch.bool), base_logits=base.to(dtype)
        )
        want = -(q * student.log_softmax(-1)).sum(-1).mean()
        gradient = (student.softmax(-1) - q) / count
        out = gk.hybrid_loss_from_logits(leaf, batch, objective, 1.0)
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), want, rtol=rtol, atol=0)
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=10 * rtol, atol=1e-7 if rtol > 1e-9 else 1e-12)
        hidden, weight = student.to(dtype, copy=True).requires_grad_(), torch.eye(V, dtype=dtype)
        out = gk.hybrid_loss_from_hidden(hidden, weight, batch, objective, 1.0, chunk_tokens=2)
        out.loss.backward()
        torch.testing.assert_close(out.loss.double(), want, rtol=rtol, atol=0)
        torch.testing.assert_close(hidden.grad.double(), gradient, rtol=10 * rtol, atol=1e-7 if rtol > 1e-9 else 1e-12)


def test_the_papers_gift_has_no_floor():
    """The published program's numbers: q of the target by either, and which is ours."""
    base = torch.zeros(1, 1, 1000, dtype=torch.float64)
    base[..., 0] = -28.0 + math.log(999)  # p0 of the target: 7e-13
    batch = gk.TokenBatch.from_padded(
        torch.zeros(1, 1, dtype=torch.long),
        torch.ones(1, 1),
        is_expert_S=torch.ones(1, dtype=torch.bool),
        base_logits=base,
    )
    for floor, want in ((0.0, 3.35e-4), (1e-10, 0.0465)):
        student = torch.zeros(1, 1, 1000, dtype=torch.float64, requires_grad=True)
        objective = gk.HybridObjective(supervised=gk.GIFT(20.0, floor=floor))
        gk.hybrid_loss_from_logits(student, batch, objective, 1.0).loss.backward()
        assert math.isclose(0.001 - float(student.grad[0, 0, 0]), want, rel_tol=5e-3)
    with pytest.raises(ValueError, match="floor"):
        gk.GIFT(floor=-1e-10)
