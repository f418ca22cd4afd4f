"""Every kernel of csrc/cuda once, emulated, on small shapes: for the sanitizers of ``.ci/cuda``. Prints what ran."""

from __future__ import annotations

from itertools import product

import cuda_emulation
import torch
from rows_arguments import RowCase, op

import gac_kernels as gk


def rows() -> int:
    """Columns that fill no vector, and more than a block's shared memory holds; with everything a row can have."""
    for dtype, V in product((torch.float32, torch.bfloat16, torch.float16, torch.float64), (37, 203)):
        case = RowCase(A=1, B=4, V=V, dtype=dtype)
        case.gradient(case.statistics())
    everything = gk.LogitTransform(temperature=0.7, softcap=20.0, scale=0.5)
    case = RowCase(A=1, B=4, V=203, dtype=torch.bfloat16, transform=everything, gift=gk.GIFT(3.0, 0.1))
    case.gradient(case.statistics())
    case = RowCase(A=1, B=2, V=9001, dead=False)
    case.gradient(case.statistics(), inplace=True)
    op("scale_", case.logits, torch.tensor(0.5))
    return 11


def losses() -> int:
    policies = gk.SAPO(), gk.GRPO(delta=2.0), gk.CISPO(), gk.GSPO(), gk.DFPO(), gk.DFPO("adv_orthogonal")
    objectives = [gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.01) for policy in policies]
    S, T, V = 4, 3, 70
    for objective, dtype in product(objectives, (torch.float32, torch.bfloat16)):
        logits = torch.randn(S, T, V).to(dtype).requires_grad_()
        batch = gk.TokenBatch.from_padded(
            torch.randint(0, V, (S, T)), torch.rand(S, T) > 0.2, is_expert_S=torch.tensor([False, False, True, True]),
            advantages=torch.randn(S), old_logprobs=-3 - torch.rand(S, T), ref_logprobs=-3 - torch.rand(S, T),
            rollout_weights=torch.rand(S, T), groups=torch.tensor([0, 0, 1, 1]),
        )  # fmt: skip
        gk.hybrid_loss_from_logits(logits, batch, objective, torch.tensor(0.3)).loss.backward()
    return 2 * len(objectives)


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


def main() -> None:
    cuda_emulation.load()
    torch.manual_seed(0)
    with gk.use_backend("cuda"):
        print(f"{sum(part() for part in (rows, losses, controllers, sums))} calls of csrc/cuda's operators")


if __name__ == "__main__":
    main()
