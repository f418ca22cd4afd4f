"""A traced objective as a function in torch's operations: text that is printed, and run once to define it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .expression import HOST, MASKS, Node, expm1_minus, number

LEAVES = ("logp", "old_logp", "ref_logp", "advantage", "entropy", "log_ratio")
_ARGUMENTS = (*LEAVES, "alive", "total", "gain")


def choice(condition: Tensor, a: float, b: float, like: Tensor) -> Tensor:
    """``torch.where`` of two numbers in a tensor's dtype."""
    return torch.where(condition, torch.full((), a, dtype=like.dtype, device=like.device), b)


_NAMES = {"torch": torch, "choice": choice, "expm1_minus": expm1_minus}
_CALLS = {
    "abs": "torch.abs({})", "exp": "torch.exp({})", "expm1": "torch.expm1({})", "expm1mx": "expm1_minus({})",
    "log": "torch.log({})", "log1p": "torch.log1p({})", "erf": "torch.erf({})", "atan": "torch.atan({})",
    "sigmoid": "torch.sigmoid({})", "dsigmoid": "torch.sigmoid({0}) * torch.sigmoid(-{0})",
    "tanh": "torch.tanh({})", "dtanh": "1 / torch.cosh({}) ** 2", "lt": "{} < {}", "eq": "{} == {}", "not": "~{}",
}  # fmt: skip


class _Printer:
    """Statements, one an operation; what the parameters alone decide is a number."""

    def __init__(self, params: dict[Node, float]) -> None:
        self.params = params
        self.lines: list[str] = []
        self.names: dict[Node, str] = {}

    def name(self, n: Node) -> str:
        if n not in self.names:
            self.names[n] = self._place(n)
        return self.names[n]

    def tensor(self, n: Node) -> str:
        """As a tensor, which a number is made to be."""
        if n.level > HOST:
            return self.name(n)
        return f"{'torch.full_like(alive' if n.op in MASKS else 'torch.full_like(logp'}, {self.name(n)})"

    def _place(self, n: Node) -> str:
        if n.level == HOST:
            return self._literal(number(n, self.params))
        if n.op in ("leaf", "mask"):
            return str(n.args[0])
        if n.op in ("sum", "gain"):
            return f"{'total' if n.op == 'sum' else 'gain'}[{n.args[0]}]"
        text, name = self._text(n), f"x{len(self.lines)}"
        self.lines.append(f"{name} = {text}")
        return name

    @staticmethod
    def _literal(value: float) -> str:
        text = repr(value)
        return f"float({text!r})" if text.lstrip("-") in ("inf", "nan") else f"({text})" if value < 0 else text

    def _text(self, n: Node) -> str:
        if n.op == "mul":
            return self._product(n)
        if n.op == "pow":
            return self._power(self.name(n.args[0]), n.args[1])
        names = [self.name(a) for a in n.args]
        if n.op == "add":
            return " + ".join(names)
        if n.op == "or":
            return " | ".join(names)
        if n.op in ("min", "max"):
            return self._extreme(n)
        if n.op == "select":
            both = n.args[1].level == n.args[2].level == HOST
            return f"choice({', '.join(names)}, logp)" if both else f"torch.where({', '.join(names)})"
        return _CALLS[n.op].format(*names)

    def _extreme(self, n: Node) -> str:
        (a, b), bound = n.args, "max" if n.op == "min" else "min"
        if HOST in (a.level, b.level):
            far, near = (b, a) if a.level == HOST else (a, b)
            return f"{self.name(far)}.clamp({bound}={self.name(near)})"
        return f"torch.{n.op}imum({self.name(a)}, {self.name(b)})"

    @staticmethod
    def _power(x: str, exponent: float) -> str:
        special = {2: f"{x} * {x}", -1: f"1 / {x}", 0.5: f"torch.sqrt({x})", -0.5: f"torch.rsqrt({x})"}
        return special.get(exponent) or f"{x} ** {exponent:g}"

    def _product(self, n: Node) -> str:
        above, below = [], []
        for a in n.args:
            if a.op == "pow" and a.args[1] == -1 and a.level > HOST:
                below.append(self.name(a.args[0]))
            else:
                above.append(self.name(a))
        text = " * ".join(above) or "1"
        return " / ".join([text, *below])


def compiled(roots: list[Node], params: dict[Node, float]) -> Callable[..., tuple[Tensor, ...]]:
    """A function of ``logp, old_logp, ref_logp, advantage, entropy, log_ratio`` (those that are read must be tensors),
    ``alive`` (where the log-ratio's clamp does not act), ``total`` and ``gain`` (of each sum over the sequence), which
    gives the values of ``roots``, one a token."""
    printer = _Printer(params)
    results = [printer.tensor(root) for root in roots]
    body = [*printer.lines, f"return ({', '.join(results)}{',' if results else ''})"]
    text = f"def term({', '.join(_ARGUMENTS)}):\n    " + "\n    ".join(body) + "\n"
    names: dict[str, Any] = dict(_NAMES)
    exec(compile(text, "<objective>", "exec"), names)  # the text is printed above, from a fixed set of operations
    term: Callable[..., tuple[Tensor, ...]] = names["term"]
    term.source = text  # type: ignore[attr-defined]
    return term
