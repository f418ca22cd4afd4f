"""The token-level loss of every objective against formulas written out by hand, on every backend that runs on a CPU."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import hypothesis
import hypothesis.strategies as st
import naive
import pytest
import torch
from support import POLICIES, Case, policy_name

import gac_kernels as gk
from gac_kernels import reference

AGGREGATIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")
# Lengths around the vector widths 8 and 16, an empty sequence, one token, more than one block.
LENGTHS = (5, 0, 16, 17, 1, 33, 8, 40)
EXPERT = (False, True, True, False, False, True, False, False)


def compare(case: Case, objective: gk.HybridObjective, mu: float, layout: str, *, denominators=None, rtol=1e-12):
    """Loss, parts, both gradients, rows and metrics of one call against the naive oracle."""
    batch, extra = getattr(case, layout)()
    if layout == "packed" and objective.norm_length is None:
        objective = gk.HybridObjective(**(vars(objective) | {"norm_length": case.T}))
    logprobs = extra["logprobs"].clone().requires_grad_()
    entropy = None if extra["entropy"] is None else extra["entropy"].clone().requires_grad_()
    given = None if denominators is None else gk.Denominators(*denominators)
    out = gk.hybrid_loss(logprobs, batch, objective, mu, entropy=entropy, sum_sq=extra["sum_sq"], denominators=given)
    out.loss.backward()
    want = naive.hybrid_loss(
        case.naive(), case.expert, case.groups, objective, mu, has_ref=case.ref is not None,
        has_sum_sq=case.sum_sq is not None, length=case.T, denominators=denominators or (None, None),
    )  # fmt: skip
    floor = rtol if case.dtype == torch.float64 else 1e-6

    def close(name, got, expected):
        expected = torch.as_tensor(expected, dtype=torch.float64).reshape(got.shape)
        torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=floor, msg=lambda m: f"{name}: {m}")

    for name, value in (
        ("policy", out.policy_loss),
        ("supervised", out.supervised_loss),
        ("kl", out.kl),
        ("entropy", out.entropy),
    ):
        close(name, value, getattr(want, name))
    close("loss", out.loss.detach(), want.loss)
    close("rows", out.signals.rows, want.rows)
    for name, value in out.metrics.items():
        close(name, value, want.metrics[name])
    live = torch.nonzero(batch.mask).tolist()
    keys = [tuple(k) for k in torch.nonzero(case.mask).tolist()]
    assert len(live) == len(keys)
    close("slope", logprobs.grad[batch.mask], [want.slope[k] for k in keys])
    if entropy is not None and objective.entropy_coef:
        close("entropy slope", entropy.grad[batch.mask], [want.entropy_slope.get(k, 0.0) for k in keys])
    assert logprobs.grad[~batch.mask].abs().sum() == 0, "a dead place received a gradient"
    assert out.logprobs[~batch.mask].abs().sum() == 0, "a dead place holds a log-prob"
    assert out.logprobs[batch.mask].equal(logprobs.detach()[batch.mask])
    return out


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_every_policy(backend, policy, layout):
    for token_advantages, old in itertools.product((False, True), (True, False)):
        case = Case(LENGTHS, EXPERT, seed=1, token_advantages=token_advantages, old=old)
        objective = gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        compare(case, objective, 0.3, layout)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_float32(backend, policy):
    """float32 within a few ulp of the float64 formulas on the same rounded inputs."""
    case = Case(LENGTHS, EXPERT, seed=2, dtype=torch.float32)
    compare(case, gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01), 0.25, "padded", rtol=4e-6)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl(backend, estimator, weighted):
    for policy in (gk.SAPO(), gk.GSPO(), gk.DFPO()):
        objective = gk.HybridObjective(policy, kl_coef=0.3, kl_estimator=estimator, kl_ratio_weighted=weighted)
        compare(Case(LENGTHS, EXPERT, seed=3), objective, 0.4, "padded")


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_kl_beyond_its_clamp(backend, estimator):
    """Log-ratios to the reference of up to 60: finite values, and no slope beyond 20."""
    objective = gk.HybridObjective(gk.GRPO(), kl_coef=0.3, kl_estimator=estimator)
    case = Case(LENGTHS, EXPERT, seed=3, spread=60.0)
    assert (case.ref - case.logp)[case.mask].abs().max() > 50
    compare(case, objective, 0.4, "padded")


@pytest.mark.parametrize("denominators", [None, (1000.0, 300.0), (1000.0, None)])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_aggregations(backend, aggregation, denominators):
    for supervised in AGGREGATIONS:
        objective = gk.HybridObjective(
            gk.GRPO(), gk.NLL("none"), aggregation=aggregation, supervised_aggregation=supervised, norm_length=50.0
        )
        compare(Case(LENGTHS, EXPERT, seed=4), objective, 0.6, "padded", denominators=denominators)


@pytest.mark.parametrize("absent", ["old", "ref", "rollout", "entropy", "sum_sq"])
def test_optional_inputs(backend, absent):
    for policy in (gk.SAPO(), gk.GRPO(), gk.GSPO(), gk.DFPO("adv_orthogonal")):
        compare(Case(LENGTHS, EXPERT, seed=5, **{absent: False}), gk.HybridObjective(policy), 0.5, "packed")


@hypothesis.given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=7),
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(POLICIES),
    spread=st.sampled_from([0.0, 0.01, 1.0, 4.0]),
    mu=st.floats(0, 1),
    layout=st.sampled_from(["padded", "packed"]),
)
@hypothesis.settings(max_examples=60, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_random_batches(backend, lengths, seed, policy, spread, mu, layout):
    expert = [(seed >> i) & 1 == 1 for i in range(len(lengths))]
    case = Case(lengths, expert, seed=seed, spread=spread)
    compare(case, gk.HybridObjective(policy, kl_coef=0.1), mu, layout, rtol=1e-10)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_written_slopes_equal_autograd(policy):
    """The reference gives its slopes in closed form; autograd through its values gives the same."""
    for old in (True, False):
        case = Case(LENGTHS, EXPERT, seed=16, old=old, spread=0.5)
        batch, extra = case.padded()
        objective = gk.HybridObjective(policy, kl_coef=0.3, entropy_coef=0.2, kl_ratio_weighted=True)
        leaf, entropy = extra["logprobs"].clone().requires_grad_(), extra["entropy"].clone().requires_grad_()
        reference.hybrid_loss(leaf, batch, objective, 0.3, entropy=entropy).loss.backward()
        _, slope, entropy_slope = reference.token_loss(
            extra["logprobs"], batch, objective, torch.tensor(0.3), entropy=extra["entropy"]
        )
        torch.testing.assert_close(slope.view_as(leaf), leaf.grad, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(entropy_slope.view_as(entropy), entropy.grad, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_gradcheck(backend, policy):
    """The slope is the derivative of the loss by finite differences, sequence coupling included.

    DFPO and CISPO stop the gradient through their weights, so for them finite differences see another function.
    """
    if isinstance(policy, (gk.DFPO, gk.CISPO)):
        policy = gk.SAPO() if isinstance(policy, gk.CISPO) else gk.GSPO(0.5, 0.5)
    case = Case((6, 3, 4), (False, True, False), seed=6, poison=False, spread=0.04)
    batch, extra = case.padded()
    objective = gk.HybridObjective(policy, gk.NLL("none"), kl_coef=0.2, entropy_coef=0.1, kl_ratio_weighted=True)

    def loss(logprobs, entropy):
        return gk.hybrid_loss(logprobs, batch, objective, 0.3, entropy=entropy).loss

    inputs = extra["logprobs"].requires_grad_(), extra["entropy"].requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-6, atol=1e-7)


def test_second_derivative_raises(backend):
    batch, extra = Case((6, 3), (False, True), poison=False).padded()
    logprobs = extra["logprobs"].requires_grad_()
    loss = gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.5).loss
    (grad,) = torch.autograd.grad(loss, logprobs, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        (grad.square().sum() + logprobs.sum()).backward()


@pytest.mark.parametrize("factor", [1.0, -2.5, 0.0])
def test_upstream_gradient_and_repeated_backward(backend, factor):
    batch, extra = Case((6, 3), (False, True), poison=False).padded()
    logprobs = extra["logprobs"].requires_grad_()
    loss = gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.5).loss
    (one,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    (scaled,) = torch.autograd.grad(loss * factor, logprobs, retain_graph=True)
    (again,) = torch.autograd.grad(loss, logprobs)
    assert scaled.equal(one * factor) and again.equal(one)


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_branches_without_tokens(backend, policy):
    """An empty branch, an empty batch and no sequence at all give a graph-connected 0 and finite everything else."""
    objective = gk.HybridObjective(policy)
    for lengths, expert in (((4, 3), (True, True)), ((4, 3), (False, False)), ((0, 0), (False, True)), ((), ())):
        case = Case(lengths, expert, seed=7, holes=False)
        for layout in ("padded", "packed"):
            out = compare(case, objective, 0.3, layout)
            assert out.loss.requires_grad and math.isfinite(out.loss.detach())
            assert all(torch.isfinite(v) for v in out.metrics.values())


def test_accumulated_micro_batches_equal_one_batch(backend):
    """With global denominators the micro-batches' losses, gradients and signals add up to those of one batch."""
    for aggregation in AGGREGATIONS:
        objective = gk.HybridObjective(aggregation=aggregation, supervised_aggregation=aggregation, norm_length=40.0)
        case = Case(LENGTHS, EXPERT, seed=8)
        batch, extra = case.padded()
        whole = extra["logprobs"].clone().requires_grad_()
        out = gk.hybrid_loss(whole, batch, objective, 0.3)
        out.loss.backward()
        live, expert = batch.mask.any(-1), torch.tensor(EXPERT)
        counts = [
            batch.mask[expert == e].sum() if aggregation == "token-mean" else live[expert == e].sum()
            for e in (False, True)
        ]
        total, signals, grads = 0.0, None, []
        for part in (slice(0, 3), slice(3, 4), slice(4, 8)):
            micro = gk.TokenBatch.from_padded(
                batch.targets[part], batch.mask[part], is_expert_S=batch.is_expert[part],
                advantages=batch.advantages[part], old_logprobs=batch.old_logprobs[part],
                ref_logprobs=batch.ref_logprobs[part], rollout_weights=batch.rollout_weights[part],
            )  # fmt: skip
            leaf = extra["logprobs"][part].clone().requires_grad_()
            piece = gk.hybrid_loss(leaf, micro, objective, 0.3, denominators=gk.Denominators(*map(float, counts)))
            piece.loss.backward()
            total = total + piece.loss.detach()
            grads.append(leaf.grad)
            signals = piece.signals if signals is None else signals + piece.signals
        torch.testing.assert_close(total, out.loss.detach(), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(torch.cat(grads), whole.grad, rtol=1e-12, atol=1e-14)
        assert signals.rows.equal(out.signals.rows)


def test_dead_rows_change_nothing(backend):
    """Fully masked sequences count nowhere: same loss with and without them."""
    case = Case((5, 9, 0, 0), (False, True, False, True), seed=9)
    batch, extra = case.padded()
    out = gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3)
    short = gk.TokenBatch.from_padded(
        batch.targets[:2], batch.mask[:2], is_expert_S=batch.is_expert[:2], advantages=batch.advantages[:2],
        old_logprobs=batch.old_logprobs[:2], ref_logprobs=batch.ref_logprobs[:2],
        rollout_weights=batch.rollout_weights[:2],
    )  # fmt: skip
    alone = gk.hybrid_loss(extra["logprobs"][:2], short, gk.HybridObjective(), 0.3)
    torch.testing.assert_close(out.loss, alone.loss, rtol=1e-15, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_group_of_one_has_no_residual(backend, dtype):
    """The orthogonal transform leaves a group of one nothing but rounding, which is no failure to cancel."""
    case = Case((5, 7, 4), (False, False, False), seed=17, dtype=dtype, groups=[0, 1, 2])
    batch, extra = case.padded()
    out = gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(gk.DFPO("adv_orthogonal")), 0.3)
    assert out.metrics["cancellation_residual"] == 0 and out.policy_loss.abs() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logprobs(backend, dtype):
    """bf16 and fp16 log-probs are computed in float32: as exact as their rounding, on-policy ratio exactly 1."""
    case = Case(LENGTHS, EXPERT, seed=10, dtype=dtype, ref=False, rollout=False, entropy=False, sum_sq=False)
    case.old = case.logp.clone()
    batch, extra = case.padded()
    logprobs = extra["logprobs"].requires_grad_()
    out = gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.3)
    out.loss.backward()
    assert out.loss.dtype == torch.float32 and logprobs.grad.dtype == dtype
    assert out.metrics["ratio_mean"] == 1.0 and out.metrics["ratio_max"] == 1.0
    wide = extra["logprobs"].detach().double().requires_grad_()
    want = gk.hybrid_loss(wide, batch, gk.HybridObjective(), 0.3)
    want.loss.backward()
    torch.testing.assert_close(out.loss.double(), want.loss, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logprobs.grad, wide.grad.to(dtype))


