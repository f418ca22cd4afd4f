"""An objective's function run once on symbols: loss, slope and what its sums over a sequence take, as expressions."""

from __future__ import annotations

import dataclasses
from typing import Any

from .algebra import add, mul, negate, select
from .expression import ONE, ZERO, Node, fresh, node
from .symbol import LOGP, RULES, Symbol, mask, symbol


def _leaf(name: str, slope: Node = ZERO) -> Symbol:
    return Symbol(node("leaf", name), {LOGP: slope})


class SymbolicToken:
    """``Token`` of symbols."""

    def __init__(self) -> None:
        self.sums: list[tuple[str, Symbol]] = []
        self.logp, self.old_logp, self.ref_logp = _leaf("logp", ONE), _leaf("old_logp"), _leaf("ref_logp")
        self.advantage, self.entropy = _leaf("advantage"), _leaf("entropy")
        clamped = negate(node("mask", "alive"))  # where the clamp of the log-ratio acts
        self.log_ratio = _leaf("log_ratio", select(clamped, ZERO, ONE))
        self.p = RULES["exp"](self.logp)
        self.ratio, self.ratio_minus_one = RULES["exp"](self.log_ratio), RULES["expm1"](self.log_ratio)

    def __getattr__(self, name: str) -> Any:
        values = "logp, old_logp, ref_logp, advantage, p, entropy, log_ratio, ratio, ratio_minus_one"
        raise AttributeError(f"a token has no {name}; it has {values}, sequence_sum(x) and sequence_mean(x)")

    def sequence_sum(self, x: Any) -> Symbol:
        return self._sum("sum", x)

    def sequence_mean(self, x: Any) -> Symbol:
        return self._sum("mean", x)

    def _sum(self, kind: str, x: Any) -> Symbol:
        x = symbol(x)
        if any(leaf.op == "sum" for leaf in x.value.leaves) or set(x.slopes) - {LOGP}:
            raise TypeError("a sum over a sequence must be of the tokens' own values, not of another sum")
        known = [(how, same.value, same.slopes) for how, same in self.sums]
        if (kind, x.value, x.slopes) not in known:
            self.sums.append((kind, x))
            known.append((kind, x.value, x.slopes))
        number = known.index((kind, x.value, x.slopes))
        return Symbol(node("sum", number), {number: ONE})


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceSum:
    """A sum or mean over the live tokens of a sequence, and its part in the loss."""

    kind: str  # "sum" | "mean"
    value: Node  # what is summed
    slope: Node  # d value / d logp
    pull: Node  # d loss / d sum, of each token


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is computed of a token. ``slope`` is the token's own; each sum brings ``gain * sum.slope`` to it, the gain
    being the pulls of all tokens of the sequence added up."""

    loss: Node
    slope: Node
    through: Node  # what the sums bring to the slope; `gain` nodes stand for the added-up pulls
    sums: tuple[SequenceSum, ...]
    clipped: Node | None  # a mask
    update: Node | None
    params: dict[Node, float]

    @property
    def leaves(self) -> frozenset[str]:
        """The token's values that are read."""
        roots = [self.loss, self.slope, *(n for s in self.sums for n in (s.value, s.slope, s.pull))]
        roots += [n for n in (self.clipped, self.update) if n is not None]
        return frozenset(str(n.args[0]) for root in roots for n in root.leaves if n.op == "leaf")


def _parametrised(objective: Any, params: dict[Node, float], prefix: str = "") -> Any:
    """A copy whose float fields are symbols; what a field of type float holds is one though it were written 1."""
    copy = object.__new__(type(objective))
    for field in dataclasses.fields(objective):
        value, name = getattr(objective, field.name), prefix + field.name
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = _parametrised(value, params, f"{name}.")
        elif isinstance(value, float) or (type(value) is int and "float" in str(field.type)):
            param = node("param", name)
            params[param] = float(value)
            value = Symbol(param)
        object.__setattr__(copy, field.name, value)
    return copy


def trace(objective: Any) -> Program:
    """The program of a :class:`PolicyObjective` or :class:`SupervisedObjective`.

    Raises:
        TypeError, AttributeError: in the objective's own line, where it does what has no meaning for a single token.
    """
    with fresh():
        t, params = SymbolicToken(), dict[Node, float]()
        own = _parametrised(objective, params)
        loss = own.loss(t)
        kind = type(objective).__name__
        if not isinstance(loss, (Symbol, int, float)) or isinstance(loss, bool):
            raise TypeError(f"{kind}.loss(t) must return a number a token, got {type(loss).__name__}")
        if isinstance(loss, Symbol) and loss.value.op in ("lt", "eq", "or", "not"):
            raise TypeError(f"{kind}.loss(t) must return a number a token, got a comparison")
        loss = symbol(loss)
        clipped = mask(own.clipped(t)) if hasattr(objective, "clipped") else None
        update = symbol(own.update(t)).value if hasattr(objective, "update") else None
        sums = tuple(
            SequenceSum(how, x.value, x.slopes.get(LOGP, ZERO), loss.slopes.get(k, ZERO))
            for k, (how, x) in enumerate(t.sums)
        )
        through = add(*(mul(node("gain", k), s.slope) for k, s in enumerate(sums) if s.pull is not ZERO))
        return Program(loss.value, loss.slopes.get(LOGP, ZERO), through, sums, clipped, update, params)
