"""The numeric self-test of a backend: small batches of every objective against the reference in float64."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from .. import library, reference
from ..bench.check import WrongResult, column_bound, compare, elementwise_bound, metric_bound, rounding, scalar_bound
from ..objectives import CISPO, DFPO, GIFT, GRPO, GSPO, NLL, SAPO, HybridObjective, LogitTransform
from ..ops import hybrid_loss, hybrid_loss_from_logits
from ..types import HybridLoss, TokenBatch

SEQUENCES, TOKENS, MU = 16, 24, 0.37
LOGIT_SHAPE = 4, 6, 67  # sequences, tokens, vocabulary of the cases that begin at logits

# The most different ones first: a slow backend may not get through all.
OBJECTIVES = (
    HybridObjective(SAPO(), kl_coef=0.05, entropy_coef=0.01),
    HybridObjective(GRPO(0.2, 0.28, 3.0), NLL("none"), kl_coef=0.1, kl_estimator="k1", kl_ratio_weighted=True,
                    aggregation="token-mean", supervised_aggregation="seq-mean-token-sum"),
    HybridObjective(GSPO(), aggregation="seq-mean-token-sum-norm", norm_length=64.0),
    HybridObjective(DFPO("adv_orthogonal"), kl_coef=0.02, kl_estimator="k2", aggregation="seq-mean-token-sum"),
    HybridObjective(CISPO(), supervised_aggregation="seq-mean-token-mean"),
    HybridObjective(DFPO("min_replace", "product")),
    HybridObjective(SAPO("erf", 1.5, 2.0)),
    HybridObjective(SAPO("arctan", 2.0, 3.0)),
    HybridObjective(SAPO("softsign", 10.0, 12.0)),
)  # fmt: skip
FROM_LOGITS = (
    HybridObjective(SAPO(), kl_coef=0.05, entropy_coef=0.01),
    HybridObjective(GRPO(), GIFT(3.0, 0.1), aggregation="token-mean"),
    HybridObjective(GSPO(), GIFT()),
)
CASES = 2 * len(OBJECTIVES) + 2 * len(FROM_LOGITS)


@dataclass(frozen=True)
class SelfTest:
    """Outcome for one backend on one device type.

    status: ``"passed"``, ``"failed"`` or ``"not tested"``. why: of the last two, else "".
    cases: how many ran, of how many. worst: largest error in units of its bound.
    """

    backend: str
    device: str
    status: str
    why: str = ""
    cases: str = ""
    worst: float | None = None
    seconds: float = 0.0


def self_tests(seed: int, budget_seconds: float = 8.0) -> list[SelfTest]:
    """Test every backend that this machine can run, within about ``budget_seconds`` in all; at least one case each."""
    jobs: list[tuple[str, str, str]] = [("reference", "cpu", ""), ("cpu", "cpu", _absence("cpu"))]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if torch.cuda.is_available():
        jobs += [("reference", "cuda", ""), ("triton", "cuda", _absence("triton")), ("cuda", "cuda", _absence("cuda"))]
    else:
        why = "" if interpreted else "no CUDA device is visible, and TRITON_INTERPRET=1 is not set"
        jobs.append(("triton", "cpu" if interpreted else "cuda", _absence("triton") or why))
        jobs.append(("cuda", "cuda", "no CUDA device is visible"))
    began, left, outcomes = time.perf_counter(), sum(not why for _, _, why in jobs), []
    for backend, device, why in jobs:
        if why:
            outcomes.append(SelfTest(backend, device, "not tested", why))
            continue
        remaining = budget_seconds - (time.perf_counter() - began)  # what a fast backend leaves goes to the slow ones
        outcomes.append(check_backend(backend, device, seed, remaining / left))
        left -= 1
    return outcomes


def _absence(backend: str) -> str:
    """Why this install does not have the backend, "" if it has."""
    try:
        with library.use_backend(backend):
            return ""
    except RuntimeError as error:
        return str(error)


def check_backend(backend: str, device: str, seed: int, budget_seconds: float) -> SelfTest:
    """Run the cases one after the other until one fails or the time is up; whatever a backend raises is a failure."""
    began, done, worst, longest = time.perf_counter(), 0, 0.0, 0.0

    def outcome(status: str, why: str = "") -> SelfTest:
        count = f"{done} of {CASES}"
        return SelfTest(backend, device, status, why, count, worst, time.perf_counter() - began)

    for what, error_of in cases(seed, device):
        started = time.perf_counter()
        if done and started - began + longest > budget_seconds:
            break
        try:
            worst = max(worst, error_of(backend))
        except WrongResult as error:
            return outcome("failed", f"{what}: {error}")
        except Exception as error:  # whatever a broken backend raises is the finding
            return outcome("failed", f"{what} raised {type(error).__name__}: {error}")
        done, longest = done + 1, max(longest, time.perf_counter() - started)
    return outcome("passed")


def cases(seed: int, device: str) -> list[tuple[str, Callable[[str], float]]]:
    """What is tested, and the function from a backend to its largest error. The first two begin at log-probs and at
    logits."""
    tokens = [
        (_name(objective, batch), partial(_compare, objective=objective, batch=batch, values=values))
        for objective, batch, *values in token_cases(seed, device)
    ]
    rows = [
        (f"{_name(objective, batch)} from {logits.dtype} logits", partial(_compare_logits, objective, batch, logits))
        for objective, batch, logits in logit_cases(seed, device)
    ]
    return [tokens[0], rows[0], *tokens[1:], *rows[1:]]


def _name(objective: HybridObjective, batch: TokenBatch) -> str:
    return f"{type(objective.policy).__name__} ({'packed' if batch.cu_seqlens is not None else 'padded'})"


def logit_cases(seed: int, device: str) -> Iterator[tuple[HybridObjective, TokenBatch, Tensor]]:
    """Each objective in float32 and bfloat16, off-policy, with a dead place that holds nan."""
    generator = torch.Generator().manual_seed(seed + 1)
    S, T, V = LOGIT_SHAPE
    logits = 3.0 * torch.randn(S, T, V, generator=generator)
    targets = torch.randint(0, V, (S, T), generator=generator)
    mask = torch.arange(T) < torch.tensor([T, T - 1, T, T])[:, None]
    exact = reference.token_logprobs(logits.double(), targets).logprobs
    assert exact is not None
    noise = 0.2 * torch.randn(2, S, T, generator=generator)
    tokens = {
        "old_logprobs": (exact + noise[0]).float().to(device),
        "ref_logprobs": (exact + noise[1]).float().to(device),
        "base_logits": (logits + torch.randn(S, T, V, generator=generator)).to(device),
    }
    advantages = torch.tensor([0.7, -1.1, 0.4, 0.2], device=device)
    expert = torch.tensor([False, False, True, False], device=device)
    batch = TokenBatch.from_padded(
        targets.to(device), mask.to(device), is_expert_S=expert, advantages=advantages, **tokens
    )
    logits = torch.where(mask[..., None], logits, torch.nan).to(device)
    for objective in FROM_LOGITS:
        for dtype in (torch.float32, torch.bfloat16):
            yield objective, batch, logits.to(dtype)


def token_cases(seed: int, device: str) -> Iterator[tuple[HybridObjective, TokenBatch, Tensor, Tensor, Tensor]]:
    """Each objective padded and packed, off-policy, ragged, with a sequence without tokens and nan where masked."""
    generator = torch.Generator().manual_seed(seed)
    shape = S, T = SEQUENCES, TOKENS
    logp = -8.0 * torch.rand(shape, generator=generator).square() - 1e-3
    length_S = torch.randint(1, T + 1, (S,), generator=generator)
    length_S[S // 2 : S // 2 + 2] = 0  # a demonstration and a rollout
    mask = torch.arange(T) < length_S[:, None]

    def noise(width: float) -> Tensor:
        return width * torch.randn(shape, generator=generator)

    def dead_nan(value: Tensor) -> Tensor:
        return torch.where(mask, value, torch.nan).to(device)

    tokens = {
        "old_logprobs": dead_nan(logp + noise(0.3)),
        "ref_logprobs": dead_nan(logp + noise(0.3)),
        "rollout_weights": dead_nan(0.5 + torch.rand(shape, generator=generator)),
    }
    # Both signs in every group: weights near 1 are then far from parallel to the advantages, which would leave DFPO's
    # orthogonal part to rounding.
    sign_S = 1.0 - 2.0 * (torch.arange(S) % 2)
    rows = {
        "is_expert_S": (torch.arange(S) % 4 == 0).to(device),
        "advantages": (sign_S * (0.5 + torch.rand(S, generator=generator))).to(device),
        "groups": (torch.arange(S) // 4 % 2).to(device),
    }
    targets, mask_ST = torch.zeros(shape, dtype=torch.int64, device=device), mask.to(device)
    padded = TokenBatch.from_padded(targets, mask_ST, **tokens, **rows)
    offsets = torch.arange(S + 1, device=device) * T
    packed = TokenBatch.from_packed(
        targets.flatten(), offsets, mask_N=mask_ST.flatten(), **{k: v.flatten() for k, v in tokens.items()}, **rows
    )
    p = logp.exp()
    sums = dead_nan(logp), dead_nan(torch.rand(shape, generator=generator) * 3), dead_nan(p * p + 0.1 * (1 - p) ** 2)
    flat = sums[0].flatten(), sums[1].flatten(), sums[2].flatten()
    for objective in OBJECTIVES:
        yield objective, padded, *sums
        yield objective, packed, *flat


def _compare(backend: str, objective: HybridObjective, batch: TokenBatch, values: Sequence[Tensor]) -> float:
    """Largest error of every output of one case from log-probs, in units of its bound."""
    logprobs, entropy, sum_sq = values
    mu = torch.tensor(MU, device=logprobs.device)
    leaves = [value.detach().clone().requires_grad_() for value in (logprobs, entropy)]
    with library.use_backend(backend):
        got = hybrid_loss(leaves[0], batch, objective, mu, entropy=leaves[1], sum_sq=sum_sq)
        gradients = torch.autograd.grad(got.loss, leaves)

    exact = [value.detach().double().requires_grad_() for value in (logprobs, entropy)]
    want = reference.hybrid_loss(
        exact[0], _double(batch), objective, mu.double(), entropy=exact[1], sum_sq=sum_sq.double()
    )
    want_gradients = [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(exact, torch.autograd.grad(want.loss, exact, allow_unused=True), strict=True)
    ]
    worst = _largest(got, want, torch.where(batch.mask, logprobs.detach(), 0.0), want_gradients[0])
    for name, value, exact_value in zip(("gradient", "entropy gradient"), gradients, want_gradients, strict=True):
        worst = max(worst, compare(name, value, exact_value, elementwise_bound(exact_value, torch.float32)))
    return worst


def _compare_logits(objective: HybridObjective, batch: TokenBatch, logits: Tensor, backend: str) -> float:
    """The same from logits, gradient in place; 16-bit gradients are rounded to their own precision."""
    mu, heat, cap = torch.tensor(MU, device=logits.device), 0.8, 20.0
    transform = LogitTransform(heat, softcap=cap)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    with library.use_backend(backend):
        got = hybrid_loss_from_logits(leaf * 1.0, batch, objective, mu, transform=transform, inplace=True)
        (gradient,) = torch.autograd.grad(got.loss, leaf)
    want = reference.hybrid_loss_from_logits(exact, _double(batch), objective, mu.double(), transform=transform)
    (want_gradient,) = torch.autograd.grad(want.loss, exact)
    worst = _largest(got, want, want.logprobs, want_gradient.abs().sum(-1))
    # An exponential has the rounding of its exponent: of the difference, its factor and the cap's two products.
    z = cap * torch.tanh(exact.detach() / cap) / heat
    depth = torch.where(batch.mask[..., None], z.amax(-1, keepdim=True) - z, 0.0)
    bound = elementwise_bound(want_gradient, logits.dtype) + 4 * rounding(torch.float32) * depth * want_gradient.abs()
    return max(worst, compare("gradient", gradient, want_gradient, bound))


def _largest(got: HybridLoss, want: HybridLoss, logprobs: Tensor, slopes: Tensor) -> float:
    """Largest error of everything but the gradient. ``slopes``: by which rounding of the log-probs moves the loss."""
    dtype = torch.float32
    # Its parts are not weighted with mu, hence the division.
    condition = (slopes.abs() * torch.where(slopes == 0, 0.0, logprobs.abs() + 1.0)).sum() / MU
    worst = 0.0
    for name in ("loss", "policy_loss", "supervised_loss", "kl", "entropy"):
        value = getattr(want, name)
        worst = max(worst, compare(name, getattr(got, name), value, scalar_bound(value, dtype, condition)))
    worst = max(worst, compare("logprobs", got.logprobs, want.logprobs, elementwise_bound(want.logprobs, dtype)))
    rows = want.signals.rows
    worst = max(worst, compare("signals", got.signals.rows, rows, column_bound(rows, dtype)))
    for name, value in got.metrics.items():
        worst = max(worst, compare(name, value, want.metrics[name], metric_bound(want.metrics[name], dtype)))
    return worst


def _double(batch: TokenBatch) -> TokenBatch:
    floats = ("advantages", "old_logprobs", "ref_logprobs", "rollout_weights", "base_logits")
    values = {name: value.double() for name in floats if (value := getattr(batch, name)) is not None}
    return replace(batch, **values)
