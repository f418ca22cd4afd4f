"""A small program for compute-sanitizer: every kernel of a GPU backend once, on small ragged shapes.

    compute-sanitizer --tool memcheck python3 benchmarks/sanitize.py triton|cuda

Run it once without the sanitizer, so that Triton has compiled. Shapes are no multiple of a tile; every output is read
back, which under initcheck finds what nobody wrote.
"""

from __future__ import annotations

import sys

import torch

import gac_kernels as gk
from gac_kernels import library
from gac_kernels.commands.selftest import logit_cases, token_cases


def finite(*results: torch.Tensor) -> None:
    for result in results:
        assert torch.isfinite(result.cpu()).all(), f"not finite: {result}"


def losses(mu: torch.Tensor) -> int:
    runs = 0
    for objective, batch, logprobs, entropy, sum_sq in token_cases(0, "cuda"):
        leaf, entropy = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
        out = gk.hybrid_loss(leaf, batch, objective, mu, entropy=entropy, sum_sq=sum_sq)
        out.loss.backward()
        finite(out.loss, out.logprobs, out.signals.rows, leaf.grad, entropy.grad, *out.metrics.values())
        runs += 1
    for objective, batch, logits in logit_cases(0, "cuda"):
        for inplace in (False, True):
            leaf = logits.clone().requires_grad_()
            out = gk.hybrid_loss_from_logits(leaf * 1.0, batch, objective, mu, inplace=inplace)
            (2 * out.loss).backward()
            finite(out.loss, out.logprobs, leaf.grad)
            runs += 1
    return runs


def rows() -> int:
    """More columns than one block holds, off a 16-byte boundary, soft capped, each element type."""
    runs = 0
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for V, transform in ((33, gk.LogitTransform()), (9001, gk.LogitTransform(0.7, 20.0))):
            leaf = torch.randn(2, 3, V + 1, device="cuda", dtype=dtype)[..., 1:].requires_grad_()
            out = gk.token_logprobs(leaf, torch.randint(0, V, (2, 3), device="cuda"), transform=transform)
            (gradient,) = torch.autograd.grad(out.logprobs.sum() + out.entropy.sum(), leaf)
            finite(out.logprobs, out.entropy, out.sum_sq, gradient)
            runs += 1
    return runs


def others() -> int:
    finite(gk.group_advantages(torch.randn(37, device="cuda"), torch.arange(37, device="cuda") % 5))
    for estimator in ("coefficient", "logit", "hidden"):
        controller = gk.GuidedAdaptiveController(
            gk.ControllerConfig(estimator=estimator, update_every=1), device="cuda"
        )
        signals = gk.Signals(
            torch.rand(13, 12, device="cuda"), has_sum_sq=True, hidden=torch.randn(13, 70, device="cuda")
        )
        controller.observe(signals)
        finite(controller.step())
    gradients = [torch.randn(shape, device="cuda") for shape in ((5, 7), (3001,))]
    finite(library.call("gradient_moments", gradients, [g.clone() for g in gradients]))
    finite(library.call("accumulate_moments_", [g.clone() for g in gradients], gradients))
    return 6


def main(backend: str) -> int:
    if not torch.cuda.is_available():
        print("sanitize: no CUDA device", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    with gk.use_backend(backend):
        runs = losses(torch.tensor(0.37, device="cuda")) + rows() + others()
    torch.cuda.synchronize()
    print(f"sanitize: {runs} passes of backend {backend!r}, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
