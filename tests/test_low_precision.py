"""float16 and a loss scale: a gradient is what float64 says, times what comes from above, rounded once."""

from __future__ import annotations

import pytest
import torch

import gac_kernels as gk
from gac_kernels import products

S, T, H, V = 6, 5, 12, 40
TINY, HALF_ULP = 2.0**-25, 2.0**-11  # of float16: half its smallest step, and half of its relative one
POLICIES = {"SAPO": gk.SAPO(), "GRPO": gk.GRPO(), "GSPO": gk.GSPO(), "DFPO": gk.DFPO()}


def inputs(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, weight and bias whose values float16 holds."""
    g = torch.Generator().manual_seed(seed)
    parts = torch.randn(S, T, H, generator=g), 0.3 * torch.randn(V, H, generator=g), torch.randn(V, generator=g)
    return tuple(part.half().float() for part in parts)


def batch(advantages: float = 1.0, rollout: float | None = None, **given) -> gk.TokenBatch:
    g = torch.Generator().manual_seed(1)
    mask = torch.rand(S, T, generator=g) > 0.2
    mask[:, 0] = True
    weights = None if rollout is None else torch.full((S, T), rollout)
    return gk.TokenBatch.from_padded(
        torch.randint(0, V, (S, T), generator=g), mask, is_expert_S=torch.arange(S) % 3 == 1,
        advantages=advantages * torch.randn(S, generator=g), old_logprobs=-3 - torch.rand(S, T, generator=g),
        rollout_weights=weights, groups=torch.arange(S) // 2, **given,
    )  # fmt: skip


def step(tensors, b, objective, mu, scale, **options):
    """Gradients of the loss times ``scale``, and the result; ``tensors`` are hidden states, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = gk.hybrid_loss_from_hidden(*leaves[:2], b, objective, mu, bias=leaves[2], chunk_tokens=16, **options)
    (out.loss * scale).backward()
    return [leaf.grad for leaf in leaves], out


def exact(b, objective, mu, scale, **options):
    return step([tensor.double() for tensor in inputs()], b, objective, mu, scale, **options)


def rounded_once(got, want, scale=1.0) -> None:
    """float16's rounding of the right value; sums in float32 are off by some 1e-6 of their largest terms."""
    want = want * scale
    noise = 4e-6 * want.abs().amax()
    assert got.dtype is torch.float16 and got.isfinite().all()
    assert ((got.double() - want).abs() <= HALF_ULP * want.abs() + TINY + noise).all()


@pytest.mark.parametrize("scale", [1.0, 1024.0, 65536.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_the_counts_and_the_scale(policy, scale):
    """From hidden states and from logits; 1e8 tokens a step leave a gradient of 1e-9, which a scale brings back."""
    objective = gk.HybridObjective(POLICIES[policy], aggregation="token-mean", entropy_coef=0.01)
    for counts in (30.0, 1e5, 1e6, 1e8):
        given = {"denominators": gk.Denominators(counts, counts)}
        want, _ = exact(batch(), objective, 0.3, scale, **given)
        got, _ = step([tensor.half() for tensor in inputs()], batch(), objective, 0.3, scale, **given)
        for gradient, true in zip(got, want, strict=True):
            rounded_once(gradient, true)

        logits = (inputs()[0] @ inputs()[1].T).half()
        leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
        for value in (leaf, wide):
            (gk.hybrid_loss_from_logits(value, batch(), objective, 0.3, **given).loss * scale).backward()
        rounded_once(leaf.grad, wide.grad)


@pytest.mark.parametrize("aggregation", ["seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"])
def test_aggregations_and_gift(aggregation):
    objective = gk.HybridObjective(
        gk.SAPO(), gk.GIFT(3.0), aggregation=aggregation, supervised_aggregation=aggregation, kl_coef=0.1
    )
    g = torch.Generator().manual_seed(5)
    b = batch(base_logits=torch.randn(S, T, V, generator=g), ref_logprobs=-3 - torch.rand(S, T, generator=g))
    given = {"denominators": gk.Denominators(1e6, 1e6), "transform": gk.LogitTransform(torch.linspace(0.5, 2, S))}
    want, _ = exact(b, objective, 0.3, 65536.0, **given)
    got, _ = step([tensor.half() for tensor in inputs()], b, objective, 0.3, 65536.0, **given)
    for gradient, true in zip(got, want, strict=True):
        rounded_once(gradient, true)


RANGES = {
    "large advantages": ({"advantages": 1e4}, 0.3), "small advantages": ({"advantages": 1e-6}, 0.0),
    "small rollout weights": ({"rollout": 1e-7}, 0.0), "no advantage": ({"advantages": 0.0}, 0.3),
    "mu near 0": ({}, 1e-7), "mu near 1": ({}, 1.0 - 1e-7),
}  # fmt: skip


@pytest.mark.parametrize("case", RANGES)
def test_ranges(case):
    """What is large does not overflow, what is small does not vanish beside it, and the sequences' mean gradients, of
    which the hidden estimator is made, are right in both branches."""
    (made, mu), counts = RANGES[case], {"denominators": gk.Denominators(1e6, 1e6)}
    objective = gk.HybridObjective(gk.SAPO(), aggregation="token-mean")
    scale = 1.0 if made.get("advantages", 0) > 1e3 else 65536.0
    want, true = exact(batch(**made), objective, mu, scale, **counts)
    got, out = step([tensor.half() for tensor in inputs()], batch(**made), objective, mu, scale, **counts)
    for gradient, value in zip(got, want, strict=True):
        rounded_once(gradient, value)
    live = ~true.signals.hidden.isnan()
    error = torch.where(live, out.signals.hidden.double() - true.signals.hidden, 0.0).abs().amax(-1)
    assert live.equal(~out.signals.hidden.isnan())
    assert (error <= 1e-4 * torch.where(live, true.signals.hidden, 0.0).abs().amax(-1)).all()


def test_the_hidden_estimator_sees_what_float64_sees():
    """At 1e6 tokens a step the sums of float16 gradients were zeros, and mu* 1/2."""
    objective = gk.HybridObjective(gk.GRPO(), aggregation="token-mean")
    counts = {"denominators": gk.Denominators(1e6, 1e6)}
    seen = []
    for dtype in (torch.float16, torch.float64):
        _, out = step([tensor.to(dtype) for tensor in inputs()], batch(), objective, 0.3, 1.0, **counts)
        config = gk.ControllerConfig(estimator="hidden", update_every=1, prior=None)
        controller = gk.GuidedAdaptiveController(config)
        controller.observe(out.signals)
        controller.step()
        seen.append(controller.metrics()["gac/mu_star"])
    assert abs(float(seen[0]) - float(seen[1])) < 1e-4


def test_weights_in_float32_under_autocast():
    """The usual recipe: gradients in float32 that never were float16, not even where float16 would be infinite."""
    objective = gk.HybridObjective(gk.SAPO(), aggregation="token-mean")
    for scale, counts in ((65536.0, 1e6), (65536.0, 30.0)):
        b, given = batch(advantages=1e4), {"denominators": gk.Denominators(counts, counts)}
        want, _ = exact(b, objective, 0.3, scale, **given)
        with torch.autocast("cpu", torch.float16):
            got, _ = step(inputs(), b, objective, 0.3, scale, **given)
            leaves = [tensor.clone().requires_grad_() for tensor in inputs()]
            made = gk.token_logprobs_from_hidden(*leaves[:2], b.targets, bias=leaves[2], mask=b.mask)
            loss = gk.hybrid_loss(made.logprobs, b, objective, 0.3, **given).loss * scale
        loss.backward()
        for gradient, other, true in zip(got, [leaf.grad for leaf in leaves], want, strict=True):
            assert gradient.dtype is torch.float32
            bound = {"rtol": 1e-4, "atol": 1e-5 * float(true.abs().max())}
            torch.testing.assert_close(gradient.double(), true, **bound)
            torch.testing.assert_close(other.double(), true, **bound)


def test_a_head_in_float32_beside_hidden_states_in_float16():
    """As autocast's own layers leave them; each gradient in the dtype of its own, a frozen head's not made."""
    hidden, weight, bias = inputs()
    objective, given = gk.HybridObjective(aggregation="token-mean"), {"denominators": gk.Denominators(1e6, 1e6)}
    want, _ = exact(batch(), objective, 0.3, 65536.0, **given)
    for frozen in (False, True):
        leaf, head = hidden.half().requires_grad_(), weight.clone().requires_grad_(not frozen)
        with torch.autocast("cpu", torch.float16):
            out = gk.hybrid_loss_from_hidden(leaf, head, batch(), objective, 0.3, bias=bias, **given)
        (out.loss * 65536.0).backward()
        rounded_once(leaf.grad, want[0])
        assert frozen or head.grad.dtype is torch.float32
        assert not frozen or head.grad is None


@pytest.mark.parametrize("policy", ["SAPO", "GSPO"])
def test_products_of_float16(monkeypatch, policy):
    """As on a GPU, where the gradient of a chunk's logits is float16: in its unit nothing vanishes, and neither sums
    nor products are rounded. Slopes of one batch that are 2^40 apart are both there."""
    monkeypatch.setattr(products, "products_in_float32", lambda device, dtype: False)
    objective = gk.HybridObjective(POLICIES[policy], aggregation="token-mean", entropy_coef=0.01)
    for mu in (0.3, 1e-6):
        given = {"denominators": gk.Denominators(1e6, 1e6)}
        want, true = exact(batch(), objective, mu, 65536.0, **given)
        got, out = step([tensor.half() for tensor in inputs()], batch(), objective, mu, 65536.0, **given)
        for gradient, value in zip(got, want, strict=True):
            assert (gradient.double() - value).norm() <= 2e-3 * value.norm()
        error = (out.signals.hidden.double() - true.signals.hidden).norm(dim=-1)
        assert (error <= 2e-3 * true.signals.hidden.norm(dim=-1)).all()


@pytest.mark.parametrize("policy", ["SAPO", "DFPO"])
def test_logits_in_place(every_backend, policy):
    """The gradient takes their place in backward, and is the one that a new tensor gets; it is handed on once."""
    objective = gk.HybridObjective(POLICIES[policy], aggregation="token-mean")
    logits = (inputs()[0] @ inputs()[1].T).half()[:2]
    part = {name: getattr(batch(), name)[:2] for name in ("targets", "mask", "is_expert", "advantages", "groups")}
    b, counts = gk.TokenBatch(cu_seqlens=None, **part), gk.Denominators(1e6, 1e6)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with gk.use_backend("reference"):
        (gk.hybrid_loss_from_logits(wide, b, objective, 0.3, denominators=counts).loss * 65536.0).backward()
    own = leaf * 1.0
    out = gk.hybrid_loss_from_logits(own, b, objective, 0.3, inplace=True, denominators=counts)
    assert own.equal(logits)
    (out.loss * 65536.0).backward(retain_graph=True)
    rounded_once(leaf.grad, wide.grad)
    assert own.detach().equal(leaf.grad)
    with pytest.raises(RuntimeError, match="second backward"):
        out.loss.backward()
    again = logits.clone().requires_grad_()
    loss = gk.hybrid_loss_from_logits(again, b, objective, 0.3, denominators=counts).loss
    for scale in (65536.0, 1024.0):
        (gradient,) = torch.autograd.grad(loss * scale, again, retain_graph=True)
        rounded_once(gradient, wide.grad * (scale / 65536.0))


def test_under_torch_compile():
    objective, given = gk.HybridObjective(aggregation="token-mean"), gk.Denominators(1e6, 1e6)
    b, (hidden, weight, _) = batch(), inputs()

    def loss(h, w):
        made = gk.hybrid_loss_from_hidden(h, w, b, objective, 0.3, denominators=given).loss
        return made + gk.hybrid_loss_from_logits(h @ w.T, b, objective, 0.3, denominators=given).loss

    gradients = []
    for function in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True)):
        leaves = hidden.half().requires_grad_(), weight.half().requires_grad_()
        (function(*leaves) * 65536.0).backward()
        gradients.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=2e-3, atol=1e-4)
        assert eager.ne(0).any()
