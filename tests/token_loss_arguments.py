"""Arguments for the token-level operator itself, and its errors against the eager reference in float64."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

import gac_kernels as gk
from gac_kernels import schemas, signals

NAMES = ("loss", "scalars", "rows", "logprobs", "slope", "entropy_slope")
# Positions of token_loss's tensor arguments, and which of them run over the tokens or the sequences.
LOGPROBS, MASK, CU_SEQLENS, SEQ_LEN, IS_EXPERT, ADVANTAGES, TOKEN_ADVANTAGES = range(7)
OLD, REF, ROLLOUT, ENTROPY, SUM_SQ, SUPERVISED, GROUPS, MU = range(7, 15)
TOKEN_ARGUMENTS = (LOGPROBS, MASK, OLD, REF, ROLLOUT, ENTROPY, SUM_SQ)
POISON = (math.nan, math.inf, -math.inf)
# Around the vector widths 4, 8 and 16, around blocks of 32 vectors, nothing, one token.
LENGTHS = (5, 0, 16, 17, 1, 511, 512, 513, 530, 8, 33, 4, 129, 256)


def compiled(*args):
    return torch.ops.gac_kernels.token_loss.default(*args)


def reference(*args):
    return torch.ops.gac_kernels.token_loss_reference.default(*args)


def arguments(
    objective: gk.HybridObjective, *, dtype=torch.float32, lengths=LENGTHS, packed=True, seed=0, token_advantages=False,
    optional=(OLD, REF, ROLLOUT, ENTROPY, SUM_SQ), spread=0.5, poison=True, denominators=(None, None),
) -> list:  # fmt: skip
    """The operator's arguments for random sequences of these lengths; the values are exact in float32."""
    g = torch.Generator().manual_seed(seed)
    S, T = len(lengths), max([*lengths, 0])
    if packed:
        N, inside = sum(lengths), torch.ones(sum(lengths), dtype=torch.bool)
    else:
        N, inside = S * T, (torch.arange(T)[None] < torch.tensor(lengths, dtype=torch.long)[:, None]).reshape(-1)

    def rand(*shape):
        return torch.rand(*shape, generator=g)

    mask = inside & (rand(N) > 0.1)
    logprobs = -4 * rand(N)
    values = {
        LOGPROBS: logprobs, OLD: logprobs + spread * (rand(N) - 0.5), REF: logprobs + spread * (rand(N) - 0.5),
        ROLLOUT: 0.5 + rand(N), ENTROPY: 3 * rand(N), SUM_SQ: rand(N),
    }  # fmt: skip
    advantages = torch.randn(N if token_advantages else S, generator=g)
    if poison:
        for k, value in enumerate(values.values()):
            value[~mask] = POISON[k % 3]
        if token_advantages:
            advantages[~mask] = math.nan
    value = {k: v.to(dtype) if k in (LOGPROBS, *optional) else None for k, v in values.items()}
    return [
        value[LOGPROBS], mask, torch.tensor([0, *itertools.accumulate(lengths)]) if packed else None,
        0 if packed else T,
        torch.arange(S) % 3 == 1, advantages.to(dtype), token_advantages, value[OLD], value[REF], value[ROLLOUT],
        value[ENTROPY], value[SUM_SQ], None, torch.arange(S) % 4, torch.tensor(0.375, dtype=dtype),
        *(None if d is None else torch.tensor(d, dtype=dtype) for d in denominators),
        *schemas.encode(objective, objective.norm_length or 64.0),
    ]  # fmt: skip


def double(args: list) -> list:
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args]


def errors(args: list, operator=compiled) -> dict[str, float]:
    """Largest error of each output against the float64 reference, relative to 1 + |value|; for rows, sums over tokens
    whose rounding goes with the number and size of their terms, relative to tokens + the row's largest value."""
    worst = {}
    for name, got, want in zip(NAMES, operator(*args), reference(*double(args)), strict=True):
        assert got.shape == want.shape, name
        assert got.dtype == args[LOGPROBS].dtype, name
        assert torch.equal(got.isnan(), want.isnan()), f"{name}: nan in other places"
        scale = 1 + want.abs()
        if name == "rows" and len(want):
            scale = scale + want[:, [signals.TOKENS]] + want.abs().amax(-1, keepdim=True)
        worst[name] = float(((got.double() - want) / scale).abs().nan_to_num().max()) if got.numel() else 0.0
    return worst


