"""Expressions of one token: nodes that are interned, so that equal expressions are one object.

What is shared is then found by looking, and what is equal on paper is equal by ``is``. Nodes belong to the trace that
makes them (:func:`fresh`), of which threads may run several at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

# Where a value is known: from the objective's parameters alone, from sums over a sequence, from a token.
HOST, SEQUENCE, TOKEN = range(3)
_LEVELS = {"const": HOST, "param": HOST, "sum": SEQUENCE, "gain": SEQUENCE, "leaf": TOKEN, "mask": TOKEN}
MASKS = ("lt", "eq", "or", "not", "mask")


def expm1_minus(x: Tensor) -> Tensor:
    """``e^x - 1 - x``, of a small ``x`` by its series: the difference would cancel there."""
    series = torch.full_like(x, 1 / 3628800)  # 1 / 10!
    for divisor in (362880, 40320, 5040, 720, 120, 24, 6, 2):
        series = series * x + 1 / divisor
    return torch.where(x.abs() < 0.5, series * x * x, torch.expm1(x) - x)


# The value of every operation on tensors: it folds constants, and checks a trace.
MEANING: dict[str, Callable[..., Tensor]] = {
    "add": lambda *x: functools.reduce(torch.add, x),
    "mul": lambda *x: functools.reduce(torch.mul, x),
    "pow": lambda x, exponent: x**exponent,
    "min": torch.minimum,
    "max": torch.maximum,
    "abs": torch.abs,
    "select": torch.where,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "expm1mx": expm1_minus,
    "log": torch.log,
    "log1p": torch.log1p,
    "erf": torch.erf,
    "atan": torch.atan,
    "sigmoid": torch.sigmoid,
    "dsigmoid": lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    "tanh": torch.tanh,
    "dtanh": lambda x: 1 / torch.cosh(x) ** 2,
    "lt": torch.lt,
    "eq": torch.eq,
    "not": torch.logical_not,
    "or": lambda *x: functools.reduce(torch.logical_or, x),
}


class Node:
    """An operation and its arguments: nodes, and numbers or names where the operation takes them."""

    __slots__ = ("args", "leaves", "level", "op", "order")

    def __init__(self, op: str, args: tuple[Any, ...], order: int) -> None:
        self.op, self.args, self.order = op, args, order
        inner = [a for a in args if isinstance(a, Node)]
        self.level: int = max((a.level for a in inner), default=_LEVELS.get(op, TOKEN))
        own = {self} if op in ("leaf", "sum", "param") else set()
        self.leaves: frozenset[Node] = frozenset(own.union(*(a.leaves for a in inner)))

    def __repr__(self) -> str:
        return f"{self.op}({', '.join(map(repr, self.args))})"


ZERO, ONE = Node("const", (0.0,), 0), Node("const", (1.0,), 1)
_interned: ContextVar[dict[tuple[Any, ...], Node] | None] = ContextVar("interned", default=None)


@contextmanager
def fresh() -> Iterator[None]:
    """A new trace: what it makes does not depend on what was traced before."""
    before = _interned.set({("const", (n.args[0],)): n for n in (ZERO, ONE)})
    try:
        yield
    finally:
        _interned.reset(before)


def _table() -> dict[tuple[Any, ...], Node]:
    table = _interned.get()
    assert table is not None, "nodes are made inside of fresh()"
    return table


def const(x: float) -> Node:
    table, args = _table(), (float(x),)
    if args[0] == 0:
        return ZERO  # of either sign
    return table.setdefault(("const", args), Node("const", args, len(table)))


def node(op: str, *args: Any) -> Node:
    """The node of ``op`` on ``args``; of constants, its value."""
    if op in MEANING and all(not isinstance(a, Node) or a.op == "const" for a in args):
        return const(float(evaluate(Node(op, args, 0), {})))
    table = _table()
    return table.setdefault((op, args), Node(op, args, len(table)))


def evaluate(n: Node, given: dict[Node, Tensor]) -> Tensor:
    """The value of a node in float64; ``given`` holds its leaves', and receives every other."""
    if n not in given:
        if n.op == "const":
            given[n] = torch.tensor(n.args[0], dtype=torch.float64)
        else:
            given[n] = MEANING[n.op](*(evaluate(a, given) if isinstance(a, Node) else a for a in n.args))
    return given[n]


def number(n: Node, values: dict[Node, float]) -> float:
    """The value of a node that parameters alone decide; ``values``: of the parameters."""
    assert n.level == HOST
    return float(evaluate(n, {p: torch.tensor(x, dtype=torch.float64) for p, x in values.items()}))
