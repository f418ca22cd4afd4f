"""What only a GPU can show. Skipped without one; ``benchmarks/gpu.sh`` runs these on a machine that has it."""

from __future__ import annotations

import pytest
import torch

import gac_kernels as gk
from gac_kernels.bench.cases import TokenCase
from gac_kernels.bench.session import run_case
from gac_kernels.commands.selftest import OBJECTIVES, cases, check_backend

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]


def test_triton_serves_the_device():
    assert gk.backends()["cuda"].startswith("triton:")


def test_every_objective_against_float64():
    outcome = check_backend("triton", "cuda", seed=0, budget_seconds=600.0)
    assert outcome.status == "passed", outcome.why
    assert outcome.cases == f"{2 * len(OBJECTIVES)} of {2 * len(OBJECTIVES)}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [(4, 1), (7, 130), (64, 2048), (4, 70_000)], ids=str)
def test_sizes_and_dtypes_against_float64(size, dtype):
    found = run_case(TokenCase(*size, dtype, "cuda"), ["gac-triton", "gac-reference", "eager"], modes=())
    assert not found.wrong
    assert set(found.errors) == {"gac-triton", "gac-reference", "eager"}


def _step(objective, batch, logprobs, entropy, sum_sq, mu):
    leaf = logprobs.detach().requires_grad_()
    out = gk.hybrid_loss(leaf, batch, objective, mu, entropy=entropy, sum_sq=sum_sq)
    out.loss.backward()
    return out, leaf.grad


def test_the_same_call_gives_the_same_bits():
    mu = torch.tensor(0.37, device="cuda")
    for case in cases(seed=1, device="cuda"):
        first, gradient = _step(*case, mu)
        for _ in range(50):
            again, other = _step(*case, mu)
            assert torch.equal(again.loss, first.loss)
            assert torch.equal(again.signals.rows, first.signals.rows)
            assert torch.equal(other, gradient)


def test_loss_and_controller_never_wait_for_the_device():
    """Two rounds: the first compiles kernels, which may wait; in the second a wait is an error."""
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1), device="cuda")
    inputs = list(cases(seed=2, device="cuda"))
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            for case in inputs:
                out, _ = _step(*case, controller.mu)
                controller.observe(gk.Signals(out.signals.rows))
                controller.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(controller.mu).item()
