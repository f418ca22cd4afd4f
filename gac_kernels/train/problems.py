"""A file of problems, read as tools write them: one JSON object a line, or one JSON array of them."""

from __future__ import annotations

import difflib
import json
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .answers import normalise

_FIELDS = {"prompt": True, "answer": True, "demonstration": False}  # name -> required
_PACKED = {
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard",
    b"PAR1": "Parquet", b"ARROW1": "Arrow", b"SQLite": "SQLite", b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
}  # fmt: skip
_WRITTEN_OUT = {True: "true", False: "false", None: "null"}


@dataclass(frozen=True)
class Example:
    """One problem: what the model reads, the answer that earns the reward, and how a teacher would write it.

    Attributes:
        fields: further fields of its line, as they are.
        where: the file and line that it came from, for messages.
    """

    prompt: str
    answer: str
    demonstration: str | None = None
    fields: dict[str, Any] = field(default_factory=dict, compare=False)
    where: str = field(default="", compare=False)

    @property
    def problem(self) -> str:
        """What lines of the same problem share: the prompt in Unicode's composed form, runs of white space as one."""
        return " ".join(unicodedata.normalize("NFC", self.prompt).split())


class _Number(float):
    """A number with a point or an exponent that still knows how it was written."""

    def __new__(cls, text: str) -> _Number:
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def read_problems(path: Path) -> list[Example]:
    """The problems of a file, in order.

    UTF-8, with or without a byte order mark, or UTF-16 with one. Lines end at line feeds alone, since other line breaks
    may stand inside a string; blank ones are skipped.

    Raises:
        ValueError: naming file, line and field for what does not fit; naming the file where it is no text or empty.
    """
    mode = path.stat().st_mode
    if not stat.S_ISREG(mode):
        raise ValueError(f"{path}: expected a file, got a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}")
    examples = [_example(record, where) for record, where in _records(path)]
    if not examples:
        raise ValueError(f"{path}: holds no problem; expected one JSON object a line")
    return examples


def _records(path: Path) -> Iterator[tuple[Any, str]]:
    """Every JSON value of the file and where it stands."""
    with path.open("rb") as file:
        start = file.read(8)
        for magic, kind in _PACKED.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: is {kind}; expected plain text in UTF-8, so unpack or convert it first")
        file.seek(0)
        if start.startswith((b"\xff\xfe", b"\xfe\xff")):
            try:
                lines: Any = file.read().decode("utf-16").encode().split(b"\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: not valid UTF-16 ({error}); save it as UTF-8") from error
        else:
            lines = file
        rest = iter(lines)
        for number, line in enumerate(rest, start=1):
            text = _text(line, f"{path}, line {number}")
            if text.startswith("[") and number == 1:
                whole = text + "".join(_text(more, f"{path}, line {n}") + "\n" for n, more in enumerate(rest, start=2))
                array = _parse(whole, f"{path}, line 1")
                yield from ((record, f"{path}, item {place}") for place, record in enumerate(array, start=1))
                return
            if text:
                yield _parse(text, f"{path}, line {number}"), f"{path}, line {number}"


def _text(line: bytes, where: str) -> str:
    try:
        return line.decode().lstrip("\ufeff").strip(" \t\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error})") from error


def _parse(text: str, where: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"key {next(name for name in names if names.count(name) > 1)!r} stands twice")
        return record

    try:
        return json.loads(text, object_pairs_hook=once, parse_float=_Number)
    except (ValueError, RecursionError) as error:  # beside JSON's own: integers too long, brackets too deep
        raise ValueError(f"{where}: not valid JSON ({error})") from error


def _example(record: Any, where: str) -> Example:
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(record).__name__}")
    for name, required in _FIELDS.items():
        if required and name not in record:
            raise ValueError(f"{where}: field {name!r} is missing")
    further = {name: value for name, value in record.items() if name not in _FIELDS}
    for name in further:
        meant = difflib.get_close_matches(name.casefold(), _FIELDS, n=1, cutoff=0.8)
        if meant and meant[0] not in record:
            raise ValueError(f"{where}: field {name!r} is unknown; did you mean {meant[0]!r}?")
    prompt, answer, demonstration = (_field(name, record.get(name), where) for name in _FIELDS)
    assert prompt is not None and answer is not None
    if not normalise(answer):
        raise ValueError(
            f"{where}: field 'answer' is punctuation alone, {answer!r}: no completion could be told to end with it"
        )
    return Example(prompt, answer, demonstration, further, where)


def _field(name: str, value: Any, where: str) -> str | None:
    """The text of a field; a number in the place of an answer as it is written in the file."""
    if value is None and not _FIELDS[name]:
        return None
    expected = "must be text or a number" if name == "answer" else "must be a string"
    if name == "answer" and isinstance(value, (int, float)) and not isinstance(value, bool):
        if isinstance(value, float) and not isinstance(value, _Number):  # NaN, Infinity: words that JSON lacks
            raise ValueError(f"{where}: field {name!r} {expected} that is finite, got {value}")
        return getattr(value, "text", str(value))
    if not isinstance(value, str):
        kind = _WRITTEN_OUT[value] if isinstance(value, (bool, type(None))) else type(value).__name__
        hint = f' (in quotes, "{kind}", it is text)' if name == "answer" and isinstance(value, bool) else ""
        raise ValueError(f"{where}: field {name!r} {expected}, got {kind}{hint}")
    if not value.strip():
        raise ValueError(f"{where}: field {name!r} must not be empty")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{where}: field {name!r} must be text, got half a surrogate pair")
    if "\0" in value:
        raise ValueError(f"{where}: field {name!r} must be text, got a NUL character")
    return value
