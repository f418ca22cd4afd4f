"""The unit that float16 gradients are made in, before a loss scale is known.

float16 ends at 6e-8 and at 65504, float32 at 1e-38 and 3e38. A gradient divided by the 1e6 tokens of a step vanishes in
float16, and a loss scale that comes with the upstream gradient is too late. So slopes are multiplied by a power of two
that brings the largest into the middle of float16's range, which changes no digit; what the passes make is kept in
float32, and backward multiplies by ``unit * upstream`` and rounds once.

Where products are of float16 (a GPU), the gradient of a chunk's logits is float16 as well: there each row has a power
of its own, so that a token of small weight is not lost beside one of a large weight. ``shrink_N`` takes it back.

Shapes: N tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import HybridObjective
from .schemas import ROLLOUT

# log2 of where the largest slope is brought to. Where it is known only but for the importance ratio there is room for a
# ratio of 4096; where it is known there is room for the entropy's gradient, whose factor stays below 16.
_EXPECTED, _KNOWN = 3, 11
_MANTISSA, _EXPONENT, _ONE = 23, 0x7F800000, 127


class Units(NamedTuple):
    """Powers of two, exact: what slopes are multiplied by, what takes it back, and what is left of it in each row."""

    power: Tensor  # (N,) or 0-d
    unit: Tensor  # 0-d, of dW, db and dh
    shrink_N: Tensor | None  # at most 1: a row's power was larger by its inverse


def _powers(size: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Powers of two that bring ``size`` into ``[2^place, 2^(place + 1))``, and their inverses."""
    # The bits of a float32 but for sign and mantissa are the power of two below it; kept where its inverse is normal.
    exponent = ((size.view(torch.int32) & _EXPONENT) >> _MANTISSA) - place
    exponent = exponent.clamp(1, 2 * _ONE - 1)
    return ((2 * _ONE - exponent) << _MANTISSA).view(torch.float32), (exponent << _MANTISSA).view(torch.float32)


def _units(size_N: Tensor, place: int, by_row: bool) -> Units:
    """Of the largest finite size, or of each row's own. Nothing is read by the host."""
    if size_N.numel() == 0:
        return Units(size_N.new_ones(()), size_N.new_ones(()), None)
    size_N = size_N.abs().nan_to_num(nan=0.0, posinf=0.0)
    power, unit = _powers(size_N.amax(), place)
    if not by_row:
        return Units(power, unit, None)
    own_N, back_N = _powers(size_N, place)
    return Units(own_N, unit, back_N * power)


def _heat(temperature: Tensor | None, scale: float, value: float) -> Tensor | float:
    """The largest factor between a row's slope and its gradient: the transform's."""
    return abs(scale) / (value if temperature is None else temperature)


def weights_in_unit(
    weight_N: Tensor, kind: Tensor, temperature: Tensor | None, advantages: Tensor | None, rollout: Tensor | None,
    static: tuple[float, ...], objective: HybridObjective, by_row: bool,
) -> tuple[Tensor, Units]:  # fmt: skip
    """The weights of tokens whose slopes are still to be made, in their unit. ``static``: of the transform, as in the
    schema."""
    own_N = torch.zeros_like(weight_N) if advantages is None else advantages.abs()
    own_N = own_N if rollout is None else own_N * rollout.abs()
    least = max(objective.kl_coef, objective.entropy_coef, 2.0**-20)  # so that a batch of zeros stays finite
    size_N = weight_N * torch.where(kind == ROLLOUT, own_N.clamp(min=least), 1.0)
    units = _units(size_N * _heat(temperature, static[0], static[2]), _EXPECTED, by_row)
    return weight_N * units.power, units


def slopes_in_unit(
    slope: Tensor, entropy_slope: Tensor | None, temperature: Tensor | None, static: tuple[float, ...], by_row: bool
) -> tuple[Tensor, Tensor | None, Units]:
    """Slopes that are known, in their unit."""
    size_N = slope.abs() if entropy_slope is None else torch.maximum(slope.abs(), entropy_slope.abs())
    units = _units(size_N * _heat(temperature, static[0], static[2]), _KNOWN, by_row)
    return slope * units.power, None if entropy_slope is None else entropy_slope * units.power, units


def rounded(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``gradient * factor`` in another ``dtype``, rounded once."""
    if torch.compiler.is_compiling():
        return (gradient * factor).to(dtype)
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
