"""A small program for compute-sanitizer: every objective once, forward and backward, on the GPU backends.

Run it once without the sanitizer, so that the kernels are compiled, then under ``compute-sanitizer --tool memcheck``
(racecheck, initcheck). Shapes are ragged and no multiple of a tile; every output is written to by someone, so reading
it back under initcheck finds what was not.
"""

from __future__ import annotations

import sys

import torch

import gac_kernels as gk
from gac_kernels.commands.selftest import cases


def main() -> int:
    if not torch.cuda.is_available():
        print("sanitize: no CUDA device", file=sys.stderr)
        return 2
    mu = torch.tensor(0.37, device="cuda")
    runs = 0
    with gk.use_backend("triton"):
        for objective, batch, logprobs, entropy, sum_sq in cases(0, "cuda"):
            leaf, entropy = logprobs.clone().requires_grad_(), entropy.clone().requires_grad_()
            out = gk.hybrid_loss(leaf, batch, objective, mu, entropy=entropy, sum_sq=sum_sq)
            out.loss.backward()
            results = [out.loss, out.logprobs, out.signals.rows, leaf.grad, entropy.grad, *out.metrics.values()]
            for result in results:
                assert torch.isfinite(result.cpu()).all(), f"{objective} gave {result}"
            runs += 1
    torch.cuda.synchronize()
    print(f"sanitize: {runs} forward and backward passes, all finite")
    return 0


if __name__ == "__main__":
    sys.exit(main())
