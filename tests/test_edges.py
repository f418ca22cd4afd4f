"""Edges where a peer was seen to fail, one small test each, on every backend that runs here."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import POLICIES, policy_name

import gac_kernels as gk
from gac_kernels import controller_schema, library


def a_batch(**changes) -> gk.TokenBatch:
    """Two rollouts of 4 tokens and a demonstration, near ratio 1 and not at it."""
    given = {
        "is_expert_S": torch.tensor([False, False, True]),
        "advantages": torch.tensor([0.0, 1.5, 0.0]),
        "old_logprobs": torch.full((3, 4), -1.12),
        "groups": torch.tensor([7, 7, 8]),
    } | changes
    return gk.TokenBatch.from_padded(torch.zeros(3, 4, dtype=torch.long), torch.ones(3, 4), **given)


def gradient(batch, objective, mu=0.5, logprobs=None):
    leaf = (torch.full((3, 4), -1.1) if logprobs is None else logprobs).requires_grad_()
    out = gk.hybrid_loss(leaf, batch, objective, mu)
    out.loss.backward()
    return out, leaf.grad


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_an_advantage_of_zero_gives_exactly_nothing(every_backend, policy):
    """Not the small number that a gate's own value leaves: no loss, no slope, and the same bits of its neighbours."""
    objective = gk.HybridObjective(policy, aggregation="seq-mean-token-mean")
    out, grad = gradient(a_batch(advantages=torch.zeros(3)), objective, mu=0.0)
    assert out.loss == 0.0 and out.policy_loss == 0.0
    assert not grad.any()
    if not isinstance(policy, gk.DFPO):  # whose weights are those of a whole group
        _, grad = gradient(a_batch(), objective, mu=0.0)
        assert not grad[0].any() and grad[1].all()


def test_phi_is_a_weight_and_has_no_gradient(every_backend):
    """d/dlogp of -phi logp is -phi with phi = p (1 - p) held fixed; its own derivative would add to it."""
    logprobs = torch.log(torch.tensor([0.9, 0.5, 0.1, 0.001])).expand(3, 4).clone()
    p = logprobs[2].exp().double()
    _, grad = gradient(a_batch(), gk.HybridObjective(supervised=gk.NLL("phi")), 1.0, logprobs)
    torch.testing.assert_close(grad[2].double(), -p * (1 - p) / 4, rtol=1e-6, atol=0)
    assert not grad[:2].any()


@pytest.mark.parametrize("length", [1, 4])
def test_one_temperature_for_one_sequence(every_backend, length):
    """A tensor of one, spread over the tokens without a copy, has stride 0."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, length, 9, generator=generator)
    batch = gk.TokenBatch.from_padded(
        torch.zeros(1, length, dtype=torch.long), torch.ones(1, length), advantages=torch.ones(1)
    )
    found = []
    for temperature in (0.7, torch.tensor([0.7])):
        transform = gk.LogitTransform(temperature=temperature)
        leaf = logits.clone().requires_grad_()
        out = gk.hybrid_loss_from_logits(leaf, batch, gk.HybridObjective(), 0.0, transform=transform)
        out.loss.backward()
        alone = gk.token_logprobs(logits, batch.targets, transform=transform).logprobs
        found.append((out.loss, leaf.grad, alone))
    for number, tensor in zip(*found, strict=True):
        torch.testing.assert_close(tensor, number, rtol=1e-6, atol=1e-7)


def test_a_packed_sequence_does_not_see_the_next(every_backend):
    """Whatever the sequences around it hold, nan included: the bits of its results stay."""
    generator = torch.Generator().manual_seed(0)
    V, cu = 33, torch.tensor([0, 5, 11, 15])
    logits, targets = torch.randn(15, V, generator=generator), torch.randint(0, V, (15,), generator=generator)
    given = {"is_expert_S": torch.tensor([False, False, True]), "advantages": torch.tensor([1.0, -0.5, 0.0])}
    batch = gk.TokenBatch.from_packed(targets, cu, old_logprobs=torch.full((15,), -3.0), **given)
    counts = gk.Denominators(policy=1.0, supervised=1.0)

    def inside(logits, batch):
        leaf = logits.clone().requires_grad_()
        out = gk.hybrid_loss_from_logits(leaf, batch, gk.HybridObjective(gk.GSPO()), 0.5, denominators=counts)
        out.loss.backward()
        return out.logprobs[5:11], out.signals.rows[1], leaf.grad[5:11]

    want = inside(logits, batch)
    around = torch.ones(15, dtype=torch.bool)
    around[5:11] = False
    changed = torch.where(around[:, None], torch.randn(15, V, generator=generator) * 9, logits)
    others = torch.where(around, (targets + 3) % V, targets)
    nan = torch.where(around, torch.nan, batch.old_logprobs)
    for got in (
        inside(changed, replace(batch, targets=others)),
        inside(torch.where(around[:, None], torch.nan, logits), replace(batch, old_logprobs=nan)),
    ):
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))


def test_the_controllers_operator_refreshes_by_the_count_in_its_state(every_backend):
    """As a replayed CUDA graph needs it: the host does not say which step it is."""
    if every_backend == "triton":
        pytest.skip("Triton has no such operator")
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=3))
    seen = controller._seen(gk.Signals(torch.rand(6, 12, generator=torch.Generator().manual_seed(0)) + 0.5), None)
    for step in range(7):
        state = controller._state.clone()
        state[controller_schema.STEPS] = step
        after, _ = library.call("controller_step", state, *seen)
        assert bool(after[controller_schema.MEASURED].any()) == (step % 3 == 0), step
        assert after[controller_schema.STEPS] == step + 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("forced", ["triton", "cuda"])
def test_inputs_on_a_device_that_is_not_the_current_one(forced):
    results = []
    for device in ("cuda:0", "cuda:1"):
        leaf = torch.linspace(-4, 4, 3 * 4 * 65, device=device).view(3, 4, 65).requires_grad_()
        batch = gk.TokenBatch.from_padded(
            torch.ones(3, 4, dtype=torch.long, device=device),
            torch.ones(3, 4, device=device),
            advantages=torch.tensor([1.0, -1.0, 0.5], device=device),
        )
        with torch.cuda.device(0), gk.use_backend(forced):
            gk.hybrid_loss_from_logits(leaf, batch, gk.HybridObjective(), 0.0).loss.backward()
        results.append(leaf.grad.cpu())
    assert results[0].equal(results[1])
