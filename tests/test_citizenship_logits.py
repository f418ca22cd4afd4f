"""The row operators and the losses from logits as citizens of torch: opcheck, compile, autocast, meta, modules."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch._dynamo.testing
from logit_support import make, run

import gac_kernels as gk
from gac_kernels import library, reference, schemas

OBJECTIVES = [
    gk.HybridObjective(kl_coef=0.1, entropy_coef=0.05),
    gk.HybridObjective(gk.GRPO(delta=1.5), gk.GIFT(2.0, 0.1), aggregation="token-mean"),
    gk.HybridObjective(gk.GSPO(), gk.GIFT(2.0)),
]
DFPO = gk.HybridObjective(gk.DFPO())


def calls_of(case, objective, **options):
    """Every operator call of one loss, backward included: name -> arguments as they were before the call."""
    seen, original = {}, library.call

    def record(name, *args):
        seen[name] = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
        return original(name, *args)

    try:
        library.call = record
        run(gk.hybrid_loss_from_logits, case, objective, 0.3, **options)
        leaf = case.logits.clone().requires_grad_()
        gk.token_logprobs(leaf, case.batch.targets, mask=case.batch.mask).logprobs.sum().backward()
    finally:
        library.call = original
    return seen


@pytest.mark.parametrize("form", ["", "_reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.policy).__name__)
def test_opcheck(objective, dtype, form):
    case = make(dtype=dtype, base=True, poison=False)
    seen = calls_of(case, objective) | calls_of(case, objective, inplace=True)
    for name, args in seen.items():
        operator = getattr(torch.ops.gac_kernels, name + form).default
        args = tuple(a.clone() if isinstance(a, torch.Tensor) else a for a in args)
        torch.library.opcheck(operator, args)


# What no loss calls; test_cuda_controller, test_cuda_advantages and test_gradient_moments check them.
OTHERS = {"controller_step", "group_advantages", "gradient_moments", "accumulate_moments_"}


def test_every_operator_is_checked():
    cases = [calls_of(make(base=True), o, inplace=i) for o in OBJECTIVES for i in (False, True)]
    assert set().union(*cases) | OTHERS == set(schemas.SCHEMAS)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda o: type(o.policy).__name__)
def test_compiles_without_a_graph_break(objective, inplace):
    """Loss and gradient under `fullgraph=True` are eager's; a tensor mu that changes compiles nothing anew."""
    case = make(base=True, poison=False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss(logits, mu):
        out = gk.hybrid_loss_from_logits(logits * 1.0, case.batch, objective, mu, inplace=inplace)
        return out.loss, out.token_entropy, out.signals.rows

    for mu in (torch.tensor(0.3), torch.tensor(0.7)):
        leaf, plain = case.logits.clone().requires_grad_(), case.logits.clone().requires_grad_()
        compiled = loss(leaf, mu)
        compiled[0].backward()
        out = gk.hybrid_loss_from_logits(plain, case.batch, objective, mu)
        out.loss.backward()
        assert compiled[0].equal(out.loss) and leaf.grad.equal(plain.grad)
        assert compiled[1].equal(out.token_entropy) and compiled[2].equal(out.signals.rows)
    assert counter.frame_count == 1


def test_token_logprobs_compiles():
    logits, targets = torch.randn(3, 7, 33), torch.randint(0, 33, (3, 7))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def loss(logits):
        out = gk.token_logprobs(logits, targets, transform=gk.LogitTransform(0.7))
        return (out.logprobs * out.entropy).sum() + out.sum_sq.sum()

    leaf, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss(leaf).backward()
    out = gk.token_logprobs(plain, targets, transform=gk.LogitTransform(0.7))
    ((out.logprobs * out.entropy).sum() + out.sum_sq.sum()).backward()
    assert leaf.grad.equal(plain.grad)


def test_autocast_changes_nothing():
    case = make(dtype=torch.bfloat16)
    want, want_gradient = run(gk.hybrid_loss_from_logits, case, OBJECTIVES[0], 0.3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, gradient = run(gk.hybrid_loss_from_logits, case, OBJECTIVES[0], 0.3)
    assert out.loss.equal(want.loss) and out.loss.dtype == torch.float32 and gradient.equal(want_gradient)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize(
    "objective", [*OBJECTIVES, gk.HybridObjective(gk.DFPO())], ids=lambda o: type(o.policy).__name__
)
@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_host_reads_nothing(objective, backend, inplace):
    """Meta tensors hold no data: whatever reads one raises."""
    tokens = {name: torch.zeros(24, device="meta") for name in ("old_logprobs", "ref_logprobs", "rollout_weights")}
    batch = gk.TokenBatch.from_packed(
        torch.zeros(24, dtype=torch.long, device="meta"), torch.zeros(5, dtype=torch.long, device="meta"),
        is_expert_S=torch.zeros(4, dtype=torch.bool, device="meta"), advantages=torch.zeros(4, device="meta"),
        groups=torch.zeros(4, dtype=torch.long, device="meta"), **tokens,
        base_logits=torch.zeros(24, 11, device="meta"),
    )  # fmt: skip
    leaf = torch.zeros(24, 11, device="meta", requires_grad=True)
    heat = gk.LogitTransform(torch.ones(4, device="meta"))
    with gk.use_backend(backend) if backend else contextlib.nullcontext():
        out = gk.hybrid_loss_from_logits(leaf * 1.0, batch, objective, 0.3, transform=heat, inplace=inplace)
        out.loss.backward()
        got = gk.token_logprobs(leaf, batch.targets, mask=batch.mask)
        (got.logprobs.sum() + got.entropy.sum()).backward()
    assert leaf.grad.shape == (24, 11) and out.logprobs.shape == (24,)


def test_under_a_functional_transform_of_weights():
    """The loss of a small head, by `functional_call`, as FSDP and DDP drive modules."""
    case = make(poison=False, dtype=torch.float64, V=23)
    head = torch.nn.Linear(8, 23, dtype=torch.float64)
    hidden = torch.randn(*case.batch.targets.shape, 8, dtype=torch.float64)
    for inplace in (False, True):
        head.zero_grad()
        logits = torch.func.functional_call(head, dict(head.named_parameters()), (hidden,))
        gk.hybrid_loss_from_logits(logits, case.batch, OBJECTIVES[0], 0.3, inplace=inplace).loss.backward()
        got = head.weight.grad.clone()
        head.zero_grad()
        reference.hybrid_loss_from_logits(head(hidden), case.batch, OBJECTIVES[0], 0.3).loss.backward()
        torch.testing.assert_close(got, head.weight.grad, rtol=1e-9, atol=1e-12)
