"""Weights of tokens, and what engines could not score: against formulas written out here in float64, everywhere."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bad_input import S, T, V

import gac_kernels as gk

NAN, INF = float("nan"), float("inf")
MU, KL, BONUS = 0.3, 0.2, 0.1
POLICIES = {"grpo": gk.GRPO(), "cispo": gk.CISPO(1.1), "gspo": gk.GSPO(0.5, 0.5), "dfpo": gk.DFPO()}
EXPERT = torch.tensor([False, True, False])
MASK = torch.ones(S, T, dtype=torch.bool)
MASK[0, 3:] = False


def numbers(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    old = -0.5 - torch.rand(S, T, generator=g)
    return {
        "advantages": torch.tensor([0.7, 0.0, -0.4]), "old_logprobs": old, "groups": torch.tensor([0, 1, 0]),
        "ref_logprobs": old + 0.2 * torch.randn(S, T, generator=g),
        "rollout_weights": 0.5 + torch.rand(S, T, generator=g), "token_weights": torch.rand(S, T, generator=g),
    }  # fmt: skip


def batch_of(targets: torch.Tensor | None = None, **given: torch.Tensor) -> gk.TokenBatch:
    targets = torch.zeros(S, T, dtype=torch.long) if targets is None else targets
    return gk.TokenBatch.from_padded(targets, MASK, is_expert_S=EXPERT, **given)


def formula(name: str, logp, entropy, given, phi: bool, known=None, kl_coef=KL, bonus=BONUS):
    """The loss in float64; tokens outside ``known`` have no RL term, and log-ratio 0 in their sequence."""
    given = {k: v.double() for k, v in given.items()}
    known = torch.ones(S, T, dtype=torch.bool) if known is None else known
    rollout = given.get("rollout_weights", torch.ones(S, T).double())
    own = given.get("token_weights", torch.ones(S, T).double())
    A, total = given["advantages"][:, None], 0.0
    ratio = torch.where(known, logp - given["old_logprobs"].nan_to_num(0, 0, 0), 0.0)
    n = MASK.sum(1, keepdim=True)
    s = (torch.where(MASK, ratio, 0.0).sum(1, keepdim=True) / n).exp()
    if name == "dfpo":
        w = s.detach()[~EXPERT].min()  # of the one group
        loss = -w * A * logp
    elif name == "cispo":
        loss = -ratio.exp().clamp(max=1.1).detach() * A * logp
    else:
        r, low, high = (s, 0.5, 0.5) if name == "gspo" else (ratio.exp(), 0.2, 0.2)
        loss = -torch.minimum(r * A, r.clamp(1 - low, 1 + high) * A)
    d = given["ref_logprobs"].nan_to_num(0, 0, 0) - logp
    policy = torch.where(known, rollout.nan_to_num(0, 0, 0) * loss + kl_coef * (d.exp() - d - 1) - bonus * entropy, 0.0)
    p = logp.detach().exp()
    supervised = -(p * (1 - p) if phi else 1.0) * logp * rollout.nan_to_num(0, 0, 0)
    for expert, value in ((False, policy), (True, supervised)):
        live = MASK & (EXPERT[:, None] == expert)
        weight = (MU if expert else 1 - MU) / (live.sum() if expert else 2 * n)
        total = total + torch.where(live, weight * own * value, 0.0).sum()
    return total


def objective_of(name: str, phi: bool, kl_coef=KL, bonus=BONUS) -> gk.HybridObjective:
    return gk.HybridObjective(POLICIES[name], gk.NLL("phi" if phi else "none"), kl_coef=kl_coef, entropy_coef=bonus)


def check(name, phi, given, batch, known=None, kl_coef=KL, bonus=BONUS, also=True) -> gk.HybridLoss:
    """Of log-probs, of logits and of hidden states."""
    g = torch.Generator().manual_seed(5)
    hidden, weight = torch.randn(S, T, 8, generator=g), torch.randn(V, 8, generator=g) / 2
    h, w = hidden.double().requires_grad_(), weight.double()
    log_p = torch.log_softmax(h @ w.T, -1)
    logp, entropy = log_p[..., 0], -(log_p.exp() * log_p).sum(-1)
    want = formula(name, logp, entropy, given, phi, known, kl_coef, bonus)
    (gradient,) = torch.autograd.grad(want, h, retain_graph=True)
    of_logp, _ = torch.autograd.grad(want, (logp, entropy), allow_unused=True)
    objective = objective_of(name, phi, kl_coef, bonus)
    ours = logp.detach().float().requires_grad_()
    out = gk.hybrid_loss(ours, batch, objective, MU, entropy=entropy.detach().float())
    out.loss.backward()
    torch.testing.assert_close(out.loss.double(), want.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.double(), of_logp, rtol=1e-5, atol=1e-6)
    leaf = hidden.clone().requires_grad_()
    for loss in (
        (
            lambda: gk.hybrid_loss_from_logits(leaf @ weight.T, batch, objective, MU).loss,
            lambda: gk.hybrid_loss_from_hidden(leaf, weight, batch, objective, MU, chunk_tokens=4).loss,
        )
        if also
        else ()
    ):
        leaf.grad = None
        value = loss()
        value.backward()
        torch.testing.assert_close(value.double(), want.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(leaf.grad.double(), gradient, rtol=2e-5, atol=2e-6)
    return out


@pytest.mark.parametrize("phi", [False, True])
@pytest.mark.parametrize("name", POLICIES)
def test_weights_scale_terms_and_not_counts(every_backend, name, phi):
    given = numbers()
    check(name, phi, given, batch_of(**given))
    only = {k: v for k, v in given.items() if k != "token_weights"}
    out = check(name, phi, only, batch_of(**only))
    slope = -out.logprobs.exp() * (1 - out.logprobs.exp()) if phi else -torch.ones(S, T)
    torch.testing.assert_close(out.signals.rows[1, 5], (slope * only["rollout_weights"])[1].sum())  # c_s as applied


@pytest.mark.parametrize("name", ["old_logprobs", "ref_logprobs", "rollout_weights"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_was_not_scored_has_no_term_where_nobody_looks(every_backend, policy, name):
    given = {k: v for k, v in numbers().items() if k != "token_weights"}
    good = batch_of(**given)
    for value in (NAN, INF, -INF):
        odd = given[name].clone()
        odd[0, 1], odd[2, 3], odd[0, 4] = value, value, value  # the last is masked
        known = torch.ones(S, T, dtype=torch.bool)
        known[0, 1] = known[2, 3] = False
        batch = replace(good, **{name: odd})
        out = check(policy, False, given | {name: odd}, batch, known, also=value != INF)
        assert out.metrics["rollout_unscored"] == 2
        leaf = out.logprobs.clone().requires_grad_()
        gk.hybrid_loss(leaf, batch, objective_of(policy, False, bonus=0.0), MU).loss.backward()
        assert leaf.grad[0, 1] == 0 and leaf.grad[2, 3] == 0
    assert check(policy, False, given, good).metrics["rollout_unscored"] == 0


@pytest.mark.parametrize("name", ["advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "token_weights"])
def test_values_are_refused_where_looking_is_free(name):
    given = numbers()
    values = [NAN, INF, -INF, *([-0.5] if "weights" in name else [])]
    for value in values:
        odd = given[name].clone()
        odd[(0, 1)[: odd.ndim]] = value
        with pytest.raises(ValueError, match=rf"{name} must be finite .* got {value:g} at \[0, \d\]"):
            batch_of(**given | {name: odd})
        for place in ((0, 4), (1, 2)):  # masked; a demonstration, whose weights are read
            odd = given[name].clone()
            if odd.ndim == 2 and not (place[0] == 1 and "weights" in name):
                odd[place] = value
                batch_of(**given | {name: odd})


def test_one_weight_a_sequence():
    given, w = numbers(), torch.tensor([0.5, 2.0, 0.0])
    offsets, flat = torch.tensor([0, 3, 8, 13]), {k: v[MASK] for k, v in numbers().items() if v.ndim == 2}
    for name in ("rollout_weights", "token_weights"):
        want = check("grpo", False, given | {name: w[:, None].expand(S, T)}, batch_of(**given | {name: w})).loss
        assert (
            check("grpo", False, given | {name: w[:, None].expand(S, T)}, batch_of(**given | {name: w[:, None]})).loss
            == want
        )
        rest = flat | {"advantages": given["advantages"], "groups": given["groups"]}
        logp = torch.linspace(-2, -0.1, 13)
        by_token = rest | {name: w.repeat_interleave(torch.tensor([3, 5, 5]))}
        targets = torch.zeros(13, dtype=torch.long)
        losses = []
        for value in (w, w[:, None], by_token[name]):
            batch = gk.TokenBatch.from_packed(targets, offsets, is_expert_S=EXPERT, **rest | {name: value})
            losses.append(gk.hybrid_loss(logp, batch, gk.HybridObjective(), MU).loss.item())
        assert losses[0] == losses[1] == losses[2]
