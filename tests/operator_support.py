"""Arguments of every raw operator that fit, and what a hostile caller puts in their place."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import gac_kernels as gk
from gac_kernels import controller_schema, schemas

S, T, V, H = 3, 5, 7, 4
N = S * T
STATIC = schemas.encode_rows(gk.LogitTransform(), None)


def _token_loss(rng: random.Random) -> list[Any]:
    policy = rng.choice(
        [gk.SAPO(), gk.GRPO(delta=3.0), gk.CISPO(), gk.GSPO(), gk.DFPO(), gk.DFPO("adv_orthogonal", "product")]
    )
    objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.1)
    packed = rng.random() < 0.5
    token = [-torch.rand(N) for _ in range(6)]
    return [
        token[0], torch.rand(N) > 0.2, torch.tensor([0, 4, 9, N]) if packed else None, 0 if packed else T,
        torch.tensor([False, True, False]), torch.randn(S), False, token[1], token[2], -token[3], -token[4], -token[5],
        None, torch.tensor([0, 1, 0]), torch.tensor(0.5), None, torch.tensor(3.0), *schemas.encode(objective, 9.0),
    ]  # fmt: skip


def _token_weights(rng: random.Random) -> list[Any]:
    loss = _token_loss(rng)
    return [*loss[1:7], loss[14], None, torch.tensor(3.0), *schemas.encode_weights(gk.HybridObjective(), 9.0)]


def _rows(rng: random.Random) -> tuple[Tensor, list[Any]]:
    dtype = rng.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64])
    acc = torch.promote_types(dtype, torch.float32)
    base = torch.randn(S, T, V, dtype=dtype) if rng.random() < 0.5 else None
    kind = torch.tensor([0, 1, 2, 1, 2], dtype=torch.uint8).repeat(S)
    return torch.randn(S, T, V).to(dtype), [torch.randint(V, (N,)), kind, torch.rand(N, dtype=acc) + 0.5, base]


def _row_statistics(rng: random.Random) -> list[Any]:
    logits, rows = _rows(rng)
    return [logits, *rows, *STATIC]


def _row_gradient(rng: random.Random) -> list[Any]:
    logits, rows = _rows(rng)
    acc = torch.promote_types(logits.dtype, torch.float32)
    given = [torch.rand(N, 2 if rows[3] is None else 4, dtype=acc), *(torch.rand(N, dtype=acc) for _ in range(3))]
    return [logits, *rows, *given, *STATIC]


def _fused_rows(rng: random.Random) -> list[Any]:
    logits, rows = _rows(rng)
    acc = torch.promote_types(logits.dtype, torch.float32)
    policy = rng.choice([gk.SAPO("erf"), gk.SAPO("arctan"), gk.GRPO(), gk.CISPO()])
    tokens = [torch.rand(N, dtype=acc) for _ in range(5)]
    return [logits, *rows, *tokens, *STATIC, *schemas.encode_term(gk.HybridObjective(policy, kl_coef=0.1))]


def _scale(rng: random.Random) -> list[Any]:
    gradient = torch.randn(S, T, 2 * V)
    return [gradient if rng.random() < 0.5 else gradient[:, ::2, :V], torch.tensor(0.5)]


def _controller_step(rng: random.Random) -> list[Any]:
    config = gk.ControllerConfig(
        estimator=rng.choice(["coefficient", "logit", "hidden"]), update_every=1, znorm=rng.random() < 0.5,
        alpha=rng.choice([0.5, gk.KLTarget()]),
    )  # fmt: skip
    state = torch.zeros(controller_schema.STATE_NUMBERS, dtype=torch.float64)
    kl = torch.tensor(0.1, dtype=torch.float64)
    encoded = controller_schema.encode_config(config)
    return [state, torch.rand(8, 12) + 0.5, torch.rand(8, H), None, kl, *encoded, 0, 0, 0.0]


def _moments(rng: random.Random) -> list[Any]:
    return [[torch.randn(3), torch.randn(40000)], [torch.randn(3), torch.randn(40000)]]


def _group_advantages(rng: random.Random) -> list[Any]:
    ids = torch.tensor([2, 1, 2, 1, 3, 3]) if rng.random() < 0.5 else None
    return [torch.rand(6), ids, 3, rng.random() < 0.5, rng.randrange(2), rng.randrange(3), 1e-6]


def _head(rng: random.Random) -> list[Any]:
    kind = torch.tensor([0, 1, 2, 1, 2], dtype=torch.uint8).repeat(S)
    return [
        torch.randn(S, T, H), torch.randn(V, H), torch.randn(V), torch.randint(V, (N,)), kind, None, None, None, None,
        None,
    ]  # fmt: skip


def _linear_loss(rng: random.Random) -> list[Any]:
    tokens = [torch.rand(N) for _ in range(5)]
    return [*_head(rng), *tokens, 4, True, True, True, *STATIC, *schemas.encode_term(gk.HybridObjective())]


def _linear_statistics(rng: random.Random) -> list[Any]:
    return [*_head(rng), 4, *STATIC]


def _linear_gradient(rng: random.Random) -> list[Any]:
    return [*_head(rng), torch.rand(N, 2), *(torch.rand(N) for _ in range(3)), 4, True, True, True, *STATIC]


MAKE = {
    "token_loss": _token_loss, "token_weights": _token_weights, "row_statistics": _row_statistics,
    "row_gradient": _row_gradient, "row_gradient_": _row_gradient, "fused_rows": _fused_rows,
    "fused_rows_": _fused_rows, "scale_": _scale, "controller_step": _controller_step, "gradient_moments": _moments,
    "accumulate_moments_": _moments, "group_advantages": _group_advantages, "linear_loss": _linear_loss,
    "linear_statistics": _linear_statistics, "linear_gradient": _linear_gradient,
}  # fmt: skip

INTEGERS = (-(2**63), -(2**31), -20, -1, 0, 1, 2, 3, 4, 7, 8, 16, 255, 2**31, 2**62, 2**63 - 1)
NUMBERS = (
    float("nan"),
    float("inf"),
    -float("inf"),
    -1e300,
    -3.0,
    -1.0,
    -0.0,
    0.0,
    5e-324,
    0.49,
    0.5,
    0.9,
    1.0,
    7.0,
    1e300,
)
DTYPES = (
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.float8_e4m3fn,
)  # fmt: skip


def _hostile_values(value: Tensor, rng: random.Random) -> Tensor:
    """The same shape and dtype, with contents that nobody checks."""
    pick = [rng.choice(NUMBERS if value.is_floating_point() else INTEGERS) for _ in range(value.numel())]
    if value.dtype in (torch.bool, torch.uint8):
        return torch.tensor([each % 256 for each in pick], dtype=torch.uint8).view(value.dtype).view(value.shape)
    if value.is_floating_point():
        return torch.tensor(pick, dtype=torch.float64).to(value.dtype).view(value.shape)
    return torch.tensor(pick, dtype=torch.int64).to(value.dtype).view(value.shape)


def _other_shape(value: Tensor, rng: random.Random) -> Tensor:
    flat = value.reshape(-1)
    return rng.choice([
        flat[:-1], flat[:0], flat[: len(flat) // 2], torch.cat([flat, flat]), value[None], flat, value.sum(),
        value.new_zeros((0, *value.shape[1:])), value.new_zeros((*value.shape, 0)),
    ])  # fmt: skip


def _strided(value: Tensor, rng: random.Random) -> Tensor:
    if not value.ndim:
        return value
    doubled = torch.cat([value, value], -1)
    return rng.choice(
        [doubled[..., ::2], value.new_zeros(()).expand(value.shape), value.mT if value.ndim > 1 else value]
    )


def _freed(value: Tensor, rng: random.Random) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(0)
    return value


def _shrunk(value: Tensor, rng: random.Random) -> Tensor:
    value = value.clone()
    value.untyped_storage().resize_(value.untyped_storage().nbytes() // 2)
    return value


def _elsewhere(value: Tensor, rng: random.Random) -> Tensor:
    if value.dtype is torch.bool or not value.ndim:
        return value.to("meta")
    return rng.choice([lambda: value.to("meta"), lambda: value.to_sparse()])()


def hostile(value: Any, kind: int, rng: random.Random, shrink: bool) -> Any:
    """Something else in the place of an argument; ``shrink``: also half of its memory taken away."""
    if isinstance(value, list):
        return [hostile(each, kind, rng, shrink) for each in value][: rng.choice([2, 2, 2, 1, 0])]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice(INTEGERS)
    if isinstance(value, float):
        return rng.choice(NUMBERS)
    if value is None:
        return rng.choice([torch.zeros(N), torch.zeros(0), torch.zeros(S, T, V), torch.tensor([-5, 2**62, -1, N])])
    ways = [
        _hostile_values, _hostile_values, _other_shape, _strided, _freed, _shrunk if shrink else _freed, _elsewhere,
        lambda value, rng: value.to(rng.choice(DTYPES)), lambda value, rng: None,
    ]  # fmt: skip
    return ways[kind % len(ways)](value, rng)
