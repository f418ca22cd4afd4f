"""The losses from hidden states as citizens of torch: opcheck, compile, autocast, checkpointing, memory, shards."""

from __future__ import annotations

import os

import pytest
import torch
import torch._dynamo.testing
from hidden_support import HEAD, HiddenCase
from torch.utils.checkpoint import checkpoint

import gac_kernels as gk
from gac_kernels import linear, schemas
from gac_kernels.bench.measure import Contestant, peak_bytes

OBJECTIVES = [
    gk.HybridObjective(kl_coef=0.1, entropy_coef=0.05),
    gk.HybridObjective(gk.GSPO(), entropy_coef=0.05),
    gk.HybridObjective(gk.GRPO(), gk.GIFT(2.0, 0.1)),
    gk.HybridObjective(gk.DFPO(), gk.GIFT(2.0)),
]


def objective_name(objective):
    return f"{type(objective.policy).__name__}-{type(objective.supervised).__name__}"


def calls_of(case, objective, monkeypatch):
    """Every operator call of one loss: name -> arguments as they were before the call."""
    seen = {}
    for name, operator in linear.LINEAR.items():

        def record(*args, name=name, operator=operator):
            seen[name] = tuple(a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args)
            return operator(*args)

        monkeypatch.setitem(linear.LINEAR, name, record)
    case.ours(objective, chunk_tokens=5)
    monkeypatch.undo()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=objective_name)
def test_opcheck(objective, dtype, monkeypatch):
    case = HiddenCase(dtype=dtype, base=isinstance(objective.supervised, gk.GIFT), poison=False)
    for name, args in calls_of(case, objective, monkeypatch).items():
        torch.library.opcheck(getattr(torch.ops.gac_kernels, name).default, args)


def test_every_operator_is_checked(monkeypatch):
    case = HiddenCase(poison=False)
    found = set().union(*(calls_of(case, o, monkeypatch) for o in OBJECTIVES[:2]))
    assert found == set(schemas.COMPOSITES) == set(linear.LINEAR)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=objective_name)
def test_compiles_without_a_graph_break(objective):
    """Loss and gradients under `fullgraph=True` are eager's; a tensor mu that changes compiles nothing anew."""
    case = HiddenCase(base=isinstance(objective.supervised, gk.GIFT), poison=False)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(hidden, weight, bias, mu):
        out = gk.hybrid_loss_from_hidden(
            hidden * 1.0, weight, case.batch, objective, mu, bias=bias, chunk_tokens=5, **(case.base or {})
        )
        return out.loss, out.token_entropy, out.signals.rows, out.signals.hidden

    compiled = torch.compile(loss, backend=counter, fullgraph=True)
    for mu in (torch.tensor(0.3), torch.tensor(0.7)):
        leaves, plain = case.leaves(), case.leaves()
        got, want = compiled(*leaves.values(), mu), loss(*plain.values(), mu)
        got[0].backward()
        want[0].backward()
        assert all(a.equal(b) for a, b in zip(got, want, strict=True))
        assert all(leaves[name].grad.equal(plain[name].grad) for name in HEAD)
    assert counter.frame_count == 1


def test_token_logprobs_compile():
    case = HiddenCase(poison=False)

    def loss(hidden, weight, bias):
        out = gk.token_logprobs_from_hidden(hidden, weight, case.batch.targets, mask=case.batch.mask, bias=bias)
        return (out.logprobs * out.entropy).sum() + out.sum_sq.sum()

    leaves, plain = case.leaves(), case.leaves()
    torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves.values()).backward()
    loss(*plain.values()).backward()
    assert all(leaves[name].grad.equal(plain[name].grad) for name in HEAD)


