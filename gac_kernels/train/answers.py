"""Whether a completion's final answer is the wanted one: the reward of a file of problems.

The rule, in order:

1. The answer closes the completion. Behind it stand white space, closing punctuation, marks of emphasis, quotes,
   closing tags and special tokens at most.
2. It begins where a text announces its answer: at the start of the completion, of a line or of a sentence; behind a
   colon, an equals sign, an arrow, ``#`` or a tag; behind one of the words of ``_LEADS``; or inside the last
   ``\\boxed{}``. Anything else before it makes it a part of something longer: of ``15``, ``-5``, ``3*5``,
   ``New York``, ``5 or 6``. A negation in the same clause takes it back.
3. What stands there equals the answer: as text (Unicode's compatibility forms, case, white space and the marks around
   it set aside), as an exact number, or as a mathematical expression, by math-verify.

In doubt a completion is not rewarded.
"""

from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Iterable, Iterator
from functools import lru_cache

from ._extras import require
from .values import mathematical, number, same_value

_WINDOW = 2000  # characters at the end of a completion that are looked at, beside the answer's own length
_BEFORE = 300  # characters before an answer that are looked at
_STARTS = 12  # places where an answer may begin that are tried, from the end

_LEADS = (
    "is|are|be|equals|equal to|gets?|gives?|yields?|obtain|so|thus|hence|therefore|answer|"
    "(?:is|are) (?:simply|just|exactly|thus|therefore|then|indeed)"
)
_LEAD = re.compile(rf"\b(?:{_LEADS}|(?:so|thus|hence|therefore),|(?:it|that|he|she|what|answer|result)'s)\Z", re.I)
_MARK = re.compile(
    r"(?:(?<!\d)(?<!\d ):|#|→|⇒|\\to|\\Rightarrow|\\implies|(?<![!<>=~≈:/*+-])=>?|"
    r"</?(?!(?:su[bp]|del|s|strike)\b)[a-z][^<>]*>)\Z",
    re.I,
)
_SENTENCE = re.compile(r"[.!?。]\Z")
# What makes the text behind it, even on the next line, a part of something longer.
_OPEN = re.compile(
    r"(?:[-+*/^_×÷·±∓<>≤≥≠≈~,&|(\[{]|\\(?:cdot|times|div|pm|mp|neq?|leq?|geq?|lt|gt|approx|sim|frac|sqrt)|"
    r"\b(?:not|or|and|nor|than|minus|plus|times|over|by|least|most|to|of|from|about|except|without|versus|vs))\Z",
    re.I,
)
_NEGATION = re.compile(
    r"\b(?:not|never|nor?|neither|cannot|without|except|unlike|wrong|incorrect|false|impossible)\b|n['’]t\b", re.I
)
_SECOND = re.compile(r"\bor\b|=[^=]*(?:,|\band\b)\s*\S{1,6}\s*=\Z", re.I)
_CLOSERS = " \n.;,_`*\"'”’»。"
_CLOSING = re.compile(r"(?:(?<=[^\W\d_]{2})!|</[a-zA-Z][^<>]*>|<\|[^<>|]*\|>|\\[)\]]|(?<!\\)\$)\Z")
_PAIRS = [
    *((mark, mark) for mark in ("**", "__", "*", "_", "`", '"', "'", "$$", "$")),
    ("“", "”"), ("‘", "’"), ("«", "»"), ("\\(", "\\)"), ("\\[", "\\]"), ("(", ")"), ("{", "}"),
    *((f"\\{name}{{", "}") for name in ("boxed", "fbox", "text", "mathrm", "mathbf", "textbf", "mbox", "operatorname")),
]  # fmt: skip
_ALONE = ("**", "*", "`", '"', "'", "“", "‘", "«", "$$", "$", "\\(", "\\[")
_PLACES = re.compile(r"\A(?=\S)|(?<=[\s:=#→⇒>])(?=[^\s:=#→⇒>])|(?:(?<=\\to)|(?<=\\Rightarrow)|(?<=\\implies))(?=\W)")
_UNKNOWN = re.compile(r"(?<![\w\\])([a-zA-Z]\w?) *= *\Z")
_UNSEEN = re.compile(r"[\x00-\x08\x0e-\x1f\x7f]")
_BOXED = re.compile(r"\\f?boxed\s*\{")
_BOXES = re.compile(r"boxed\s*\{[^{}]*\}[^\w{]*\Z")
_MARKS = re.compile(r"(?:[*_`\"'“‘«]|(?<!\\)\$|\\[(\[])\Z")
_MINUS = dict.fromkeys(map(ord, "−﹣－"), "-")


