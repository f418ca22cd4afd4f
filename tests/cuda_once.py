"""Every kernel of csrc/cuda once, emulated, on small shapes: for the sanitizers of ``.ci/cuda``. Prints what ran.

python tests/cuda_once.py [PART...]
"""

from __future__ import annotations

import sys

import cuda_emulation
import torch
from rows_arguments import RowCase, op

import gac_kernels as gk


def short_rows() -> int:
    """Columns that fill no vector, and nothing behind them."""
    case = RowCase(A=1, B=1, V=203, dtype=torch.bfloat16, dead=False)
    case.gradient(case.statistics())
    return 2


def rows() -> int:
    """Every element type; with everything that a row can have; more columns than a block's shared memory holds."""
    for dtype in (torch.float32, torch.float16, torch.float64):
        case = RowCase(A=1, B=2, V=37, dtype=dtype, dead=False)
        case.gradient(case.statistics())
    everything = gk.LogitTransform(temperature=0.7, softcap=20.0, scale=0.5)
    case = RowCase(A=1, B=4, V=203, dtype=torch.bfloat16, transform=everything, gift=gk.GIFT(3.0, 0.1))
    case.gradient(case.statistics())
    case = RowCase(A=1, B=1, V=9001, dead=False)
    case.gradient(case.statistics(), inplace=True)
    op("scale_", case.logits, torch.tensor(0.5))
    return 11


def losses() -> int:
    """A term for each, in one look at the logits or two."""
    policies = gk.SAPO(), gk.GRPO(delta=2.0), gk.CISPO(), gk.GSPO(), gk.DFPO("adv_orthogonal")
    S, T, V = 4, 2, 40
    for policy in policies:
        logits = torch.randn(S, T, V).requires_grad_()
        batch = gk.TokenBatch.from_padded(
            torch.randint(0, V, (S, T)), torch.rand(S, T) > 0.2, is_expert_S=torch.tensor([False, False, True, True]),
            advantages=torch.randn(S), old_logprobs=-3 - torch.rand(S, T), ref_logprobs=-3 - torch.rand(S, T),
            rollout_weights=torch.rand(S, T), groups=torch.tensor([0, 0, 1, 1]),
        )  # fmt: skip
        objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.01)
        gk.hybrid_loss_from_logits(logits, batch, objective, torch.tensor(0.3)).loss.backward()
    return len(policies)


def controllers() -> int:
    signals = gk.Signals(torch.rand(6, 12) + 0.5, has_sum_sq=True, hidden=torch.randn(6, 5))
    for estimator in ("coefficient", "logit", "hidden"):
        controller = gk.GuidedAdaptiveController(gk.ControllerConfig(estimator=estimator, update_every=1))
        for _ in range(2):
            controller.observe(signals)
            controller.step()
    return 6


def sums() -> int:
    gk.group_advantages(torch.randn(12), torch.tensor([0, 1, 2] * 4))
    gk.group_advantages(torch.randn(12), 4)
    a, b = ([torch.randn(5, 7), torch.randn(3000)] for _ in range(2))
    op("gradient_moments", a, b)
    op("accumulate_moments_", a, b)
    return 4


PARTS = {part.__name__: part for part in (short_rows, rows, losses, controllers, sums)}


def main(parts: list[str]) -> None:
    cuda_emulation.load()
    torch.manual_seed(0)
    with gk.use_backend("cuda"):
        print(f"{sum(PARTS[name]() for name in parts or PARTS)} calls of csrc/cuda's operators")


if __name__ == "__main__":
    main(sys.argv[1:])
