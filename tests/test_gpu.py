"""What only a GPU can show. Skipped without one; ``benchmarks/gpu.sh`` runs these on a machine that has it."""

from __future__ import annotations

import pytest
import torch
from hidden_support import HiddenCase
from logit_support import LogitCase, check_gradient, check_rows, computed, make, run, worst

import gac_kernels as gk
from gac_kernels import library
from gac_kernels.bench.cases import TokenCase
from gac_kernels.bench.session import run_case
from gac_kernels.commands.selftest import CASES, check_backend, logit_cases, token_cases

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]


@pytest.fixture(params=["triton", "cuda"], autouse=True)
def backend(request):
    """Every test on both; CUDA C++ is skipped where the package was built without it."""
    try:
        with gk.use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        if "is not available" not in str(error):
            raise
        pytest.skip(str(error))


def test_what_the_table_says_serves(backend, monkeypatch):
    serving = {name: of for name, device, of in library.table() if device == "cuda"}
    assert gk.backends()["cuda"].startswith(f"{backend}:")
    monkeypatch.setattr(library, "_forced", None)
    assert gk.backends()["cuda"].startswith(serving["fused_rows"] + ":")
    assert serving["controller_step"] == ("cuda" if backend == "cuda" else serving["controller_step"])


def test_every_objective_against_float64(backend):
    outcome = check_backend(backend, "cuda", seed=0, budget_seconds=600.0)
    assert outcome.status == "passed", outcome.why
    assert outcome.cases == f"{CASES} of {CASES}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(4, 1), (7, 130), (64, 2048), (4, 70_000)], ids=str)
def test_sizes_and_dtypes_against_float64(size, dtype, backend):
    found = run_case(TokenCase(*size, dtype, "cuda"), [f"gac-{backend}", "gac-reference", "eager"], modes=())
    assert not found.wrong
    assert set(found.errors) == {f"gac-{backend}", "gac-reference", "eager"}


def _step(objective, batch, logprobs, entropy, sum_sq, mu):
    leaf = logprobs.detach().requires_grad_()
    out = gk.hybrid_loss(leaf, batch, objective, mu, entropy=entropy, sum_sq=sum_sq)
    out.loss.backward()
    return out, leaf.grad


def _logit_step(objective, batch, logits, mu):
    leaf = logits.clone().requires_grad_()
    out = gk.hybrid_loss_from_logits(leaf * 1.0, batch, objective, mu, inplace=True)
    out.loss.backward()
    return out, leaf.grad


def test_the_same_call_gives_the_same_bits():
    mu = torch.tensor(0.37, device="cuda")
    for case in logit_cases(seed=1, device="cuda"):
        first, gradient = _logit_step(*case, mu)
        for _ in range(250):
            again, other = _logit_step(*case, mu)
            assert torch.equal(again.loss, first.loss) and torch.equal(other, gradient)
            assert torch.equal(again.signals.rows, first.signals.rows)
    for case in token_cases(seed=1, device="cuda"):
        first, gradient = _step(*case, mu)
        for _ in range(50):
            again, other = _step(*case, mu)
            assert torch.equal(again.loss, first.loss)
            assert torch.equal(again.signals.rows, first.signals.rows)
            assert torch.equal(other, gradient)


def test_loss_and_controller_never_wait_for_the_device():
    """Two rounds: the first compiles kernels, which may wait; in the second a wait is an error."""
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1), device="cuda")
    inputs, rows = list(token_cases(seed=2, device="cuda")), list(logit_cases(seed=2, device="cuda"))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for case in inputs:
                out, _ = _step(*case, controller.mu)
                controller.observe(gk.Signals(out.signals.rows))
                controller.step()
            for case in rows:
                _logit_step(*case, controller.mu)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(controller.mu).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("V", [33, 2049, 129_920, 151_936])
def test_rows_against_float64(V, dtype):
    """Peaked rows, a vocabulary that is no multiple of a tile, in place and not."""
    for inplace in (False, True):
        case = make((3, 2), (False, True), V=V, dtype=dtype, scale=8.0, holes=False)
        want, want_gradient = case.oracle(gk.HybridObjective(kl_coef=0.1), 0.3)
        device = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(case.batch).items()}
        moved = LogitCase(case.logits.cuda(), gk.TokenBatch(**device))
        got, gradient = run(gk.hybrid_loss_from_logits, moved, gk.HybridObjective(kl_coef=0.1), 0.3, inplace=inplace)
        check_rows(got.logprobs.cpu(), want.logprobs, torch.promote_types(dtype, torch.float32))
        check_gradient(gradient.cpu(), want_gradient, condition=20.0)


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.DFPO()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_hidden_states_against_float64(dtype, policy):
    """In one chunk and in several, whose 16-bit products are summed in float32."""
    objective = gk.HybridObjective(policy, kl_coef=0.1)
    for chunk in (None, 16):  # other lengths begin on other boundaries, for which Triton compiles anew
        case = HiddenCase((40, 9, 30), (False, True, False), H=64, V=3001, dtype=dtype, poison=False)
        want, want_gradients = case.oracle(objective)
        moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(case.batch).items()}
        case.batch, case.hidden = gk.TokenBatch(**moved), case.hidden.cuda()
        case.weight, case.bias = case.weight.cuda(), case.bias.cuda()
        got, gradients = case.ours(objective, chunk_tokens=chunk)
        # A product in 16 bits rounds the logits, up to some 30 here; TF32 is off by default.
        bound = {torch.float64: 1e-11, torch.float32: 1e-4}.get(dtype, 32 * torch.finfo(dtype).eps)
        assert worst(got.logprobs.cpu(), want.logprobs) < bound
        for name, gradient in gradients.items():
            assert worst(gradient.cpu(), want_gradients[name]) < 8 * bound, name


