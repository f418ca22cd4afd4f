"""A normal form of expressions, made as they are written down.

A product is kept as powers of atoms and a sum as multiples of products: what cancels on paper cancels here, and no
digits are lost to it. The derivative of ``p / (p + c)`` comes out as ``c p / (p + c)^2``, and ``1 - e^x`` as
``-expm1(x)``. A mask that lets no slope through ends up outermost, one mask for all that is 0 for one reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from .expression import HOST, ONE, TOKEN, ZERO, Node, const, node

Powers = dict[Node, float]


# Products: coefficient * prod base^exponent ----------------------------------------------------------------------
def powers(n: Node) -> tuple[float, Powers]:
    """A node as a coefficient and the powers of its factors."""
    if n.op == "const":
        return n.args[0], {}
    if n.op == "pow":
        return 1.0, {n.args[0]: n.args[1]}
    if n.op == "mul":
        parts = [powers(a) for a in n.args]
        return math.prod(c for c, _ in parts), {b: e for _, own in parts for b, e in own.items()}
    return 1.0, {n: 1.0}


def product(coefficient: float, exponents: Powers) -> Node:
    """The inverse of :func:`powers`."""
    if coefficient == 0:
        return ZERO
    ordered = sorted(exponents.items(), key=lambda item: item[0].order)
    factors = [b if e == 1 else node("pow", b, e) for b, e in ordered if e]
    near = round(coefficient * 4) / 4
    if abs(coefficient - near) < 1e-15:  # sqrt(2)^2
        coefficient = near
    if coefficient != 1 or not factors:
        factors.insert(0, const(coefficient))
    return factors[0] if len(factors) == 1 else node("mul", *factors)


def _is_choice(n: Node) -> bool:
    """A token's choice between two values that the host knows."""
    return n.op == "select" and n.level == TOKEN and n.args[1].level == n.args[2].level == HOST


def mul(*nodes: Node) -> Node:
    coefficient, exponents = 1.0, Powers()
    for n in nodes:
        c, own = powers(n)
        coefficient *= c
        for b, e in own.items():
            exponents[b] = exponents.get(b, 0.0) + e
    if coefficient == 0:
        return ZERO
    for b, e in exponents.items():
        if b.op == "select" and b.args[1] is ZERO and e > 0:  # 0 wins over all else in the product, inf and nan too
            return select(b.args[0], ZERO, mul(product(coefficient, {**exponents, b: 0.0}), power(b.args[2], e)))
        if _is_choice(b) and (merged := _choice_of_products(b, e, coefficient, exponents)) is not None:
            return merged
    return product(coefficient, exponents)


def _choice_of_products(b: Node, e: float, coefficient: float, exponents: Powers) -> Node | None:
    """``k / (c ? x : y)`` as ``c ? k / x : k / y``, so that values of the host meet on the host; None where none do."""
    near = {a: k for a, k in exponents.items() if a.level == HOST or (_is_choice(a) and a.args[0] is b.args[0])}
    if len(near) == 1 and abs(coefficient) == 1 and e == 1:
        return None

    def side(i: int) -> Node:
        return mul(const(abs(coefficient)), *(power(a.args[i] if _is_choice(a) else a, k) for a, k in near.items()))

    sign = math.copysign(1.0, coefficient)  # stays outside, where equal terms of two signs cancel
    far = product(sign, {a: k for a, k in exponents.items() if a not in near})
    return mul(select(b.args[0], side(1), side(2)), far)


def power(n: Node, e: float) -> Node:
    """``n^e`` for whole and half ``e``."""
    if e == 1:
        return n
    if _is_choice(n):
        return select(n.args[0], power(n.args[1], e), power(n.args[2], e))
    c, own = powers(n)
    if e == int(e) or (c == 1 and [abs(k) for k in own.values()] == [1]):
        return product(c**e, {b: k * e for b, k in own.items()})
    return node("pow", n, float(e))  # sqrt(x^2) is |x|


# Sums: multiples of products -------------------------------------------------------------------------------------
Key = tuple[tuple[Node, float], ...]
Terms = dict[Key, float]


def add(*nodes: Node) -> Node:
    terms: Terms = {}
    for n in nodes:
        _put(terms, n, 1.0)
    terms = {key: c for key, c in terms.items() if c}
    if not terms:
        return ZERO
    if len(terms) > 1 and (taken := _shared_factor(terms)) is not None:
        return taken
    if (rewritten := _exponential_form(terms)) is not None:
        return rewritten
    parts = sorted((product(c, dict(key)) for key, c in terms.items()), key=lambda n: n.order)
    return parts[0] if len(parts) == 1 else node("add", *parts)


def _put(terms: Terms, n: Node, scale: float) -> None:
    """Adds ``scale * n`` to the terms of a sum, a sum as its terms."""
    c, own = powers(n)
    only = next(iter(own)) if len(own) == 1 else None
    if only is not None and only.op == "add" and own[only] == 1 and abs(scale * c) == 1:
        for a in only.args:
            _put(terms, a, scale * c)
        return
    key = tuple(sorted(own.items(), key=lambda item: item[0].order))
    before = terms.get(key, 0.0)
    if not key and before and not 1e-6 < abs(c * scale / before) < 1e6:
        # 1 + 1e-8 would be 1 in float32: kept apart, as a factor that no other constant meets
        key, c, scale, before = ((const(scale * c), 1.0),), 1.0, 1.0, 0.0
    terms[key] = before + scale * c


