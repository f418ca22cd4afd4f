"""Whether two short texts have the same mathematical value: numbers exactly, expressions by math-verify.

Decimals are exact: 0.33 is not 1/3. Thousands are grouped by commas (``1,234``); a decimal comma is not read as one.
Every comparison ends: what could grow without bound (towers of powers, large factorials, sums) is refused before it is
computed. So no clock is needed, whose verdict would differ between machines, nor the signals that math-verify's own
time limit is made of, which only the main thread may set.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

from ._extras import require

_LENGTH, _DIGITS = 160, 40  # of an expression, and of a number in it
_POWER, _SYMBOLIC_POWER = 10_000, 8  # the largest product of all exponents
_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_NUMBER = re.compile(rf"([+-]?) ?(?=[\d.])({_UNSIGNED})(?:[eE]([+-]?\d{{1,3}})|(?: ?(?:x|×|\*|\\times|\\cdot) ?10 ?\^ ?"
                     rf"[({{]?([+-]?\d{{1,3}})[)}}]?))? ?(\\?%)?\Z")  # fmt: skip
_RATIO = re.compile(r"([+-]?) ?(?:(\d+) )?(\d+) ?/ ?(\d+)\Z")
_COMMAND = re.compile(r"\\([a-zA-Z]+|.)")
_COMMANDS = {
    "frac", "sqrt", "pi", "cdot", "times", "div", "infty", "ln", "log", "exp", "sin", "cos", "tan", "cot", "sec", "csc",
    "arcsin", "arccos", "arctan", "circ", "cup", "cap", "in", "emptyset", "binom", "alpha", "beta", "gamma", "delta",
    "theta", "lambda", "mu", "phi", "omega", "sigma", "rho", "leq", "geq", "le", "ge", "lt", "gt", "neq", "ne", "{",
    "}", "%", "begin", "end", "\\",
}  # fmt: skip
_WORDS = {"sqrt", "pi", "ln", "log", "exp", "sin", "cos", "tan", "cot", "sec", "csc", "pmatrix", "bmatrix"}
_RELATION = re.compile(r"[=<>≤≥≠]|\\(?:leq?|geq?|lt|gt|neq?|in)\b")


def same_value(candidate: str, answer: str) -> bool:
    """Whether the two are the same number or expression. Raises ImportError where math-verify is needed and missing."""
    if len(candidate) > 2000 or len(answer) > 2000:
        return False
    candidate, answer = _tidy(candidate), _tidy(answer)
    answer = _without_unknown(candidate, answer)
    one, other = number(candidate), number(answer)
    if one is not None and other is not None:
        return one == other
    if not (mathematical(candidate) and mathematical(answer)):
        return _same_measure(candidate, answer)
    same = _same_list(candidate, answer)
    return _equal(candidate, answer) if same is None else same


def _same_measure(candidate: str, answer: str) -> bool:
    """Equal numbers of the same unit: ``5 cm``, ``5cm``, ``5.0 cm``."""
    one, other = (re.match(r"(.*?[\d)]) ?([^\W\d_][\w/^. ]*)\Z", text) for text in (candidate, answer))
    if one is None or other is None or one[2] != other[2]:
        return False
    left, right = number(one[1]), number(other[1])
    return left is not None and left == right


def number(text: str) -> Fraction | None:
    """The number that a text is written as: ``-1,234.50``, ``3/4``, ``1 1/2``, ``1e-3``, ``50%``; else None.

    A number with a leading zero (``007``) is a name, not a number.
    """
    if match := _RATIO.match(text):
        sign, whole, above, below = match.groups()
        if int(below) == 0 or any(part and part != "0" and part[0] == "0" for part in (whole, above, below)):
            return None
        value = Fraction(int(above), int(below)) + int(whole or 0)
    elif (match := _NUMBER.match(text)) and re.search(r"\d", match[2]):
        sign, digits, power, power_of_ten, percent = match.groups()
        if re.match(r"0\d", digits):
            return None
        value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(power or power_of_ten or 0)
        value = value / 100 if percent else value
    else:
        return None
    return -value if sign == "-" else value


def mathematical(text: str) -> bool:
    """Whether a text reads as a mathematical expression that is small enough to be computed."""
    if not 0 < len(text) <= _LENGTH or any(name not in _COMMANDS for name in _COMMAND.findall(text)):
        return False
    rest = _COMMAND.sub(" ", text)
    # math-verify reads "5 5" and "\frac{1}{2}(3)" as sums; 007 is a name.
    if re.search(r"\d\s+\d|(?<![\d.,])0\d|\) ?\d|\} ?\(|\d ?\\frac", text):
        return False
    if re.search(r"[^\w\s.,+\-*/^()\[\]{}=<>|!°√π∞≤≥≠×÷·∪∩&%]", rest) or re.search(rf"\d{{{_DIGITS}}}", rest):
        return False
    if any(word not in _WORDS for word in re.findall(r"[^\W\d_]{2,}", rest)) or not re.search(r"\w|∞|\\", text):
        return False
    return _bounded(text)


def _bounded(text: str) -> bool:
    """Whether no part can grow beyond some ten thousand digits or terms."""
    text = text.replace("**", "^").replace(" ", "")
    numbers = [int(digits) for digits in re.findall(r"\d+", text)]
    exponents = _exponents(text)
    if exponents is None:
        return False
    size = prod(max(1, int(digits)) for exponent in exponents for digits in re.findall(r"\d+", exponent))
    # Powers of sums are expanded, term by term: those of plain numbers alone may be large.
    plain = not re.search(r"[a-zA-Z√π]", re.sub(r"\\(?:frac|cdot|times|div)", "", text))
    if size > (_POWER if plain else _SYMBOLIC_POWER) or len(re.findall(r"√|sqrt", text)) > 4:
        return False
    if "exp" in text and (text.count("exp") > 1 or exponents or prod(max(1, n) for n in numbers) > 100):
        return False
    if "!" in text:
        small = all(re.match(r"\d{1,3}\Z", base) for base in re.findall(r"([^+\-*/()]*)!", text))
        return small and not exponents and "!!" not in text
    return "binom" not in text or max(numbers, default=0) <= 1000


def _exponents(text: str) -> list[str] | None:
    """What stands behind each ``^``; None where one holds a further power or does not end."""
    found = []
    for match in re.finditer(r"\^", text):
        rest = text[match.end() :]
        if rest[:1] in ("{", "("):
            depths = accumulate((character in "{(") - (character in "})") for character in rest)
            end = next((place for place, depth in enumerate(depths, 1) if depth == 0), None)
            if end is None:
                return None
            exponent, behind = rest[:end], rest[end:]
        else:
            exponent = re.match(r"[+-]?(?:\d+|.?)", rest)[0]  # type: ignore[index]
            behind = rest[len(exponent) :]
        if "^" in exponent or "!" in exponent or behind.startswith("^"):
            return None
        found.append(exponent)
    return found


def _tidy(text: str) -> str:
    """LaTeX's ways of writing the same thing, alike."""
    text = re.sub(r"(?<!\\)\\(?:displaystyle|limits|[,;!: ])|~", " ", text.replace("{,}", ","))
    text = re.sub(r"\\(?:left|right)(?=[^a-zA-Z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\\frac ?(\d) ?(\d)", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\A\s*\\?\$(?=[\d.])", "", text)
    if match := re.match(r"([+-]?) ?(\d*) ?\\frac ?\{(\d+)\} ?\{(\d+)\}\Z", text.strip()):
        text = f"{match[1]}{match[2]} {match[3]}/{match[4]}" if match[2] else f"{match[1]}{match[3]}/{match[4]}"
    return re.sub(r"\s+", " ", text).strip()


def _without_unknown(candidate: str, answer: str) -> str:
    """Of an answer ``x = 5`` the value, where the candidate is a value."""
    left, equals, right = answer.partition("=")
    if equals and re.fullmatch(r"\s*[a-zA-Z]\w?\s*", left) and not _RELATION.search(candidate + right):
        return right.strip()
    return answer


def _parts(text: str) -> tuple[str, str, list[str]] | None:
    """Opening and closing bracket and the members of a list ``(1, 2)``, ``[0, 1)``, ``\\{1, 2\\}``, ``1, 2``."""
    text = text.replace("\\{", "{").replace("\\}", "}")
    left, right = (text[0], text[-1]) if text[:1] in tuple("([{") and text[-1:] in tuple(")]}") else ("", "")
    members, depth = [""], 0
    for character in text[1:-1] if left else text:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return None
        if character == "," and depth == 0:
            members.append("")
        else:
            members[-1] += character
    return (left, right, members) if len(members) > 1 and depth == 0 else None


def _same_list(candidate: str, answer: str) -> bool | None:
    """Of lists, whether brackets and members are the same, those of a set in any order; None where neither is one."""
    one, other = _parts(candidate), _parts(answer)
    if one is None and other is None:
        return None
    if one is None or other is None or one[:2] != other[:2] or len(one[2]) != len(other[2]):
        return False
    mine, rest = [member.strip() for member in one[2]], [member.strip() for member in other[2]]
    if one[0] != "{":
        return all(a != "" and (a == b or same_value(a, b)) for a, b in zip(mine, rest, strict=True))
    for member in mine:
        place = next((i for i, other in enumerate(rest) if member == other or same_value(member, other)), None)
        if place is None:
            return False
        del rest[place]
    return True


@lru_cache(maxsize=4096)
def _equal(candidate: str, answer: str) -> bool:
    """By math-verify, both read as a whole."""
    # A degree sign, a relation or a percent sign on one side alone: not the same thing, whatever a parser makes of it.
    for mark in (r"\\circ|°", r"%", r"[=<>≤≥≠]|\\(?:leq?|geq?|lt|gt|neq?|in)\b"):
        if len(re.findall(mark, candidate)) != len(re.findall(mark, answer)):
            return False
    if re.sub(r"\s", "", candidate) == re.sub(r"\s", "", answer):
        return True
    verify, parse = _math_verify()
    one, other = parse(candidate), parse(answer)
    if one is None or other is None or not (near := _near(one, other)):
        return False
    if near is True and not (one.free_symbols or other.free_symbols):
        return True  # two numbers
    return bool(verify(other, one, float_rounding=30, numeric_precision=50, strict=True, timeout_seconds=None))


def _near(one: Any, other: Any) -> Any:
    """Whether two expressions agree at a point, to 30 digits. Most that differ do so here, where a proof of it by
    expanding them can take minutes. Ellipsis for relations and matrices, which are left to math-verify."""
    from sympy import Expr

    if not (isinstance(one, Expr) and isinstance(other, Expr)):
        return ...
    names = sorted(one.free_symbols | other.free_symbols, key=str)
    point = {name: Fraction(2 * place + 3, 2 * place + 7) for place, name in enumerate(names)}
    left, right = (side.subs(point).evalf(50) for side in (one, other))
    gap, size = abs(left - right).evalf(50), abs(left).evalf(50)
    return bool(gap.is_number and gap.is_finite and gap <= size * 10**-30 + 10**-30)


@lru_cache(maxsize=1)
def _math_verify() -> tuple[Callable[..., bool], Callable[[str], Any]]:
    """math-verify's comparison and its parser, the latter strict: no unit and no word is dropped."""
    library = require("math_verify", package="math-verify", purpose="the reward of mathematical answers")
    from latex2sympy2_extended import NormalizationConfig, latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig

    # It warns that no time limit is set; what it gets is bounded by its size instead.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    as_written = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False
    )
    conversion = ConversionConfig(interpret_as_mixed_fractions=False, lowercase_symbols=False)

    def parse(text: str) -> Any:
        try:
            return latex2sympy(_latex(text), normalization_config=as_written, conversion_config=conversion)
        except Exception:  # its parser raises bare Exceptions for what it doesn't understand: no value, no reward
            return None

    return library.verify, parse