def test_infinite_logprob_on_a_live_token(backend):
    """-inf gives the objective's own loss and finite gradients; phi at p = 0 gives 0, not nan."""
    inf = float("-inf")
    targets, mask = torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2, dtype=torch.bool)
    expert = torch.tensor([False, False, True])
    for old in (None, torch.full((3, 2), -1.0, dtype=torch.float64)):
        batch = gk.TokenBatch.from_padded(
            targets, mask, is_expert_S=expert, advantages=torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64),
            old_logprobs=old, ref_logprobs=torch.full((3, 2), -2.0, dtype=torch.float64),
        )  # fmt: skip
        for policy in (gk.SAPO(), gk.GRPO(), gk.GSPO()):
            logprobs = torch.tensor([[inf, -1.0], [-1.0, inf], [inf, -0.5]], dtype=torch.float64, requires_grad=True)
            out = gk.hybrid_loss(logprobs, batch, gk.HybridObjective(policy, kl_coef=0.1), 0.5)
            out.loss.backward()
            assert torch.isfinite(out.loss) and torch.isfinite(logprobs.grad).all()
            assert logprobs.grad[0, 0] == 0 and logprobs.grad[2, 0] == 0
        logprobs = torch.tensor([[-1.0, -1.0], [-1.0, -1.0], [inf, -0.5]], dtype=torch.float64, requires_grad=True)
        out = gk.hybrid_loss(logprobs, batch, gk.HybridObjective(supervised=gk.NLL("none")), 0.5)
        out.loss.backward()
        assert out.supervised_loss == math.inf and torch.isfinite(logprobs.grad).all()


