"""What of a function of a token is refused, and that the trace of the others is what autograd gives."""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from own_objectives import MyPhi, MySAPO

import gac_kernels as gk
from gac_kernels.objectives.term import term_of


# Errors: in the user's own line --------------------------------------------------------------------------------------
def function(loss, base=gk.PolicyObjective, **fields):
    members = {"__annotations__": dict.fromkeys(fields, "float"), **fields, "loss": loss}
    return dataclass(frozen=True)(type("Mine", (base,), members))()


REFUSED = {
    "no rule": (lambda self, t: torch.softmax(t.logp, -1), TypeError, "torch.softmax has no rule"),
    "no such method": (lambda self, t: t.logp.cumsum(0), AttributeError, "cumsum"),
    "if on a value": (lambda self, t: t.logp if t.advantage > 0 else -t.logp, TypeError, "torch.where"),
    "min of Python": (lambda self, t: -min(t.ratio, 2.0) * t.advantage, TypeError, "torch.minimum"),
    "math of a value": (lambda self, t: math.exp(t.logp), TypeError, "torch's function"),
    "vector": (lambda self, t: torch.tensor([1.0, 2.0]) * t.logp, TypeError, r"Tensor of shape \(2,\)"),
    "vector, other side": (lambda self, t: t.logp * torch.tensor([1.0, 2.0]), TypeError, r"Tensor of shape \(2,\)"),
    "index": (lambda self, t: t.logp[0], TypeError, "one number"),
    "sum of tokens": (lambda self, t: torch.sum(t.log_ratio), TypeError, "torch.sum has no rule"),
    "sum of a sum": (
        lambda self, t: t.sequence_mean(t.log_ratio - t.sequence_mean(t.log_ratio)), TypeError, "another sum",
    ),
    "no such value": (lambda self, t: t.reward * t.logp, AttributeError, "no reward; it has logp"),
    "nothing": (lambda self, t: None, TypeError, "must return a number a token, got NoneType"),
    "a mask": (lambda self, t: t.advantage > 0, TypeError, "got a comparison"),
    "no gradient": (lambda self, t: t.logp.detach() * t.advantage, ValueError, "no gradient"),
    "not finite": (lambda self, t: torch.log(t.logp), ValueError, "must be finite"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_meaning_for_a_token_is_refused(name):
    loss, error, text = REFUSED[name]
    with pytest.raises(error, match=text) as raised:
        gk.HybridObjective(function(loss))
    own_line = loss.__code__.co_firstlineno
    checked_afterwards = name in ("nothing", "a mask", "no gradient", "not finite")
    assert checked_afterwards or any(entry.lineno + 1 == own_line for entry in raised.traceback)


def test_a_function_that_changes_is_seen():
    calls = []

    def loss(self, t):
        calls.append(None)
        return t.logp * (1.0 + len(calls)) * t.advantage

    with pytest.raises(ValueError, match="the same at every call"):
        gk.HybridObjective(function(loss))


def test_classes_that_are_no_objectives():
    class Plain(gk.PolicyObjective):
        def loss(self, t):
            return -t.logp

    @dataclass
    class Melting(gk.PolicyObjective):
        def loss(self, t):
            return -t.logp

    @dataclass(frozen=True)
    class Lossless(gk.PolicyObjective):
        c: float = 1.0

    @dataclass(frozen=True)
    class Unhashable(gk.SupervisedObjective):
        of: list

        def loss(self, t):
            return -t.logp

    for make, text in (
        (Plain, "policy must be a frozen dataclass"), (Melting, "policy must be a frozen dataclass"),
        (Lossless, r"policy must define loss\(self, t\)"),
    ):  # fmt: skip
        with pytest.raises(TypeError, match=text):
            gk.HybridObjective(make())
    with pytest.raises(TypeError, match="supervised must be hashable"):
        gk.HybridObjective(supervised=Unhashable([]))
    with pytest.raises(TypeError, match="policy must be SAPO"):
        gk.HybridObjective(MyPhi())
    with pytest.raises(TypeError, match="supervised must be NLL"):
        gk.HybridObjective(gk.SAPO(), MySAPO())


def test_what_it_reads_must_be_there():
    @dataclass(frozen=True)
    class Reads(gk.PolicyObjective):
        what: str

        def loss(self, t):
            return -t.logp * getattr(t, self.what).detach()

    batch = gk.TokenBatch.from_padded(torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2), advantages=torch.ones(1))
    with pytest.raises(ValueError, match=r"batch\.ref_logprobs must be given: the objective reads t\.ref_logp"):
        gk.hybrid_loss(-torch.ones(1, 2), batch, gk.HybridObjective(Reads("ref_logp")), 0.0)
    with pytest.raises(ValueError, match=r"entropy must be given: the objective reads t\.entropy"):
        gk.hybrid_loss(-torch.ones(1, 2), batch, gk.HybridObjective(Reads("entropy")), 0.0)
    out = gk.hybrid_loss_from_logits(torch.zeros(1, 2, 4), batch, gk.HybridObjective(Reads("entropy")), 0.0)
    torch.testing.assert_close(out.loss, torch.tensor(math.log(4) ** 2))  # -logp and the entropy are both log 4


# The algebra: whatever is written, the trace equals autograd ----------------------------------------------------------
LEAVES = ("logp", "old_logp", "advantage", "log_ratio", "ratio", "ratio_minus_one", "p", "c")
UNARY = ("exp", "expm1", "sigmoid", "tanh", "erf", "atan", "square", "abs", "neg", "sqrt", "log1p", "reciprocal",
         "detach", "mean", "sum")  # fmt: skip
BINARY = ("add", "sub", "mul", "div", "minimum", "maximum", "where")


@dataclass(frozen=True)
class Tree(gk.PolicyObjective):
    tree: tuple
    c: float = 0.7

    def loss(self, t):
        return self.of(self.tree, t)

    def of(self, tree, t):
        op, *args = tree
        if op in LEAVES:
            return self.c if op == "c" else getattr(t, op)
        args = [self.of(a, t) for a in args]
        if op in ("mean", "sum"):
            return (t.sequence_mean if op == "mean" else t.sequence_sum)(args[0])
        if op == "where":
            return torch.where(t.advantage > 0.1, *args)
        if op in ("minimum", "maximum"):
            return getattr(torch, op)(args[0] + 0 * t.advantage, args[1] + 0 * t.old_logp)
        if op in ("add", "sub", "mul", "div"):
            return {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
                    "div": lambda a, b: a / (b * b + 0.5)}[op](*args)  # fmt: skip
        x = args[0] + 0 * t.advantage
        return getattr(torch, op)(x * x + 0.1 if op in ("sqrt", "log1p") else x * x + 1 if op == "reciprocal" else x)


TREES = st.recursive(
    st.sampled_from(LEAVES).map(lambda name: (name,)),
    lambda inner: st.tuples(st.sampled_from(UNARY), inner) | st.tuples(st.sampled_from(BINARY), inner, inner),
    max_leaves=7,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_expression_equals_autograd(tree):
    """``term_of`` holds the trace to autograd in float64; it may only complain that there is no finite gradient."""
    try:
        term_of(Tree(tree))
    except (TypeError, ValueError) as error:
        assume(not any(text in str(error) for text in ("another sum", "no gradient", "must be finite")))
        raise


def test_digits_are_kept_where_a_plain_formula_loses_them():
    """phi at p near 1 and k3 near 0: float32 within a few ulp of float64, where ``1 - exp(x)`` has no digits left."""

    @dataclass(frozen=True)
    class K3(gk.PolicyObjective):
        def loss(self, t):
            return torch.exp(t.log_ratio) - t.log_ratio - 1

    x = -torch.logspace(-6, -1, 200, dtype=torch.float64).float()
    none = {"old_logp": torch.zeros_like(x), "ref_logp": None, "advantage": torch.ones_like(x), "entropy": None}
    everywhere = torch.ones_like(x, dtype=torch.bool)
    d = x.double()
    for objective, loss, slope in (
        (MyPhi(), d * d.exp() * torch.expm1(d), d.exp() * torch.expm1(d)),
        (K3(), d * d * (0.5 + d / 6 + d**2 / 24 + d**3 / 120 + d**4 / 720 + d**5 / 5040), torch.expm1(d)),
    ):
        got = term_of(objective)(x, none, everywhere, lambda v: v, None)
        for value, want in zip(got, (loss, slope), strict=False):
            ulp = torch.nextafter(want.float().abs(), torch.tensor(math.inf)).double() - want.float().abs().double()
            assert float(((value.double() - want).abs() / ulp).max()) < 5
