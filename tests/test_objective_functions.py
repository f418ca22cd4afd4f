"""Objectives that are functions of a token: this package's and the user's own, by every way into a loss.

The formulas that they are held to are written out in plain Python, value and slope, from the papers.
"""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass, replace

import pytest
import torch
from own_objectives import MyGRPO, MyGSPO, MyPhi, MySAPO
from support import Case

import gac_kernels as gk

LENGTHS, EXPERT = [5, 1, 4, 0, 3, 6], [False, False, False, False, True, True]


# The formulas of one sequence: losses and slopes of its tokens ------------------------------------------------------
def dppo(o, logp, old, adv):
    out = []
    for lp, ol, a in zip(logp, old, adv, strict=True):
        p, q = math.exp(lp), math.exp(ol)
        if o.divergence == "tv":
            allowed = p - q <= o.high if a > 0 else p - q >= -o.low
        else:
            split = q * (ol - lp) + (1 - q) * math.log((1 - q + 1e-8) / (1 - p + 1e-8))
            allowed = (split <= o.high or p <= q) if a > 0 else (split <= o.low or p >= q)
        weight = min(math.exp(lp - ol), o.ratio_cap) if allowed else 0.0
        out.append((-a * weight * lp, -a * weight))
    return out


def gmpo(o, logp, old, adv):
    kept, passes = [], []
    for lp, ol, a in zip(logp, old, adv, strict=True):
        x, s = lp - ol, (a > 0) - (a < 0)
        clamped = min(max(x, -o.clip_low), o.clip_high)
        kept.append(s * min(s * x, s * clamped))
        passes.append(s * x <= s * clamped and s != 0)
    mean = math.exp(sum(kept) / len(kept))
    pull = sum(-a * mean for a in adv) / len(adv)
    return [(-a * mean, pull if p else 0.0) for a, p in zip(adv, passes, strict=True)]


def vespo(o, logp, old, adv):
    log_w = min(max(sum(lp - ol for lp, ol in zip(logp, old, strict=True)), math.log(1e-8)), 20.0)
    out = []
    for lp, a in zip(logp, adv, strict=True):
        k, lam = (o.k_pos, o.lambda_pos) if a >= 0 else (o.k_neg, o.lambda_neg)
        phi = math.exp(lam + k * log_w - lam * math.exp(log_w))
        out.append((-phi * a * lp, -phi * a))
    return out


def dro(o, logp, old, adv):
    rows = zip(logp, old, adv, strict=True)
    return [(-(a * lp - o.beta / 2 * (lp - ol) ** 2), -(a - o.beta * (lp - ol))) for lp, ol, a in rows]


def reinforce(o, logp, old, adv):
    return [(-a * lp, -a) for lp, a in zip(logp, adv, strict=True)]


def gspo_token(o, logp, old, adv):
    s = math.exp(sum(lp - ol for lp, ol in zip(logp, old, strict=True)) / len(logp))
    clipped = min(max(s, 1 - o.clip_low), 1 + o.clip_high)
    rows = [(min(s * a, clipped * a), s * a <= clipped * a) for a in adv]
    return [(-value, -a * s if passes else 0.0) for (value, passes), a in zip(rows, adv, strict=True)]


POLICIES = [
    (gk.DPPO("tv", 0.02, 0.03), dppo), (gk.DPPO("kl", 0.001, 0.002), dppo), (gk.DPPO("tv", 1, 1, 1.1), dppo),
    (gk.GMPO(0.1, 0.15), gmpo), (gk.VESPO(), vespo), (gk.VESPO(0.5, 1.5, 1.0, 0.7), vespo), (gk.DRO(0.3), dro),
    (gk.REINFORCE(), reinforce), (gk.GSPO(0.02, 0.03, token=True), gspo_token),
]  # fmt: skip


def dft(logp, entropy):
    return -math.exp(logp) * logp, -math.exp(logp)


def srft(logp, entropy):
    return -0.5 * math.exp(-entropy) * logp, -0.5 * math.exp(-entropy)


def luffy(logp, entropy, gamma=0.1):
    p = math.exp(logp)
    return -p / (p + gamma), -gamma * p / (p + gamma) ** 2


SUPERVISED = [(gk.NLL("p"), dft), (gk.NLL("entropy"), srft), (gk.LUFFY(), luffy)]