def test_live_nan_is_loud(backend):
    """A nan that the trainer made at a live token reaches the loss whatever the clamp; an engine's is left out."""
    for where in ("logp", "adv"):
        case = Case((4, 4), (False, False), seed=11, holes=False)
        batch, extra = case.padded()
        odd = getattr(case, where).clone()
        odd.view(-1)[1] = float("nan")
        logprobs = odd.view_as(extra["logprobs"]) if where == "logp" else extra["logprobs"]
        batch = replace(batch, advantages=odd) if where == "adv" else batch
        assert torch.isnan(gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.3).loss)


def test_rollouts_without_advantages_are_not_zero(backend):
    """On an accelerator the missing advantages of a rollout row cannot be seen by the host: they must show as nan."""
    batch, extra = Case((4,), (True,), seed=12, holes=False).padded()
    object.__setattr__(batch, "advantages", None)
    object.__setattr__(batch, "is_expert", torch.zeros(1, dtype=torch.bool))
    assert torch.isnan(gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3).loss)


def test_strided_inputs(backend):
    """Views with holes between rows give what their contiguous copies give."""
    case = Case(LENGTHS, EXPERT, seed=13)
    batch, extra = case.padded()
    want = gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3)
    wide = torch.full((case.S, 2 * case.T + 3), float("nan"), dtype=torch.float64)
    wide[:, 1 : 2 * case.T + 1 : 2] = extra["logprobs"]
    view = wide[:, 1 : 2 * case.T + 1 : 2]
    strided = gk.TokenBatch.from_padded(
        batch.targets.t().contiguous().t(), batch.mask.t().contiguous().t(), is_expert_S=batch.is_expert,
        advantages=batch.advantages, old_logprobs=batch.old_logprobs.t().contiguous().t(),
        ref_logprobs=batch.ref_logprobs, rollout_weights=batch.rollout_weights, groups=batch.groups,
    )  # fmt: skip
    assert gk.hybrid_loss(view, strided, gk.HybridObjective(), 0.3).loss.equal(want.loss)


