"""Holding float results against float64: one comparison and one set of bounds for benchmarks and self-tests."""

from __future__ import annotations

import torch
from torch import Tensor


class WrongResult(Exception):
    """A result is not that of the reference. What gave it is then not timed."""


def rounding(dtype: torch.dtype) -> float:
    """Epsilon of the dtype in which log-probs of ``dtype`` are computed."""
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def summation(dtype: torch.dtype, terms: int) -> float:
    """Relative error of a plain sum of that many terms of one sign: 4 roundings, and sqrt(terms) of half a last place,
    which is probable (Higham and Mary, 2019) and seen of PyTorch's log_softmax."""
    return rounding(dtype) * (4.0 + 0.5 * terms**0.5)


def scalar_bound(want: Tensor, dtype: torch.dtype, condition: Tensor | float = 0.0) -> Tensor:
    """4 roundings of the result and of what one rounding of every input moves it by (``condition``: the sum over inputs
    of ``|derivative x|``, which matters where long sums cancel), and an absolute 1e-6 (float64: 1e-15)."""
    return 4 * rounding(dtype) * (want.abs() + condition) + (1e-6 if rounding(dtype) > 1e-10 else 1e-15)


def elementwise_bound(want: Tensor, dtype: torch.dtype) -> Tensor:
    """32 roundings, since a term is a dozen operations and an ``exp`` costs a few roundings of its argument, and 4 of
    the largest element. In half precision also the one rounding of the result."""
    half = torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0
    largest = want.abs().amax() if want.numel() else want.new_zeros(())
    return (32 * rounding(dtype) + half) * want.abs() + 4 * rounding(dtype) * largest


def column_bound(want_SC: Tensor, dtype: torch.dtype) -> Tensor:
    """Of sums over a sequence: 32 roundings of the largest in the column."""
    return (32 * rounding(dtype) * want_SC.abs().amax(0)).expand_as(want_SC)


def metric_bound(want: Tensor, dtype: torch.dtype) -> Tensor:
    """32 roundings, and 8 of 1, which the ratios are close to."""
    return 32 * rounding(dtype) * want.abs() + 8 * rounding(dtype)


def compare(name: str, got: Tensor, want: Tensor, bound: Tensor) -> float:
    """Largest error, in units of its bound; a bound of 0 asks for equality, and nan is never right.

    Raises:
        WrongResult: above 1, or where the shapes differ.
    """
    if got.shape != want.shape:
        raise WrongResult(f"{name} has shape {tuple(got.shape)}, the reference {tuple(want.shape)}")
    got, want = got.detach().double(), want.detach().double()
    error = (got - want).abs()
    ratio = torch.where(error == 0, 0.0, error / bound.detach().double())
    worst = float(ratio.max()) if ratio.numel() else 0.0
    if not worst <= 1.0:
        place = int(torch.where(ratio.isnan(), torch.inf, ratio).argmax())
        raise WrongResult(
            f"{name} is {float(got.flatten()[place]):.6g} where the float64 reference has "
            f"{float(want.flatten()[place]):.6g} ({worst:.3g} times the bound)"
        )
    return worst