def captured(step):
    """A graph of ``step`` after three warm calls, and the tensors that its replays fill."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    return graph, results


def test_a_cuda_graph_takes_every_row_of_hidden_states():
    """Nothing waits for the number of live rows while a graph is captured."""
    case = HiddenCase((4, 3), (False, True), H=64, V=500)  # hidden states and targets of dead rows are nan and -100
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in vars(case.batch).items()}
    case.batch, case.hidden = gk.TokenBatch(**moved), case.hidden.cuda()
    case.weight, case.bias = case.weight.cuda(), case.bias.cuda()
    leaves, mu = case.leaves(), torch.tensor(0.3, device="cuda")

    def step():
        out = gk.hybrid_loss_from_hidden(leaves["hidden"], leaves["weight"], case.batch, gk.HybridObjective(), mu)
        return out.loss, torch.autograd.grad(out.loss, leaves["weight"])[0]

    graph, (loss, gradient) = captured(step)
    for value in (0.3, 0.8):
        mu.fill_(value)
        graph.replay()
        want_loss, want_gradient = step()
        torch.testing.assert_close(loss, want_loss, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(gradient, want_gradient, rtol=1e-4, atol=1e-7)


def test_a_cuda_graph_replays_the_loss_and_its_gradient():
    objective, batch, logits = next(logit_cases(seed=3, device="cuda"))
    mu, leaf = torch.tensor(0.3, device="cuda"), logits.clone().requires_grad_()

    def step():
        out = gk.hybrid_loss_from_logits(leaf, batch, objective, mu)
        return out.loss, torch.autograd.grad(out.loss, leaf)[0]

    graph, (loss, gradient) = captured(step)
    for value in (0.3, 0.8):
        mu.fill_(value)
        graph.replay()
        want_loss, want_gradient = step()
        assert torch.equal(loss, want_loss) and torch.equal(gradient, want_gradient)


def test_a_side_stream_gives_the_same_bits():
    """Work is queued on torch's current stream, behind what made its inputs there."""
    objective, batch, logits = next(logit_cases(seed=5, device="cuda"))
    mu = torch.tensor(0.3, device="cuda")
    want, want_gradient = _logit_step(objective, batch, logits, mu)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)  # inputs come late: a launch on another stream would not see them
        late = logits.clone()
        got, gradient = _logit_step(objective, batch, late, mu)
    torch.cuda.current_stream().wait_stream(side)
    assert torch.equal(got.loss, want.loss) and torch.equal(gradient, want_gradient)


def test_more_than_two_to_the_31_logits():
    """The last rows, whose offsets need 64 bits, are those of the same rows alone."""
    V, N = 131_072, 16_500
    if torch.cuda.mem_get_info()[0] < 3 * 2 * N * V:
        pytest.skip("needs 13 GB of free GPU memory")
    logits = torch.empty(1, N, V, device="cuda", dtype=torch.bfloat16).normal_()
    last = logits[:, -2:].clone()
    targets = torch.randint(0, V, (1, N), device="cuda")
    mask = torch.ones(1, N, dtype=torch.bool, device="cuda")
    batch = gk.TokenBatch.from_padded(targets, mask, advantages=torch.ones(1, device="cuda"))
    counts = gk.Denominators(policy=torch.tensor(1.0, device="cuda"), supervised=torch.tensor(1.0, device="cuda"))
    objective = gk.HybridObjective(gk.GRPO(), aggregation="token-mean")
    whole = logits.requires_grad_()
    out = gk.hybrid_loss_from_logits(computed(whole), batch, objective, 0.0, inplace=True, denominators=counts)
    out.loss.backward()
    rest = gk.TokenBatch.from_padded(targets[:, -2:], mask[:, -2:], advantages=torch.ones(1, device="cuda"))
    alone = last.requires_grad_()
    few = gk.hybrid_loss_from_logits(alone, rest, objective, 0.0, denominators=counts)
    few.loss.backward()
    assert torch.equal(out.logprobs[:, -2:], few.logprobs)
    assert torch.equal(whole.grad[:, -2:], alone.grad)
