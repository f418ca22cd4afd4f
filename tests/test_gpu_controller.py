"""The controller and the sums over gradients on a GPU. Skipped without one, see test_gpu.py."""

from __future__ import annotations

import pytest
import torch
from controller_support import assert_same_state
from test_cuda_controller import CONFIGS, arguments, assert_close, some_rows
from test_gpu import captured

import gac_kernels as gk
from gac_kernels import library
from gac_kernels.gradients import accumulate_moments_, gradient_moments
from gac_kernels.signals import Signals

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible")]


@pytest.fixture(params=["reference", "cuda"])
def served(request):
    try:
        with gk.use_backend(request.param):
            yield request.param
    except RuntimeError as error:
        if "is not available" not in str(error):
            raise
        pytest.skip(str(error))


def on_device(args):
    return [value.cuda() if isinstance(value, torch.Tensor) else value for value in args]


@pytest.mark.parametrize("sequences", [0, 1, 64, 300, 5000, 20_000])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_against_the_reference_on_the_cpu(name, sequences, served):
    rows = some_rows(sequences, sequences)
    hidden = torch.randn(sequences, 700, generator=torch.Generator().manual_seed(1))
    args = arguments(CONFIGS[name], rows, hidden if name == "hidden" else None, kl=0.03)
    want = torch.ops.gac_kernels.controller_step_reference(*args)
    first = library.call("controller_step", *on_device(args))
    assert_close([x.cpu() for x in first], want)
    for _ in range(50):
        assert all(
            torch.equal(x, y) for x, y in zip(library.call("controller_step", *on_device(args)), first, strict=True)
        )


@pytest.mark.parametrize("alpha", [0.5, gk.KLTarget()])
def test_a_cuda_graph_replays_the_controllers_step(alpha, served):
    """Signals and KL change under the graph, refreshes fall by the count on the device, and mu stays in its place."""
    config = gk.ControllerConfig(update_every=3, prior=gk.CosinePrior(4, 9), alpha=alpha)
    ours, eager = (gk.GuidedAdaptiveController(config, device="cuda") for _ in range(2))
    rows, kl = some_rows(0, 24).cuda(), torch.zeros((), device="cuda")

    def step():
        ours.observe(Signals(rows))
        return ours.step(kl)

    graph, mu = captured(step)
    ours.load_state_dict(gk.GuidedAdaptiveController(config, device="cuda").state_dict())
    for t in range(20):
        rows.copy_(some_rows(t, 24))
        kl.fill_(0.01 * (t % 5))
        graph.replay()
        eager.observe(Signals(rows.clone()))
        eager.step(kl.clone())
        assert torch.equal(mu, eager.mu)
        assert ours.mu is mu
    assert ours.steps == 20
    assert_same_state(ours, eager)


@pytest.mark.parametrize("estimator", ["coefficient", "logit", "hidden"])
def test_a_step_never_waits_for_the_device(estimator, served):
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(estimator, update_every=1), device="cuda")
    rows = some_rows(0, 40).cuda()
    signals = Signals(rows, has_sum_sq=True, hidden=rows[:, 2:9].contiguous())
    for mode in ("default", "error"):  # the first call may load modules
        torch.cuda.set_sync_debug_mode(mode)
        try:
            controller.observe(signals)
            controller.step()
            controller.metrics()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert controller.mu.isfinite().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_over_gradients(dtype, served):
    generator = torch.Generator().manual_seed(0)
    a, b = (
        [torch.randn(n, generator=generator).to(dtype) for n in (1, 7, 32_769, 3_000_000, *[50] * 300)] for _ in "ab"
    )
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    sums = [torch.zeros(x.shape, dtype=wide, device="cuda") for x in a]
    x, y = [t.cuda() for t in a], [t.cuda() for t in b]
    got, norm2 = gradient_moments(x, y), accumulate_moments_(sums, x)
    want = torch.ops.gac_kernels.gradient_moments_reference(a, b)
    torch.testing.assert_close(got.cpu(), want, rtol=1e-11, atol=1e-9)
    torch.testing.assert_close(norm2.cpu(), want[0], rtol=1e-11, atol=0)
    assert all(torch.equal(total.cpu(), gradient.to(wide)) for total, gradient in zip(sums, a, strict=True))
    if served == "cuda":
        assert all(torch.equal(gradient_moments(x, y), got) for _ in range(50))
