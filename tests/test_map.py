"""Every test that tests/README.md names is there, and every failure in it has one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAP = ROOT / "tests" / "README.md"
NAME = re.compile(r"`(tests/[\w/]+\.py)::((?:\w+::)?\w+)`")
FAILURES = 26


def functions(path: Path) -> set[str]:
    """Tests of a file, `Class::test` inside a class, and fixtures that every test uses: read and not run."""
    body = ast.parse(path.read_text()).body
    found = [("", node) for node in body]
    found += [(f"{group.name}::", node) for group in body if isinstance(group, ast.ClassDef) for node in group.body]
    return {
        prefix + node.name
        for prefix, node in found
        if isinstance(node, ast.FunctionDef)
        and (node.name.startswith("test_") or any("autouse=True" in ast.unparse(d) for d in node.decorator_list))
    }


def missing(text: str) -> list[str]:
    """The names that are not there."""
    return [
        f"{file}::{name}"
        for file, name in NAME.findall(text)
        if not (ROOT / file).exists() or name not in functions(ROOT / file)
    ]


def rows(text: str) -> dict[str, list[list[str]]]:
    """The cells of the table under each heading."""
    tables: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("|") and not re.match(r"\|[-|]+$", line):
            tables.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split("|")])
    return {name: table[1:] for name, table in tables.items()}


def test_every_name_in_the_map_is_a_test():
    text = MAP.read_text()
    assert not missing(text)
    assert text.count(".py::") == len(NAME.findall(text))  # no name that the pattern passes over


def test_every_row_of_the_map_has_a_test():
    tables = rows(MAP.read_text())
    assert len(tables) >= 3 and all(len(table) > 5 for table in list(tables.values())[:3])
    for table in tables.values():
        for row in table:
            assert NAME.search(row[-1]), row
    failures = next(iter(tables.values()))
    assert [row[0] for row in failures] == [str(number) for number in range(1, FAILURES + 1)]


def test_the_check_sees_a_name_that_is_not_there():
    assert missing("`tests/test_map.py::test_every_name_in_the_map_is_a_test`") == []
    for name in (
        "tests/test_map.py::test_nothing",
        "tests/test_nowhere.py::test_map",
        "tests/test_map.py::rows",
        "tests/test_triton_aot.py::No::test_amd",
    ):
        assert missing(f"`{name}`") == [name]
