"""A gate of the user's own for SAPO, and the conditions that it must meet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gate:
    """A gate of the user's own for SAPO: ``f(u, tau)`` and its derivative, elementwise on a float tensor ``u = r - 1``.

    It is checked at every temperature it is used with for the conditions of the gate study (arXiv 2602.19345v2):
    continuously differentiable; ``f'`` has its global maximum 1 at ``r = 1``; ``f'`` falls away from 1 on both sides;
    ``r f'(r) -> 0``. Custom gates have one implementation, the eager reference, on every device.

    Attributes:
        name: shown in errors and reports.
        value: ``f(u, tau) -> Tensor``.
        slope: ``f'(u, tau) -> Tensor``, the derivative by ``u``.
    """

    name: str
    value: Callable[[Tensor, float], Tensor]
    slope: Callable[[Tensor, float], Tensor]

    def __post_init__(self) -> None:
        for name in ("value", "slope"):
            if not callable(getattr(self, name)):
                raise TypeError(f"Gate.{name} must be a function of (u, tau), got {type(getattr(self, name)).__name__}")

    def check(self, tau: float) -> None:
        """Raise ValueError naming the violated condition; all four are tested in float64 on a dense grid of ratios."""
        log_r = torch.linspace(-20.0, 20.0, 8001, dtype=torch.float64)
        near = torch.linspace(-1.0, 6.0, 14001, dtype=torch.float64)
        u = torch.unique(torch.cat([torch.expm1(log_r), near, near.clamp(-1, 1) / max(1.0, tau)]))
        f1 = self.slope(u, tau)
        for name, got in (("slope", f1), ("value", self.value(u, tau))):
            if not isinstance(got, Tensor) or got.shape != u.shape:
                came = tuple(got.shape) if isinstance(got, Tensor) else type(got).__name__
                self._fail(tau, f"{name} must give a tensor of the shape of u, {tuple(u.shape)}; it gave {came}")
        if not bool(torch.isfinite(f1).all()):
            self._fail(tau, "f' must be finite for every ratio in [e^-20, e^20]")
        self._check_derivative(near, tau)
        at_one = float(self.slope(torch.zeros(1, dtype=torch.float64), tau))
        if abs(at_one - 1.0) > 1e-6 or float(f1.max()) > 1.0 + 1e-6:
            self._fail(
                tau, f"f' must have its global maximum 1 at r = 1; f'(1) = {at_one:.6g}, max {float(f1.max()):.6g}"
            )
        right, left = f1[u > 0], f1[u < 0].flip(0)
        if bool((right.diff() > 1e-9).any()) or bool((left.diff() > 1e-9).any()):
            self._fail(tau, "f' must fall away from r = 1 on both sides")
        if float(right[-1]) > 0.5 or float(left[-1]) >= 1.0:
            self._fail(tau, "f' must fall away from r = 1 on both sides; it stays level")
        r = torch.tensor([1e4, 1e8, 1e12], dtype=torch.float64)
        tail = r * self.slope(r - 1.0, tau)
        if not bool(torch.isfinite(tail).all()) or bool((tail[1:] > 0.5 * tail[:-1] + 1e-12).any()):
            self._fail(tau, f"r f'(r) must go to 0; at r = 1e4, 1e8, 1e12 it is {[f'{v:.3g}' for v in tail.tolist()]}")

    def _check_derivative(self, u: Tensor, tau: float) -> None:
        """f' is f's derivative (central differences), and f' has no jump (its steps shrink with the grid's)."""
        step = 1e-5
        numeric = (self.value(u + step, tau) - self.value(u - step, tau)) / (2 * step)
        error = float((numeric - self.slope(u, tau)).abs().max())
        if not error < 1e-4:
            self._fail(tau, f"slope must be the derivative of value; they differ by up to {error:.3g}")
        coarse = self.slope(u, tau).diff().abs()
        worst = int(coarse.argmax())
        fine = self.slope(torch.linspace(float(u[worst]), float(u[worst + 1]), 65, dtype=u.dtype), tau).diff().abs()
        if float(fine.max()) > 0.25 * float(coarse[worst]) + 1e-12:
            self._fail(tau, f"f' must be continuous; it jumps near r = {1.0 + float(u[worst]):.4g}")

    def _fail(self, tau: float, why: str) -> None:
        raise ValueError(f"gate {self.name!r} is not admissible at tau = {tau:g}: {why}")