def plain(text: str) -> str:
    """Unicode's compatibility forms undone as they are meant: 5² becomes 5^2 and not 52, 1½ 1 1/2 and not 11/2.

    White space other than line breaks becomes a space; characters that are not seen are left out.
    """
    if text.isascii():
        return re.sub(r"[^\S\n]+", " ", _UNSEEN.sub("", text.replace("\r", "\n")))
    parts = []
    for character in text.translate(_MINUS):
        kind, *codes = unicodedata.decomposition(character).split() or [""]
        if kind in ("<super>", "<sub>"):
            inside = "".join(chr(int(code, 16)) for code in codes).translate(_MINUS)
            parts.append(f"{'^' if kind == '<super>' else '_'}({inside})")
        elif kind == "<fraction>":
            parts.append(" " + "".join(chr(int(code, 16)) for code in codes).replace("⁄", "/"))
        elif character in "\n\r\u2028\u2029\v\f":
            parts.append("\n")
        elif unicodedata.category(character) not in ("Cf", "Cc") or character == "\t":
            parts.append(character)
    joined = re.sub(r"\)\^\(|\)_\((?=\w\))", "", "".join(parts))  # 10¹² is 10^(12)
    return re.sub(r"[^\S\n]+", " ", unicodedata.normalize("NFKC", joined))


def normalise(text: str) -> str:
    """What two texts have in common that are the same answer: :func:`plain`, without the marks around it, lower case,
    runs of white space as one space. Empty where nothing is left to compare."""
    bare = re.sub(r"\s+", " ", peel(plain(text))).casefold()
    return bare if re.search(r"[^\W_]", bare) or re.search(r"[^\s\w.,;:!?*_`\"'$]", bare) else ""


def peel(text: str) -> str:
    """A text without the marks that close it or stand around it: ``$5$``, ``**5**.``, ``\\boxed{5}``, ``(C)``."""
    before = None
    while before != text:
        before = text
        text = text.strip()
        if not (text.startswith(("\\(", "\\[")) and text.endswith(("\\)", "\\]"))):
            text = _unclosed(text)
        for left, right in _PAIRS:
            if not text.startswith(left):
                continue
            inner = text[len(left) : len(text) - len(right)]
            if len(text) >= len(left) + len(right) and text.endswith(right) and _whole(inner, left, right):
                text = inner.strip()
            elif left in _ALONE and right not in text[len(left) :]:  # the closing one went with the punctuation
                text = text[len(left) :].strip()
    return text


def _unclosed(text: str) -> str:
    """A text without what may stand behind an answer."""
    while True:
        bare = text.rstrip(_CLOSERS)
        if match := _CLOSING.search(bare, max(0, len(bare) - 60)):
            bare = bare[: match.start()]
        if bare == text:
            return text
        text = bare


def _whole(inner: str, left: str, right: str) -> bool:
    """Whether the two marks belong to each other and hold one thing: not ``(1)(2)``, nor a pair ``(1, 2)``."""
    if left == right:
        return left not in inner
    if left in ("(", "{") and "," in inner:
        return False
    opening, depth = left[-1] if left.endswith("{") else left, 0
    for place in range(len(inner)):
        depth += inner.startswith(opening, place) - inner.startswith(right, place)
        if depth < 0:
            return False
    return depth == 0


