"""A token's values as symbols: torch's operations on them, with their derivatives by the chain rule.

A :class:`Symbol` is an expression and its derivatives: by the token's log-prob, and by each sum over its sequence. One
run of an objective's function on symbols gives its loss and its slope as expressions (forward-mode differentiation).
"""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Callable, Hashable
from typing import Any

import torch

from . import algebra as al
from .algebra import add, any_of, exp, mul, neg, negate, power, select
from .expression import MASKS, ONE, ZERO, Node, const, node

LOGP = "logp"  # what slopes are by; beside it the numbers of sums over the sequence
RULES: dict[str, Callable[..., Symbol]] = {}


class Symbol:
    """A value and its derivatives; absent ones are 0."""

    __array_ufunc__ = None  # numpy leaves arithmetic to us

    def __init__(self, value: Node, slopes: dict[Hashable, Node] | None = None) -> None:
        self.value = value
        self.slopes = {of: slope for of, slope in (slopes or {}).items() if slope is not ZERO}

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.__name__.removeprefix("__").removesuffix("__")
        if name not in RULES:
            raise TypeError(f"torch.{name} has no rule in an objective; there are {', '.join(sorted(_public()))}")
        return RULES[name](*args, **(kwargs or {}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in RULES:
            raise AttributeError(f"a token's values have no .{name} in an objective")
        return functools.partial(RULES[name], self)

    def __bool__(self) -> bool:
        raise TypeError(
            "`if`, `and`, `or`, `not`, min() and max() cannot look at a token's value or at a float field: they differ "
            "from token to token and from call to call. Use torch.where, &, |, ~, torch.minimum or torch.maximum, or "
            "declare the field bool or str"
        )

    def __float__(self) -> float:
        raise TypeError("float() and functions of math need a number: use torch's function of the same name")

    __int__ = __index__ = __float__

    def __len__(self) -> int:
        raise TypeError("a token's value is one number: it has no elements and no dimensions")

    def __getitem__(self, index: object) -> Any:
        raise TypeError("a token's value is one number: other tokens enter by t.sequence_sum and t.sequence_mean alone")

    __iter__ = None
    __hash__ = None  # type: ignore[assignment]


def _public() -> set[str]:
    hidden = {"radd", "rsub", "rmul", "rdiv", "rtruediv", "rpow", "rand", "ror", "and", "or", "invert", "truediv"}
    return set(RULES) - hidden


def symbol(x: Any) -> Symbol:
    """A number where an operation takes one; a mask counts 0 and 1."""
    if isinstance(x, Symbol):
        return Symbol(select(x.value, ONE, ZERO)) if _is_mask(x.value) else x
    if isinstance(x, torch.Tensor) and x.ndim == 0 and x.device.type == "cpu":
        x = x.item()
    if not isinstance(x, numbers.Real):
        shape = f" of shape {tuple(x.shape)}" if hasattr(x, "shape") else ""
        raise TypeError(f"constants of an objective must be numbers, got {type(x).__name__}{shape}")
    return Symbol(const(float(x)))


def _is_mask(n: Node) -> bool:
    return n.op in MASKS


def mask(x: Any) -> Node:
    if isinstance(x, Symbol) and (_is_mask(x.value) or x.value in (ZERO, ONE)):
        return x.value
    if isinstance(x, bool):
        return ONE if x else ZERO
    came = "a number" if isinstance(x, Symbol) else type(x).__name__
    raise TypeError(f"torch.where, &, | and ~ of an objective take comparisons of a token's values, got {came}")


def rule(*names: str) -> Callable[[Callable[..., Symbol]], Callable[..., Symbol]]:
    def register(function: Callable[..., Symbol]) -> Callable[..., Symbol]:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def chain(value: Node, *parts: tuple[Symbol, Node]) -> Symbol:
    """``value`` with ``d value = sum of factor * d part``."""
    slopes = {of: add(*(mul(k, x.slopes.get(of, ZERO)) for x, k in parts)) for x, _ in parts for of in x.slopes}
    return Symbol(value, slopes)


# Functions of one value: value, and derivative from the argument x and the value y ---------------------------------
_UNARY: dict[str, tuple[Callable[[Node], Node], Callable[[Node, Node], Node]]] = {
    "exp": (exp, lambda x, y: y),
    "expm1": (al.expm1, lambda x, y: exp(x)),
    "log": (al.log, lambda x, y: power(x, -1)),
    "log1p": (lambda x: al.log(add(ONE, x)), lambda x, y: power(add(ONE, x), -1)),
    "sqrt": (lambda x: power(x, 0.5), lambda x, y: mul(const(0.5), power(x, -0.5))),
    "rsqrt": (lambda x: power(x, -0.5), lambda x, y: mul(const(-0.5), power(x, -1.5))),
    "square": (lambda x: power(x, 2), lambda x, y: mul(const(2), x)),
    "reciprocal": (lambda x: power(x, -1), lambda x, y: neg(power(x, -2))),
    "sigmoid": (al.sigmoid, lambda x, y: node("dsigmoid", x)),
    "tanh": (lambda x: node("tanh", x), lambda x, y: node("dtanh", x)),
    "erf": (lambda x: node("erf", x), lambda x, y: mul(const(2 / math.sqrt(math.pi)), exp(neg(mul(x, x))))),
    "atan arctan": (lambda x: node("atan", x), lambda x, y: power(add(ONE, mul(x, x)), -1)),
    "abs absolute": (lambda x: node("abs", x), lambda x, y: select(al.less(x, ZERO), const(-1), ONE)),
    "neg negative": (neg, lambda x, y: const(-1)),
    "sign": (
        lambda x: select(al.less(x, ZERO), const(-1), select(al.less(ZERO, x), ONE, ZERO)),
        lambda x, y: ZERO,
    ),
    "detach": (lambda x: x, lambda x, y: ZERO),
    "clone": (lambda x: x, lambda x, y: ONE),
}


def _unary(value: Callable[[Node], Node], slope: Callable[[Node, Node], Node]) -> Callable[[Any], Symbol]:
    def apply(x: Any) -> Symbol:
        x = symbol(x)
        y = value(x.value)
        return chain(y, (x, slope(x.value, y)))

    return apply


for _names, (_value, _slope) in _UNARY.items():
    rule(*_names.split())(_unary(_value, _slope))


@rule("float", "double", "to", "type_as")
def _cast(x: Any, *_: Any, **__: Any) -> Symbol:
    """Casts mean nothing: every value is computed in one dtype."""
    return symbol(x)


# Arithmetic --------------------------------------------------------------------------------------------------------
@rule("add", "radd")
def _add(a: Any, b: Any) -> Symbol:
    a, b = symbol(a), symbol(b)
    return chain(add(a.value, b.value), (a, ONE), (b, ONE))


@rule("mul", "rmul", "multiply")
def _mul(a: Any, b: Any) -> Symbol:
    a, b = symbol(a), symbol(b)
    return chain(mul(a.value, b.value), (a, b.value), (b, a.value))


@rule("sub", "subtract")
def _sub(a: Any, b: Any) -> Symbol:
    return _add(a, _mul(-1, b))


@rule("pow")
def _pow(a: Any, b: Any) -> Symbol:
    a, b = symbol(a), symbol(b)
    if b.value.op == "const" and b.value.args[0] * 2 % 1 == 0:  # whole and half powers
        e = b.value.args[0]
        return chain(power(a.value, e), (a, mul(const(e), power(a.value, e - 1))))
    return RULES["exp"](_mul(b, RULES["log"](a)))


@rule("div", "truediv", "true_divide", "divide")
def _div(a: Any, b: Any) -> Symbol:
    return _mul(a, _pow(b, -1))


rule("rsub")(lambda a, b: _sub(b, a))
rule("rdiv", "rtruediv")(lambda a, b: _div(b, a))
rule("rpow")(lambda a, b: _pow(b, a))


# Choices. At ties the whole gradient passes, where autograd would halve it ------------------------------------------
def _extreme(op: str, a: Any, b: Any) -> Symbol:
    a, b = symbol(a), symbol(b)
    value = al.extreme(op, a.value, b.value)
    of_a = al.less(a.value, b.value) if op == "min" else al.less(b.value, a.value)
    return Symbol(
        value, {of: select(of_a, a.slopes.get(of, ZERO), b.slopes.get(of, ZERO)) for of in a.slopes | b.slopes}
    )


@rule("minimum", "min")
def _minimum(a: Any, b: Any) -> Symbol:
    return _extreme("min", a, b)


@rule("maximum", "max")
def _maximum(a: Any, b: Any) -> Symbol:
    return _extreme("max", a, b)


@rule("clamp", "clip")
def _clamp(x: Any, min: Any = None, max: Any = None) -> Symbol:
    x = x if min is None else _maximum(min, x)
    return x if max is None else _minimum(max, x)


@rule("clamp_min")
def _clamp_min(x: Any, min: Any) -> Symbol:
    return _maximum(min, x)


@rule("clamp_max")
def _clamp_max(x: Any, max: Any) -> Symbol:
    return _minimum(max, x)


@rule("relu")
def _relu(x: Any) -> Symbol:
    return _maximum(0.0, x)


@rule("where")
def _where(c: Any, a: Any, b: Any) -> Symbol:
    c = mask(c)
    if all(isinstance(x, bool) or (isinstance(x, Symbol) and _is_mask(x.value)) for x in (a, b)):
        return Symbol(any_of(al.all_of(c, mask(a)), al.all_of(negate(c), mask(b))))
    a, b = symbol(a), symbol(b)
    slopes = {of: select(c, a.slopes.get(of, ZERO), b.slopes.get(of, ZERO)) for of in a.slopes | b.slopes}
    return Symbol(select(c, a.value, b.value), slopes)


# Comparisons. Of a nan both `<` and `>` are false, and `<=` is what `>` is not ---------------------------------------
_COMPARISONS: dict[str, Callable[[Node, Node], Node]] = {
    "lt less": al.less,
    "gt greater": lambda a, b: al.less(b, a),
    "le less_equal": lambda a, b: negate(al.less(b, a)),
    "ge greater_equal": lambda a, b: negate(al.less(a, b)),
    "eq": lambda a, b: node("eq", a, b),
    "ne not_equal": lambda a, b: negate(node("eq", a, b)),
}


def _comparison(make: Callable[[Node, Node], Node]) -> Callable[[Any, Any], Symbol]:
    return lambda a, b: Symbol(make(symbol(a).value, symbol(b).value))


for _names, _make in _COMPARISONS.items():
    rule(*_names.split())(_comparison(_make))

rule("and", "rand", "logical_and", "bitwise_and")(lambda a, b: Symbol(al.all_of(mask(a), mask(b))))
rule("or", "ror", "logical_or", "bitwise_or")(lambda a, b: Symbol(any_of(mask(a), mask(b))))
rule("invert", "logical_not", "bitwise_not")(lambda a: Symbol(negate(mask(a))))


def _operator(name: str) -> Callable[..., Symbol]:
    return lambda *args: RULES[name](*args)


_BINARY = ("add", "sub", "mul", "truediv", "pow")
_OTHER = ("neg", "abs", "lt", "gt", "le", "ge", "eq", "ne", "and", "rand", "or", "ror", "invert")
for _name in (*_BINARY, *(f"r{name}" for name in _BINARY), *_OTHER):
    setattr(Symbol, f"__{_name}__", _operator(_name))