def test_autocast_gives_the_products_its_dtype():
    """As a linear layer under autocast: float32 leaves, bfloat16 products, float32 gradients."""
    case = HiddenCase(poison=False)
    leaves = case.leaves()
    rounded = {name: leaf.detach().bfloat16().requires_grad_() for name, leaf in leaves.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = gk.hybrid_loss_from_hidden(
            leaves["hidden"], leaves["weight"], case.batch, OBJECTIVES[0], 0.3, bias=leaves["bias"]
        )
    want = gk.hybrid_loss_from_hidden(
        rounded["hidden"], rounded["weight"], case.batch, OBJECTIVES[0], 0.3, bias=rounded["bias"]
    )
    out.loss.backward()
    want.loss.backward()
    assert out.loss.equal(want.loss) and out.loss.dtype == torch.float32
    for name in HEAD:
        assert leaves[name].grad.dtype == torch.float32
        assert leaves[name].grad.equal(rounded[name].grad.float())


def test_under_activation_checkpointing_and_a_tied_embedding():
    """The head's weight is the embedding's: gradients add; and a recomputed backbone changes nothing."""
    case = HiddenCase(dtype=torch.float64, bias=False, poison=False)
    ids = case.batch.targets.clamp(0, 36)
    seen = {}
    for recompute in (False, True):
        weight = case.weight.clone().requires_grad_()
        mix = torch.eye(12, dtype=torch.float64).mul(0.5).requires_grad_()

        def backbone(weight, mix=mix):
            return torch.tanh(torch.nn.functional.embedding(ids, weight) @ mix)

        hidden = checkpoint(backbone, weight, use_reentrant=False) if recompute else backbone(weight)
        gk.hybrid_loss_from_hidden(hidden, weight, case.batch, OBJECTIVES[0], 0.3, chunk_tokens=4).loss.backward()
        seen[recompute] = weight.grad, mix.grad
    assert all(torch.equal(a, b) for a, b in zip(seen[False], seen[True], strict=True))
    weight, mix = (v.detach().clone().requires_grad_() for v in (case.weight, mix))
    logits = torch.tanh(torch.nn.functional.embedding(ids, weight) @ mix) @ weight.t()
    gk.hybrid_loss_from_logits(logits, case.batch, OBJECTIVES[0], 0.3).loss.backward()
    torch.testing.assert_close(seen[False][0], weight.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(seen[False][1], mix.grad, rtol=1e-10, atol=1e-14)


def test_the_whole_loss_inside_a_checkpoint():
    case = HiddenCase(dtype=torch.float64, poison=False)
    leaves = case.leaves()

    def loss(hidden, weight, bias):
        return gk.hybrid_loss_from_hidden(hidden, weight, case.batch, OBJECTIVES[0], 0.3, bias=bias).loss

    checkpoint(loss, *leaves.values(), use_reentrant=False).backward()
    _, want = case.ours(OBJECTIVES[0])
    assert all(leaves[name].grad.equal(want[name]) for name in HEAD)


def test_a_head_given_as_a_merged_product():
    """LoRA: the head is `W + B A`; what it is made of gets the product's gradients."""
    case = HiddenCase(dtype=torch.float64, poison=False)
    a, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 12), (37, 2)))
    hidden = case.hidden.clone()
    gk.hybrid_loss_from_hidden(hidden, case.weight + b @ a, case.batch, OBJECTIVES[0], 0.3).loss.backward()
    got = a.grad.clone(), b.grad.clone()
    a.grad = b.grad = None
    logits = hidden @ (case.weight + b @ a).t()
    gk.hybrid_loss_from_logits(logits, case.batch, OBJECTIVES[0], 0.3).loss.backward()
    torch.testing.assert_close(got, (a.grad, b.grad), rtol=1e-10, atol=1e-13)
    with pytest.raises(TypeError, match=r"weight must be a torch\.Tensor, got Linear"):
        gk.hybrid_loss_from_hidden(hidden, torch.nn.Linear(12, 37), case.batch, OBJECTIVES[0], 0.3)


def test_a_sharded_head_is_refused(tmp_path):
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = HiddenCase(poison=False)
    init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        weight = distribute_tensor(case.weight, init_device_mesh("cpu", (1,)), [Shard(0)])
        with pytest.raises(TypeError, match=r"weight must be a whole torch\.Tensor, got a sharded DTensor"):
            gk.hybrid_loss_from_hidden(case.hidden, weight, case.batch, OBJECTIVES[0], 0.3)
    finally:
        destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_is_the_gradients_and_one_chunk(dtype):
    """Beside the gradients: one chunk, the float32 sum of a 16-bit dW, and small change."""
    case = HiddenCase((256, 256), (False, True), H=16, V=4000, dtype=dtype, poison=False, holes=False)

    def run(_):
        return case.ours(OBJECTIVES[0], chunk_tokens=32)

    run(None)
    N, V, H = 512, 4000, 16
    # dW in float32 (of 16 bits: its sum) beside a chunk; then, in parts, 16 bits beside 16 bits.
    held = max(V * H * 4 + 32 * V * 4, 2 * V * H * dtype.itemsize)
    copies = 3 * (V + N) * H * dtype.itemsize  # of the case's leaves
    scratch = 1024 * H * 4 * 2 + N * H * 4 * 3 + 400_000
    bound = held + copies + scratch
    assert peak_bytes(Contestant("ours", run, lambda: None)) <= bound
    assert N * V * dtype.itemsize > 2 * bound  # eager's logits alone


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="Triton's kernels run on the GPU here, see test_gpu")
@pytest.mark.parametrize("objective", OBJECTIVES, ids=objective_name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_triton_serves_the_rows(objective, dtype):
    gift = isinstance(objective.supervised, gk.GIFT)
    case = HiddenCase((3, 2), (False, True), dtype=dtype, base=gift, transform=gk.LogitTransform(0.7, scale=1.3))
    with gk.use_backend("triton"):
        case.check(objective, transform=gk.LogitTransform(0.7, scale=1.3), chunk_tokens=3)