def check_reward(answers: Iterable[str]) -> None:
    """Raise ImportError where an answer is mathematical and math-verify is missing: the reward of a run does not depend
    on what a machine has installed."""
    if importlib.util.find_spec("math_verify") is None and any(
        number(bare) is not None or mathematical(bare) for bare in (_wanted(answer)[0] for answer in answers)
    ):
        require("math_verify", package="math-verify", purpose="the reward of mathematical answers")


def ends_with_answer(completion: str, answer: str) -> bool:
    """Whether the completion's final answer is ``answer``: the rule at the top of this module."""
    bare, wanted, unknown = _wanted(answer)
    if not wanted:
        return False
    text = plain(completion[-(_WINDOW + 2 * len(answer)) :])
    for before, candidate in _candidates(text):
        if unknown and (named := _UNKNOWN.search(before)) and named[1] != unknown:
            return False
        if _same(candidate, bare, wanted):
            return True
    return False


@lru_cache(maxsize=4096)
def _wanted(answer: str) -> tuple[str, str, str]:
    """An answer peeled, normalised, and the letter that it is the value of (``x = 5``), if any."""
    bare = peel(plain(answer))
    named = re.match(r"([a-zA-Z]\w?) *=", bare)
    return bare, normalise(answer), named[1] if named else ""


@lru_cache(maxsize=4096)
def _same(candidate: str, bare: str, wanted: str) -> bool:
    return normalise(candidate) == wanted or same_value(peel(candidate), bare)


def _candidates(text: str) -> Iterator[tuple[str, str]]:
    """Every place where an answer may begin, from the last: the text before it and the text from it to the end."""
    body = _unclosed(text)
    if (boxed := _last_box(text)) is not None:
        if _begins(text[: boxed[0]], boxed=True):
            yield text[: boxed[0]], boxed[1]
        return
    tried = 0
    starts = [match.end() for match in _PLACES.finditer(body)]
    for start in reversed(starts):
        if _begins(text[max(0, start - _BEFORE) : start], boxed=False, whole=start <= _BEFORE):
            yield text[:start], text[start:]
            tried += 1
            if tried == _STARTS:
                return


def _last_box(text: str) -> tuple[int, str] | None:
    """Where the last ``\\boxed{}`` begins and what it holds, if nothing but closing marks stands behind it."""
    matches = list(_BOXED.finditer(text))
    if not matches:
        return None
    depth, start = 1, matches[-1].end()
    for place in range(start, len(text)):
        if text[place - 1] != "\\":
            depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            behind = _unclosed(text[place + 1 :])
            return None if behind else (matches[-1].start(), text[start:place])
    return None


def _begins(before: str, *, boxed: bool, whole: bool = True) -> bool:
    """Whether an answer may begin behind this text, which is ``whole`` or the end of a longer one."""
    bare = before.rstrip()
    while (shorter := _MARKS.sub("", bare).rstrip()) != bare:
        if bare.endswith("*") and not re.search(r"(?:\A|\s|[:=#>])\*+\Z|\*\*[^*]*\*\*\Z", bare):
            return False  # a product: 3*5
        bare = shorter
    if not bare:
        return whole
    mark = _MARK.search(bare)
    lead = _LEAD.search(bare)
    if not (mark or lead) and _OPEN.search(bare) and not (boxed and bare.endswith(",") and not _BOXES.search(bare)):
        return False
    line = "\n" in before[len(bare) :]
    if not mark and ((_SENTENCE.search(bare) and before != bare) or (line and not lead)):
        return True
    return bool(mark or boxed or lead) and not _spoiled(bare)


def _spoiled(bare: str) -> bool:
    """Whether the sentence before an answer takes it back, or gives a second one."""
    sentence = re.split(r"[!?;\n]|\.(?:\s|\Z)|</[a-z]+>", bare[-200:])[-1]
    return bool(_NEGATION.search(re.split(r"[,;]", sentence)[-1]) or _SECOND.search(sentence))
