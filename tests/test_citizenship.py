"""The operators as citizens of torch: opcheck, fullgraph compilation without recompiles, autocast, no host reads."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._dynamo.testing
from support import Case

import gac_kernels as gk
from gac_kernels import library, ops

OBJECTIVES = [
    gk.HybridObjective(kl_coef=0.1, entropy_coef=0.05),
    gk.HybridObjective(gk.GRPO(delta=1.5), gk.NLL("none"), aggregation="token-mean"),
    gk.HybridObjective(gk.GSPO()),
    gk.HybridObjective(gk.DFPO("adv_orthogonal")),
]


def operator_args(case: Case, objective: gk.HybridObjective, layout: str):
    """The flat arguments that `hybrid_loss` hands to the operator."""
    batch, extra = getattr(case, layout)()
    captured = []
    original = library.call
    try:
        library.call = lambda name, *args: captured.append(args) or original(name, *args)
        gk.hybrid_loss(extra["logprobs"], batch, objective, 0.3, entropy=extra["entropy"], sum_sq=extra["sum_sq"])
    finally:
        library.call = original
    return captured[0]


@pytest.mark.parametrize("form", ["token_loss", "token_loss_reference"])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.policy).__name__)
def test_opcheck(objective, layout, form):
    for dtype in (torch.float32, torch.float64):
        case = Case(
            (5, 0, 9), (False, True, False), seed=61, dtype=dtype, poison=False, entropy=objective.entropy_coef > 0
        )
        args = operator_args(case, objective, layout)
        torch.library.opcheck(getattr(torch.ops.gac_kernels, form).default, args)


def test_compiles_without_a_graph_break():
    """Loss and gradient under `fullgraph=True` equal eager's, and a tensor mu that changes compiles nothing anew."""
    case = Case((5, 3, 9), (False, True, False), seed=62, poison=False)
    batch, extra = case.padded()
    objective = gk.HybridObjective(kl_coef=0.1)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(logprobs, mu):
        out = gk.hybrid_loss(logprobs * 1.0, batch, objective, mu)
        return out.loss, out.kl, out.signals.rows

    for mu in (torch.tensor(0.3), torch.tensor(0.7)):
        leaf, plain = extra["logprobs"].clone().requires_grad_(), extra["logprobs"].clone().requires_grad_()
        compiled = loss(leaf, mu)
        compiled[0].backward()
        out = gk.hybrid_loss(plain, batch, objective, mu)
        out.loss.backward()
        assert compiled[0].equal(out.loss) and leaf.grad.equal(plain.grad)
        assert compiled[1].equal(out.kl) and compiled[2].equal(out.signals.rows)
    assert counter.frame_count == 1


@pytest.mark.parametrize("made", ["logprobs", "logits", "hidden", "signals"])
def test_a_new_length_compiles_nothing_after_the_second(made):
    """The padded length is a size like others to a compiler: once it has seen two it takes any."""
    torch.compiler.reset()  # what was compiled for the others counts towards the same limit
    objective, mu, weight = gk.HybridObjective(), torch.tensor(0.3), torch.randn(17, 6)
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(value, targets, mask, advantages):
        batch = gk.TokenBatch.from_padded(targets, mask, advantages=advantages)
        if made == "logprobs":
            return gk.hybrid_loss(value, batch, objective, mu).loss
        if made == "logits":
            return gk.hybrid_loss_from_logits(value, batch, objective, mu).loss
        if made == "hidden":
            return gk.hybrid_loss_from_hidden(value, weight, batch, objective, mu).loss
        return gk.signals_from_logprobs(value, batch).rows

    for S, T in ((4, 3), (4, 5), (4, 9), (5, 7), (3, 11), (6, 2)):
        shape = {"logits": (S, T, 17), "hidden": (S, T, 6)}.get(made, (S, T))
        given = -torch.rand(shape), torch.zeros(S, T, dtype=torch.long), torch.ones(S, T).bool(), torch.randn(S)
        assert loss(*given).isfinite().all()
    assert counter.frame_count <= 3, counter.frame_count  # static, any T, any S and T


def test_batches_are_built_inside_a_compiled_function():
    """Checks that look at values are left out there, as on an accelerator."""

    @torch.compile(backend="eager", fullgraph=True)
    def loss(logprobs, cu_seqlens, is_expert):
        targets = torch.zeros_like(logprobs, dtype=torch.long)
        packed = gk.TokenBatch.from_packed(targets, cu_seqlens, is_expert_S=is_expert, mask_N=torch.ones_like(logprobs))
        return gk.hybrid_loss(logprobs, packed, OBJECTIVES[1], 1.0).loss

    found = loss(torch.full((7,), -2.0), torch.tensor([0, 3, 7]), torch.tensor([True, True]))
    torch.testing.assert_close(found, torch.tensor(2.0))


def test_autocast_changes_nothing():
    case = Case((5, 3), (False, True), seed=63, dtype=torch.float32, poison=False)
    batch, extra = case.padded()
    plain = gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3)
    assert mixed.loss.equal(plain.loss) and mixed.loss.dtype == torch.float32


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.policy).__name__)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_host_reads_nothing(objective, backend):
    """Meta tensors hold no data: whatever reads one raises. Batch, loss, backward and signals all go through,
    by the fake of the operator and by the reference itself."""
    tokens = {name: torch.zeros(24, device="meta") for name in ("old_logprobs", "ref_logprobs", "rollout_weights")}
    batch = gk.TokenBatch.from_packed(
        torch.zeros(24, dtype=torch.long, device="meta"), torch.zeros(5, dtype=torch.long, device="meta"),
        is_expert_S=torch.zeros(4, dtype=torch.bool, device="meta"), advantages=torch.zeros(4, device="meta"),
        groups=torch.zeros(4, dtype=torch.long, device="meta"), **tokens,
    )  # fmt: skip
    logprobs = torch.zeros(24, device="meta", requires_grad=True)
    entropy = torch.zeros(24, device="meta", requires_grad=True)
    with gk.use_backend(backend) if backend else contextlib.nullcontext():
        out = gk.hybrid_loss(logprobs, batch, objective, 0.3, entropy=entropy, sum_sq=entropy.detach())
    out.loss.backward()
    assert logprobs.grad.shape == (24,) and out.loss.shape == out.kl.shape == ()
    assert (out.signals + out.signals).rows.shape == (8, 12)


def test_needs_no_gradient():
    """Without a gradient to compute, and for an entropy that carries none, nothing is attached."""
    batch, extra = Case((5, 3), (False, True), seed=65, poison=False).padded()
    assert not gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(), 0.3).loss.requires_grad
    out = gk.hybrid_loss(
        extra["logprobs"], batch, gk.HybridObjective(entropy_coef=0.1), 0.3, entropy=extra["entropy"].requires_grad_()
    )
    out.loss.backward()
    assert extra["entropy"].grad.ne(0).any()
    assert ops.hybrid_loss is gk.hybrid_loss