def test_long_sequence(backend):
    """More than 65,535 tokens in a sequence."""
    case = Case((70_001, 3), (False, True), seed=14, dtype=torch.float64, holes=False, poison=False)
    compare(case, gk.HybridObjective(), 0.3, "packed", rtol=1e-9)


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GRPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_bitwise_repeatable(backend, policy):
    """The same bits over repeats, over thread counts, and for a sequence alone or in a batch."""
    case = Case(LENGTHS, (False,) * 8, seed=15, dtype=torch.float32, groups=[i // 2 for i in range(8)])
    batch, extra = case.padded()
    objective = gk.HybridObjective(policy)

    def run(logprobs, batch):
        leaf = logprobs.clone().requires_grad_()
        denominators = gk.Denominators(policy=8.0, supervised=1.0)
        out = gk.hybrid_loss(leaf, batch, objective, 0.3, denominators=denominators)
        out.loss.backward()
        return out.loss.detach(), leaf.grad, out.signals.rows

    want = run(extra["logprobs"], batch)
    threads = torch.get_num_threads()
    for repeat in range(250 if backend == "cpu" else 3):
        torch.set_num_threads(1 + repeat % 2)
        got = run(extra["logprobs"], batch)
        assert all(g.equal(w) for g, w in zip(got, want, strict=True))
    torch.set_num_threads(threads)
    if isinstance(policy, gk.DFPO):
        return  # its sequences are coupled through their groups
    alone = gk.TokenBatch.from_padded(
        batch.targets[3:4], batch.mask[3:4], advantages=batch.advantages[3:4], old_logprobs=batch.old_logprobs[3:4],
        ref_logprobs=batch.ref_logprobs[3:4], rollout_weights=batch.rollout_weights[3:4],
    )  # fmt: skip
    _, grad, rows = run(extra["logprobs"][3:4], alone)
    if backend == "cpu":
        assert grad.equal(want[1][3:4]) and rows.equal(want[2][3:4])
    else:
        torch.testing.assert_close(rows, want[2][3:4])
