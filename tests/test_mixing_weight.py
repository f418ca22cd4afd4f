"""mu as a number or a tensor: 1 - mu is made of what was given, not of what rounding has left of it."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import gac_kernels as gk

S, T, V = 4, 64, 5
NUMBERS = (0.0, 0.1, 0.97, 0.999, 0.9999, 1.0 - 2.0**-24, 1e-9)
OBJECTIVE = gk.HybridObjective(
    gk.GRPO(), gk.NLL("none"), aggregation="seq-mean-token-sum", supervised_aggregation="token-mean"
)


def batch(T: int = T) -> gk.TokenBatch:
    expert = torch.tensor([False, True, False, True])
    targets = torch.zeros(S, T, dtype=torch.long)
    return gk.TokenBatch.from_padded(targets, torch.ones(S, T), is_expert_S=expert, advantages=torch.ones(S))


def close(got: torch.Tensor, want: float) -> None:
    assert abs(float(got) - want) <= 1e-6 + 4 * 2.0**-23 * abs(want), f"{float(got)} for {want}"


@pytest.mark.parametrize("mu", NUMBERS)
def test_the_loss_has_the_digits_of_mu(every_backend, mu):
    """Log-probs of -1: the policy's loss is -T a sequence, for the ratio is 1; the supervised one 1. Both branches'
    slopes have the relative precision of float32 too."""
    logprobs = torch.full((S, T), -1.0, requires_grad=True)
    for given in (mu, torch.tensor(mu, dtype=torch.float64)):
        logprobs.grad = None
        out = gk.hybrid_loss(logprobs, batch(), OBJECTIVE, given)
        out.loss.backward()
        close(out.loss.detach(), (1.0 - mu) * -T + mu * 1.0)
        want = torch.tensor([-(1.0 - mu) / 2, -mu / (2 * T)], dtype=torch.float64)
        torch.testing.assert_close(logprobs.grad[:2, 0].double(), want, rtol=2.0**-23, atol=0)


def test_the_losses_of_logits_and_of_hidden_states_too(every_backend):
    """V equal logits: a target's gradient is its slope times 1 - 1 / V."""
    mu, T = 0.9999, 2
    logits = torch.zeros(S, T, V, requires_grad=True)
    out = gk.hybrid_loss_from_logits(logits, batch(T), OBJECTIVE, mu)
    out.loss.backward()
    hidden, head = torch.zeros(S, T, 3, requires_grad=True), torch.zeros(V, 3)
    bias = torch.zeros(V, requires_grad=True)
    other = gk.hybrid_loss_from_hidden(hidden, head, batch(T), OBJECTIVE, mu, bias=bias)
    other.loss.backward()
    for loss in (out.loss, other.loss):
        close(loss.detach(), (1.0 - mu) * -T + mu * torch.tensor(float(V)).log().item())
    slopes = torch.tensor([-(1.0 - mu) / 2, -mu / (2 * T)], dtype=torch.float64)
    torch.testing.assert_close(logits.grad[:2, 0, 0].double(), slopes * (1 - 1 / V), rtol=4e-7, atol=0)
    torch.testing.assert_close(bias.grad[0].double(), slopes.sum() * 2 * T * (1 - 1 / V), rtol=4e-6, atol=0)


def test_a_tensor_of_the_losses_dtype_is_handed_on():
    from gac_kernels.ops import inputs

    mu = torch.tensor(0.3)
    assert inputs.mixing(mu, torch.zeros(1)) is mu
    assert inputs.mixing(torch.tensor(0.3, dtype=torch.bfloat16), torch.zeros(1)).shape == ()
    assert inputs.mixing(0.3, torch.zeros(1, dtype=torch.float64)).shape == ()
    with pytest.raises(ValueError, match=r"mu must be finite and in \[0, 1\], got 1.5"):
        inputs.mixing(1.5, torch.zeros(1))


def test_a_new_number_compiles_nothing_after_the_second():
    counter, given = CompileCounter(), batch()
    loss = torch.compile(lambda x, mu: gk.hybrid_loss(x, given, OBJECTIVE, mu).loss, backend=counter, fullgraph=True)
    for mu in (0.5, 0.9, 0.97, 0.99, 0.999):
        close(loss(torch.full((S, T), -1.0), mu), (1.0 - mu) * -T + mu)
    assert counter.frame_count <= 2
