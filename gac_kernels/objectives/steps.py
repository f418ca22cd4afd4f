"""A traced objective as a list of torch operations, which is walked for every batch: data, and no code that is made."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .expression import HOST, MASKS, MEANING, Node, number

LEAVES = ("logp", "old_logp", "ref_logp", "advantage", "entropy", "log_ratio")
_ALIVE = len(LEAVES)  # where it stands among the values
_LIKE = 0


def _smaller(a: Tensor | float, b: Tensor | float) -> Tensor:
    """Of two values, one of which may be a number."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.minimum(a, b)
    return a.clamp(max=b) if isinstance(a, Tensor) else b.clamp(max=a)  # type: ignore[union-attr]


def _larger(a: Tensor | float, b: Tensor | float) -> Tensor:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.maximum(a, b)
    return a.clamp(min=b) if isinstance(a, Tensor) else b.clamp(min=a)  # type: ignore[union-attr]


def _choice(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """``torch.where`` of two numbers in a tensor's dtype."""
    return torch.where(condition, torch.full((), a, dtype=like.dtype, device=like.device), b)


def _power(x: Tensor, exponent: float) -> Tensor:
    if exponent == 2:
        return x * x
    if exponent == 0.5:
        return torch.sqrt(x)
    return torch.rsqrt(x) if exponent == -0.5 else x**exponent


def _product(*factors: Tensor | float) -> Any:
    return functools.reduce(operator.mul, factors)


def _quotient(above: Tensor | float, *below: Tensor) -> Any:
    return functools.reduce(operator.truediv, below, above)


# As MEANING has them, but where an operand may be a number.
_FUNCTIONS: dict[str, Callable[..., Any]] = MEANING | {
    "add": lambda *x: functools.reduce(operator.add, x),
    "min": _smaller,
    "max": _larger,
    "lt": operator.lt,
    "eq": operator.eq,
}
Operand = int | float  # an int: the number of a value; a float: itself


class Steps:
    """The operations that give some nodes, in an order in which each finds its operands. Equal nodes are one."""

    def __init__(self, roots: Sequence[Node], params: dict[Node, float], sums: int) -> None:
        """``sums``: how many sums over the sequence there are."""
        self._params, self._sums = params, sums
        self._first = len(LEAVES) + 1 + 2 * sums
        self._place: dict[Node, Operand] = {}
        self._steps: list[tuple[Callable[..., Any], tuple[Operand, ...]]] = []
        results = [(self._operand(root), root.op in MASKS) for root in roots]
        self.steps, self.results = tuple(self._steps), tuple(results)

    def __call__(
        self, given: Sequence[Tensor | None], totals: Sequence[Tensor], gains: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """The values of the roots, one a token.

        Args:
            given: of ``LEAVES`` those that are read, and ``alive``, where the log-ratio's clamp does not act.
            totals, gains: of each sum over the sequence; either may be empty where it is not read.
        """
        empty = [None] * self._sums
        values: list[Any] = [*given, *(totals or empty), *(gains or empty)]
        for function, operands in self.steps:
            values.append(function(*(values[x] if isinstance(x, int) else x for x in operands)))
        return tuple(
            values[x] if isinstance(x, int) else torch.full_like(values[_ALIVE if mask else _LIKE], x)
            for x, mask in self.results
        )

    def _operand(self, n: Node) -> Operand:
        if n not in self._place:
            self._place[n] = self._placed(n)
        return self._place[n]

    def _placed(self, n: Node) -> Operand:
        if n.level == HOST:
            return number(n, self._params)
        if n.op == "leaf":
            return LEAVES.index(n.args[0])
        if n.op == "mask":
            return _ALIVE
        if n.op in ("sum", "gain"):
            return len(LEAVES) + 1 + n.args[0] + (self._sums if n.op == "gain" else 0)
        return self._step(n)

    def _step(self, n: Node) -> Operand:
        if n.op == "pow":
            x = self._operand(n.args[0])
            if n.args[1] == -1:
                return self._push(_quotient, 1.0, x)
            return self._push(_power, x, float(n.args[1]))
        if n.op == "mul":
            return self._mul(n)
        operands = [self._operand(a) for a in n.args]
        if n.op == "select" and not any(isinstance(x, int) for x in operands[1:]):
            return self._push(_choice, *operands, _LIKE)
        return self._push(_FUNCTIONS[n.op], *operands)

    def _mul(self, n: Node) -> Operand:
        """Factors first, then the divisors: one rounding each."""
        below = [a.args[0] for a in n.args if a.op == "pow" and a.args[1] == -1 and a.level > HOST]
        above = [self._operand(a) for a in n.args if not (a.op == "pow" and a.args[1] == -1 and a.level > HOST)]
        product = above[0] if len(above) == 1 else self._push(_product, *above) if above else 1.0
        return self._push(_quotient, product, *map(self._operand, below)) if below else product

    def _push(self, function: Callable[..., Any], *operands: Operand) -> int:
        self._steps.append((function, operands))
        return self._first + len(self._steps) - 1
