"""What a command prints: tables and one JSON object on standard output, progress and remarks on standard error."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

PROGRESS_SECONDS = 5.0  # between progress lines where standard error is a file or a pipe


class Console:
    """One command's output.

    For people: plain text and tables, drawn by rich where it is installed and standard output is a terminal. With
    ``json``, standard output carries nothing but the object of :meth:`result`.
    """

    def __init__(self, *, json: bool = False) -> None:
        self.json = json

    def text(self, line: str = "") -> None:
        """A line for people."""
        if not self.json:
            print(line, flush=True)

    def remark(self, line: str) -> None:
        """A line that must be seen with ``--json`` too: on standard error."""
        print(line, file=sys.stderr, flush=True)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> None:
        """A table whose first ``left`` columns are text and whose others are numbers."""
        if self.json:
            return
        if sys.stdout.isatty() and importlib.util.find_spec("rich") is not None:
            _rich_table(title, header, rows, left)
        else:
            print("\n".join(_plain_table(title, header, rows, left)), flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """The object of ``--json``, one line; nan and infinity are no JSON and become null."""
        if self.json:
            print(json.dumps(_finite(value), allow_nan=False), flush=True)

    @contextmanager
    def progress(self, label: str) -> Iterator[Progress]:
        """Progress of long work on standard error."""
        progress = Progress(label)
        try:
            yield progress
        finally:
            progress.close()


class Progress:
    """A line that is redrawn on a terminal and repeated every few seconds elsewhere. Call it with a share in [0, 1]."""

    def __init__(self, label: str) -> None:
        self.label = label
        self._terminal = sys.stderr.isatty()
        self._began = self._shown = time.perf_counter()

    def __call__(self, share: float, note: str = "") -> None:
        now = time.perf_counter()
        if now - self._shown < (0.1 if self._terminal else PROGRESS_SECONDS):
            return
        self._shown = now
        line = f"{self.label}: {share:4.0%}, {now - self._began:.0f} s" + (f", {note}" if note else "")
        sys.stderr.write(f"\r{line}\x1b[K" if self._terminal else f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self._terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        return "  ".join(cells).rstrip()

    return ["", title, line(header), "  ".join("-" * width for width in widths), *map(line, rows)]


def _rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> None:
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column, name in enumerate(header):
        table.add_column(Text(name), justify="left" if column < left else "right")
    for row in rows:
        table.add_row(*map(Text, row))
    RichConsole().print(table)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0.0:  # nan and both infinities
        return None
    return value
