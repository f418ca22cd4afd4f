"""Put the command line's own words into the site: ``<!-- options: COMMAND -->`` becomes its help and its options."""

from __future__ import annotations

import argparse
import re
from typing import Any

from gac_kernels.cli import build_parser


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs calls this for every page."""
    return re.sub(r"<!-- options: ([\w-]+) -->", lambda match: options(match[1]), markdown)


def options(command: str) -> str:
    """The command's description as text, and a table of its options."""
    (commands,) = (a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    parser = commands.choices[command]
    rows = [row(action) for action in parser._actions if action.dest not in ("help", "json", "seed", "debug")]
    table = ["", "| option | |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(["```text", (parser.description or "").strip(), "```", *table])


def row(action: argparse.Action) -> str:
    """One option: how it is written, and what it does."""
    name = action.option_strings[-1]
    if action.nargs != 0:
        choices = "|".join(map(str, action.choices)) if action.choices else None
        name = f"{name} {choices or action.metavar or action.dest.upper()}"
    meaning = (action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%")
    bar = "\\|"  # a bare one would end the cell
    return f"| `{name.replace('|', bar)}` | {meaning.replace('|', bar)} |"