def _shared_factor(terms: Terms) -> Node | None:
    """What all terms of a sum share comes before the sum: masks first, then factors. None where they share nothing."""
    parts = [masked(product(c, dict(key))) for key, c in terms.items()]
    if parts[0][0] and all(zero == parts[0][0] for zero, _ in parts):
        return select(any_of(*parts[0][0]), ZERO, add(*(x for _, x in parts)))
    bare = [(zero, *powers(x)) for zero, x in parts]
    shared = {
        b: min(own.get(b, 0.0) for _, _, own in bare)
        for b, e in bare[0][2].items()
        if all(own.get(b, 0.0) * e > 0 for _, _, own in bare)
    }
    if not shared:
        return None
    rests = ((zero, product(c, {b: e - shared.get(b, 0.0) for b, e in own.items()})) for zero, c, own in bare)
    return mul(product(1.0, shared), add(*(_zero_where(any_of(*zero), x) for zero, x in rests)))


def _exponential_form(terms: Terms) -> Node | None:
    """``e^x - 1`` and ``e^x - 1 - x`` by one operation each, ``1 - sigmoid(x)`` as ``sigmoid(-x)``; None where there is
    nothing of the kind."""
    for key, c in terms.items():
        atom, one = key[0][0] if len(key) == 1 and key[0][1] == 1 else ZERO, terms.get((), 0.0)
        if atom.op == "exp" and one and abs(one + c) <= abs(one) / 2:
            rest = {k: x for k, x in terms.items() if k != key} | {(): one + c}
            return add(*_parts(rest), mul(const(c), expm1(atom.args[0])))
        if atom.op == "expm1" and terms.get(((atom.args[0], 1.0),)) == -c:
            rest = {k: x for k, x in terms.items() if k not in (key, ((atom.args[0], 1.0),))}
            return add(*_parts(rest), mul(const(c), node("expm1mx", *atom.args)))
        if atom.op == "sigmoid" and one == -c:
            rest = {k: x for k, x in terms.items() if k not in (key, ())}
            return add(*_parts(rest), mul(const(-c), sigmoid(neg(atom.args[0]))))
    return None


def _parts(terms: Terms) -> Iterator[Node]:
    return (product(c, dict(key)) for key, c in terms.items())


def neg(x: Node) -> Node:
    return mul(const(-1), x)


# Choices -----------------------------------------------------------------------------------------------------------
def select(c: Node, a: Node, b: Node) -> Node:
    """``a`` where ``c``, else ``b``."""
    if c.op == "const":
        return a if c.args[0] else b
    if a is b:
        return a
    (zero_a, x), (zero_b, y) = masked(a), masked(b)
    if a is ZERO:
        return _zero_where(any_of(c, *zero_b), y)
    if b is ZERO:
        return _zero_where(any_of(negate(c), *zero_a), x)
    if x is y:
        both = [m for m in zero_a if m in zero_b]
        only_a, only_b = (any_of(*(m for m in zero if m not in both)) for zero in (zero_a, zero_b))
        return _zero_where(any_of(*both, all_of(c, only_a), all_of(negate(c), only_b)), x)
    return select(c.args[0], b, a) if c.op == "not" else node("select", c, a, b)


def masked(n: Node) -> tuple[tuple[Node, ...], Node]:
    """The masks where ``n`` is 0, and what it is elsewhere."""
    if n.op == "select" and n.args[1] is ZERO:
        return (n.args[0].args if n.args[0].op == "or" else (n.args[0],)), n.args[2]
    return (), n


def _zero_where(mask: Node, x: Node) -> Node:
    if mask is ZERO or x is ZERO:
        return x
    return ZERO if mask is ONE else node("select", mask, ZERO, x)


def negate(m: Node) -> Node:
    if m.op == "not":
        inner: Node = m.args[0]
        return inner
    return const(not m.args[0]) if m.op == "const" else node("not", m)


def any_of(*masks: Node) -> Node:
    flat = dict.fromkeys(x for m in masks for x in (m.args if m.op == "or" else (m,)) if x is not ZERO)
    if ONE in flat or any(negate(m) in flat for m in flat):
        return ONE
    if len(flat) < 2:
        return next(iter(flat), ZERO)
    return node("or", *flat)


def all_of(*masks: Node) -> Node:
    return negate(any_of(*map(negate, masks)))


def less(a: Node, b: Node) -> Node:
    if a.op == b.op == "const":
        return const(a.args[0] < b.args[0])
    return ZERO if a is b else node("lt", a, b)


def extreme(op: str, a: Node, b: Node) -> Node:
    """The smaller (``min``) or larger (``max``) of two."""
    return a if a is b else node(op, a, b)


# Functions -------------------------------------------------------------------------------------------------------
def exp(x: Node) -> Node:
    return node("exp", x)


def expm1(x: Node) -> Node:
    return node("expm1", x)


def log(x: Node) -> Node:
    if x.op == "exp":
        inner: Node = x.args[0]
        return inner
    return node("log1p", add(x, const(-1))) if x.op == "add" and ONE in x.args else node("log", x)


def sigmoid(x: Node) -> Node:
    return node("sigmoid", x)