def _latex(text: str) -> str:
    """Plain notation as LaTeX; decimals as the fractions that they are."""
    text = text.replace("**", "^").replace("*", "\\cdot ").replace("×", "\\times ").replace("·", "\\cdot ")
    text = text.replace("÷", "/").replace("π", "\\pi ").replace("∞", "\\infty ").replace("°", "^\\circ ")
    text = re.sub(r"√ ?\(([^()]*)\)|(?<!\\)\bsqrt ?\(([^()]*)\)", lambda m: f"\\sqrt{{{m[1] or m[2]}}}", text)
    text = re.sub(r"√ ?(\w+)", r"\\sqrt{\1}", text)
    text = re.sub(r"(?<![\\a-zA-Z])(pi|ln|log|exp|sin|cos|tan|cot|sec|csc)(?![a-zA-Z])", r"\\\1 ", text)
    text = re.sub(r"\^ ?\(([^()]*)\)", r"^{\1}", text)
    text = re.sub(r"(?<=[\d)])(?<!_\d) ?\(", r"\\cdot (", text)  # its parser adds what stands so: 2(3) is 5 to it
    text = re.sub(r"(?<=\d) ?x ?(?=10 ?\^)", "\\\\times ", text)
    return re.sub(r"(\d*)\.(\d+)", lambda m: f"\\frac{{{int(m[1] + m[2])}}}{{{10 ** len(m[2])}}}", text)