def expected(case, objective, policy, supervised, mu, logp, entropy):
    """Loss and slopes ``(S, T)`` of ``seq-mean-token-mean`` and ``token-mean``, in plain Python."""
    slopes = torch.zeros(case.S, case.T, dtype=torch.float64)
    live = [[t for t in range(case.T) if case.mask[s, t]] for s in range(case.S)]
    rollouts = [s for s in range(case.S) if live[s] and not case.expert[s]]
    demonstrations = sum(len(live[s]) for s in range(case.S) if case.expert[s])
    loss = 0.0
    for s in range(case.S):
        if not live[s]:
            continue
        lps, adv = [logp[s, t].item() for t in live[s]], [case.adv[s].item()] * len(live[s])
        if case.expert[s]:
            terms = [supervised(lp, entropy[s, t].item()) for lp, t in zip(lps, live[s], strict=True)]
            weight = mu / demonstrations
        else:
            terms = policy(objective.policy, lps, [case.old[s, t].item() for t in live[s]], adv)
            weight = (1 - mu) / (len(rollouts) * len(live[s]))
        for t, (value, slope) in zip(live[s], terms, strict=True):
            loss += weight * value
            slopes[s, t] = weight * slope
    return loss, slopes


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(("policy", "formula"), POLICIES, ids=[str(p).replace(" ", "") for p, _ in POLICIES])
def test_policies_from_log_probs(policy, formula, layout):
    case = Case(LENGTHS, EXPERT, seed=3, rollout=False, ref=False)
    objective = gk.HybridObjective(policy, gk.LUFFY())
    loss, slopes = expected(case, objective, formula, luffy, 0.3, case.logp, case.entropy)
    batch, extra = getattr(case, layout)()
    logprobs = extra["logprobs"].clone().requires_grad_()
    for context in (gk.use_backend("reference"), None):
        logprobs.grad = None
        if context is None:
            out = gk.hybrid_loss(logprobs, batch, objective, 0.3)
        else:
            with context:
                out = gk.hybrid_loss(logprobs, batch, objective, 0.3)
        out.loss.backward()
        torch.testing.assert_close(out.loss.item(), loss, rtol=1e-12, atol=1e-14)
        want = slopes if layout == "padded" else slopes[torch.arange(case.T)[None] < torch.tensor(LENGTHS)[:, None]]
        torch.testing.assert_close(logprobs.grad, want, rtol=1e-11, atol=1e-14)