def check(args: list, operator=compiled) -> None:
    """float32: within 1e-6, and where the mathematics amplifies the rounding of a log-ratio, about as close as eager
    PyTorch in float32 comes. float64: within rounding."""
    bound = 1e-12 if args[LOGPROBS].dtype == torch.float64 else 1e-6
    too_large = {name: error for name, error in errors(args, operator).items() if not error <= bound}
    if too_large and args[LOGPROBS].dtype == torch.float32:
        eager = errors(args, reference)
        too_large = {name: (error, eager[name]) for name, error in too_large.items() if error > 2 * eager[name] + bound}
    assert not too_large, f"errors above {bound}: {too_large}"


# Arguments of 4 and 6 tokens that do not fit: place, value and what the error says.
WRONG_ARGUMENTS = [
    (LOGPROBS, torch.zeros(10, dtype=torch.float16), "logprobs must have dtype float32 or float64"),
    (MASK, torch.ones(9, dtype=torch.bool), "mask must have 10 elements, got 9"),
    (MASK, torch.ones(10), "mask must have dtype bool"),
    (CU_SEQLENS, torch.tensor([0, 10]), "cu_seqlens must have 3 elements, got 2"),
    (CU_SEQLENS, torch.tensor([0, 5, 10], dtype=torch.int32), "cu_seqlens must have dtype int64"),
    (IS_EXPERT, torch.zeros(2), "is_expert must have dtype bool"),
    (ADVANTAGES, torch.zeros(3), "advantages must have 2 elements, got 3"),
    (OLD, torch.zeros(10, dtype=torch.float64), "old_logprobs must have dtype float32"),
    (REF, torch.zeros(20)[::2], "ref_logprobs must be contiguous"),
    (MU, torch.zeros(3), "mu must have 1 elements, got 3"),
    (17, 8, r"policy must be in \[0, 7\], got 8"),
    (17, 7, "groups must be given for DFPO"),
]


def ulps() -> dict[str, float]:
    """Errors in float32 ulp of r f'(r), of 1 - e^d and of phi, one token a sequence. The log-ratios are multiples of
    1/1024, so that subtracting is exact; beyond these ranges the functions amplify the rounding of their arguments."""
    worst = {}
    log_ratio = torch.arange(-3072.0, 1024.0) / 1024
    ones, live = torch.ones_like(log_ratio), torch.ones(len(log_ratio), dtype=torch.bool)
    args = arguments(gk.HybridObjective(), lengths=[1] * len(live), optional=(), poison=False)
    args[LOGPROBS], args[OLD], args[ADVANTAGES], args[MASK], args[IS_EXPERT] = (
        -3 * ones,
        -3 - log_ratio,
        -ones,
        live,
        ~live,
    )
    for gate in ("sigmoid", "erf", "arctan", "softsign"):
        args[17:] = schemas.encode(gk.HybridObjective(gk.SAPO(gate, 1.0, 1.0)), 1.0)
        worst[gate] = _ulp(args, signals.CR)
    args[17:] = schemas.encode(gk.HybridObjective(kl_coef=1.0), 1.0)
    args[OLD], args[REF], args[ADVANTAGES] = None, 4 * log_ratio - 3, 0 * ones
    worst["1 - e^d"] = _ulp(args, signals.CR)
    args[LOGPROBS], args[IS_EXPERT] = 16 * log_ratio.clamp(max=-1 / 32), live
    worst["phi"] = _ulp(args, signals.CS)
    return worst


def _ulp(args: list, column: int) -> float:
    got, want = compiled(*args)[2][:, column].double(), reference(*double(args))[2][:, column]
    return float(((got - want).abs() / (want.abs() * 2.0**-23).clamp(min=2.0**-126)).max())