class Head:
    """Hidden states and a head whose log-probs are a case's own, near enough to its old ones."""

    def __init__(self, dtype=torch.float64):
        g = torch.Generator().manual_seed(5)
        self.case = Case(LENGTHS, EXPERT, seed=5, ref=False, rollout=False, poison=False)
        V, H = 11, 6
        self.case.targets = torch.randint(0, V, self.case.targets.shape, generator=g)
        self.hidden = torch.randn(*self.case.targets.shape, H, generator=g, dtype=torch.float64).to(dtype)
        self.weight = (torch.randn(V, H, generator=g, dtype=torch.float64) / 2).to(dtype)
        z = self.hidden.double() @ self.weight.double().T
        self.logp, self.entropy = self.of(z)
        noise = 0.2 * torch.randn(self.logp.shape, generator=g, dtype=torch.float64)
        self.case.old = (self.logp + noise).clamp(max=-1e-3)

    def of(self, z):
        log_p = torch.log_softmax(z, -1)
        chosen = log_p.gather(-1, self.case.targets[..., None])[..., 0]
        return chosen, -(log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize(("supervised", "term"), SUPERVISED, ids=[str(s).replace(" ", "") for s, _ in SUPERVISED])
@pytest.mark.parametrize(("policy", "formula"), POLICIES[::2], ids=[type(p).__name__ for p, _ in POLICIES[::2]])
def test_from_logits_and_from_hidden_states(policy, formula, supervised, term):
    head, mu = Head(), 0.4
    objective = gk.HybridObjective(policy, supervised)
    loss, slopes = expected(head.case, objective, formula, term, mu, head.logp, head.entropy)
    h, w = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
    z = h @ w.T
    z.retain_grad()
    head.of(z)[0].backward(torch.where(head.case.mask, slopes, 0.0))
    batch = head.case.padded()[0]
    for how in ("logits", "in place", "hidden", "hidden, chunks"):
        a, b = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_()
        if how.startswith("hidden"):
            out = gk.hybrid_loss_from_hidden(a, b, batch, objective, mu, chunk_tokens=5 if "chunks" in how else None)
        else:
            out = gk.hybrid_loss_from_logits(a @ b.T, batch, objective, mu, inplace=how == "in place")
        out.loss.backward()
        torch.testing.assert_close(out.loss.item(), loss, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(a.grad, h.grad, rtol=1e-10, atol=1e-14, msg=lambda m, how=how: f"{how}: {m}")
        torch.testing.assert_close(b.grad, w.grad, rtol=1e-10, atol=1e-14, msg=lambda m, how=how: f"{how}: {m}")


# A user's own, beside the same objective by name ---------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize(
    ("mine", "named"),
    [
        (MySAPO(2.0, 3.0), gk.SAPO("sigmoid", 2.0, 3.0)), (MyGRPO(0.1, 0.15), gk.GRPO(0.1, 0.15)),
        (MyGRPO(0.1, 0.1, 1.2), gk.GRPO(0.1, 0.1, 1.2)), (MyGSPO(), gk.GSPO(0.05, 0.05)),
    ],
    ids=lambda o: str(o).replace(" ", ""),
)  # fmt: skip
def test_a_users_own_equals_the_same_by_name(mine, named, layout):
    """Weights of rollouts, a KL penalty, an entropy bonus, signals and metrics included."""
    case = Case(LENGTHS, EXPERT, seed=7)
    batch, extra = getattr(case, layout)()
    results = []
    for policy, supervised in ((mine, MyPhi()), (named, gk.NLL("phi"))):
        objective = gk.HybridObjective(policy, supervised, kl_coef=0.1, entropy_coef=0.02)
        lp, entropy = (extra[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
        out = gk.hybrid_loss(lp, batch, objective, 0.3, entropy=entropy, sum_sq=extra["sum_sq"])
        out.loss.backward()
        names = ("effective_update_ratio", *(["clip_fraction"] if "clip_fraction" in out.metrics else []))
        results.append((out.loss, lp.grad, entropy.grad, out.signals.rows, *(out.metrics[name] for name in names)))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Mixed(gk.PolicyObjective):
    """A token's own slope and two sums, one of them of squares; a weighted sum through a logarithm."""

    c: float = 0.5

    def loss(self, t):
        s, v = torch.exp(t.sequence_mean(t.log_ratio)), t.sequence_sum(torch.square(t.log_ratio))
        return -t.advantage * t.ratio * torch.tanh(s) + self.c * t.p * v + torch.log(1 + v) * t.ratio_minus_one


def test_gradients_through_sums_and_rollout_weights_are_autograds():
    case = Case([4, 6, 2], [False] * 3, seed=11, ref=False, token_advantages=True)
    batch, extra = case.padded()
    lp = extra["logprobs"].clone().requires_grad_()
    out = gk.hybrid_loss(lp, batch, gk.HybridObjective(Mixed()), 0.0)
    out.loss.backward()
    leaf = torch.where(case.mask, case.logp, 0.0).requires_grad_()
    old, weight, adv = (torch.where(case.mask, x, 0.0) for x in (case.old, case.rollout, case.adv))
    x = torch.where(case.mask, leaf - old, 0.0)
    count = case.mask.sum(1, keepdim=True)
    s, v = torch.exp(x.sum(1, keepdim=True) / count), x.square().sum(1, keepdim=True)
    loss = -adv * x.exp() * torch.tanh(s) + 0.5 * leaf.exp() * v + torch.log(1 + v) * (x.exp() - 1)
    total = (torch.where(case.mask, weight * loss, 0.0) / count / case.S).sum()
    total.backward()
    torch.testing.assert_close(out.loss, total.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(lp.grad, leaf.grad, rtol=1e-11, atol=1e-13)


@dataclass(frozen=True)
class Given(gk.PolicyObjective):
    """A value whose slope is not its derivative."""

    scale: float = 3.0

    def loss(self, t):
        return gk.with_slope(-t.advantage * t.ratio, -self.scale * t.advantage) * 2


def test_with_slope():
    case = Case([3, 2], [False, False], ref=False, rollout=False)
    batch, extra = case.padded()
    lp = extra["logprobs"].clone().requires_grad_()
    out = gk.hybrid_loss(lp, batch, gk.HybridObjective(Given(), aggregation="seq-mean-token-sum"), 0.0)
    out.loss.backward()
    want = torch.where(case.mask, (-2 * 3.0 * case.adv)[:, None].expand(case.S, case.T) / 2, 0.0)
    torch.testing.assert_close(lp.grad, want, rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match=r"inside of an objective's loss\(t\)"):
        gk.with_slope(torch.ones(3), torch.ones(3))


def test_masked_tokens_never_leak():
    """They hold nan and infinities here; a function may make any number of them."""
    case = Case(LENGTHS, EXPERT, seed=2, ref=False)
    batch, extra = case.padded()
    for policy in (gk.DPPO("kl"), gk.GMPO(), gk.VESPO(), Mixed()):
        lp = extra["logprobs"].clone().requires_grad_()
        out = gk.hybrid_loss(lp, batch, gk.HybridObjective(policy, gk.LUFFY()), 0.5)
        out.loss.backward()
        assert bool(out.loss.isfinite()) and bool(lp.grad.isfinite().all()) and not bool(lp.grad[~case.mask].any())


def test_on_policy_and_impossible_tokens():
    """Without old log-probs the ratio is 1 and the gradient still flows; a log-prob of -inf has a finite gradient."""
    targets, mask = torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.bool)
    batch = gk.TokenBatch.from_padded(targets, mask, advantages=torch.tensor([1.0, -1.0]))
    lp = torch.full((2, 3), -0.7, requires_grad=True)
    out = gk.hybrid_loss(lp, batch, gk.HybridObjective(MySAPO()), 0.0)
    out.loss.backward()
    torch.testing.assert_close(lp.grad, torch.tensor([-1.0, 1.0])[:, None].expand(2, 3) / 6)
    lp = torch.tensor([[-0.5, -math.inf, -0.2]] * 2, requires_grad=True)
    expert = replace(batch, is_expert=torch.tensor([True, False]), old_logprobs=torch.full((2, 3), -0.7))
    for supervised in (gk.NLL("p"), gk.LUFFY()):
        out = gk.hybrid_loss(lp, expert, gk.HybridObjective(MySAPO(), supervised), 0.5)
        (gradient,) = torch.autograd.grad(out.loss, lp)
        assert bool(out.loss.isfinite()) and bool(gradient.isfinite().all())


def test_compiles_without_a_graph_break():
    case = Case(LENGTHS, EXPERT, ref=False, dtype=torch.float32)
    batch, extra = case.padded()
    for policy in (gk.DPPO(), gk.GMPO(), MySAPO()):
        objective = gk.HybridObjective(policy, gk.NLL("p"))
        compiled = torch.compile(
            lambda x, o=objective: gk.hybrid_loss(x, batch, o, 0.3).loss, fullgraph=True, backend="eager"
        )
        results = []
        for f in (compiled, lambda x, o=objective: gk.hybrid_loss(x, batch, o, 0.3).loss):
            lp = extra["logprobs"].clone().requires_grad_()
            f(lp).backward()
            results.append(lp.grad)
        assert torch.equal(*results)


def test_one_second_derivative_is_refused_and_state_is_kept_out_of_copies():
    objective = gk.HybridObjective(gk.GMPO(), gk.NLL("p"))
    again = pickle.loads(pickle.dumps(objective))
    assert again == objective and again.policy_term is objective.policy_term
    assert gk.HybridObjective(**vars(objective)) == objective
    lp = torch.full((1, 2), -0.5, requires_grad=True)
    batch = gk.TokenBatch.from_padded(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), advantages=torch.ones(1))
    (gradient,) = torch.autograd.grad(gk.hybrid_loss(lp, batch, objective, 0.0).loss, lp, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_kernels_by_name_do_not_claim_a_function():
    batch = gk.TokenBatch.from_padded(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), advantages=torch.ones(1))
    with gk.use_backend("cpu"), pytest.raises(ValueError, match="functions of a token"):
        gk.hybrid_loss(-torch.ones(1, 2), batch, gk.HybridObjective(gk.DRO()), 0.0)
