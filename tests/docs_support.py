"""Reading the code blocks of a page, running them, and judging what is not run; test_docs.py says what is what."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gac_kernels.cli import build_parser

ROOT = Path(__file__).parents[1]
# Module of ours -> package that the user must have to use it.
HOSTS = {"trl": "trl", "verl": "verl", "verl_head": "verl", "trinity": "trinity"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, or its hidden setup (language ``setup``)."""

    page: Path
    line: int
    language: str
    code: str
    directives: tuple[str, ...]

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    def directive(self, name: str) -> str | None:
        found = [d.partition(":")[2].strip() for d in self.directives if d.partition(":")[0] == name]
        return found[0] if found else None


FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>.*)$")
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)


def blocks_of(page: Path) -> list[Block]:
    """All blocks in order. Comments directly before a fence are its directives."""
    lines, found, pending, number = page.read_text(encoding="utf-8").splitlines(), [], [], 0
    while number < len(lines):
        line, start = lines[number], number + 1
        if line.strip().startswith("<!--"):
            while "-->" not in lines[number] and number + 1 < len(lines):
                number += 1
            body = COMMENT.search("\n".join(lines[start - 1 : number + 1]))
            assert body, f"{page}:{start}: a comment that does not end"
            kind, _, rest = body[1].strip().partition("\n")
            if kind.split(":")[0].strip() == "setup":
                found.append(Block(page, start + 1, "setup", textwrap.dedent(rest), ()))
            else:
                pending.append(" ".join(body[1].split()))
        elif fence := FENCE.match(line):
            code = []
            number += 1
            while number < len(lines) and lines[number].strip() != fence["ticks"]:
                code.append(lines[number].removeprefix(fence["indent"]))
                number += 1
            assert number < len(lines), f"{page}:{start}: a block that does not end"
            found.append(Block(page, start + 1, fence["info"].strip(), "\n".join(code) + "\n", tuple(pending)))
            pending = []
        elif line.strip():
            pending = []
        number += 1
    return found


def missing_host(code: str) -> str | None:
    """A package that the block's imports need and that is not installed."""
    for node in ast.walk(ast.parse(code)):
        names = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            host = HOSTS.get(parts[2]) if parts[:2] == ["gac_kernels", "integrations"] and len(parts) > 2 else None
            host = host or (parts[0] if parts[0] in HOSTS.values() else None)
            if host is not None and importlib.util.find_spec(host) is None:
                return host
    return None


def bound_names(code: str) -> set[str]:
    """Names that the block would leave behind."""
    bound = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            bound |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
    return bound


def used_names(code: str) -> set[str]:
    return {n.id for n in ast.walk(ast.parse(code)) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}


def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block so that an error shows the page's own line; one that must raise has to."""
    # dont_inherit: the page is read without this file's `from __future__ import annotations`
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
    wanted = block.directive("raises")
    if wanted is None:
        exec(code, namespace)
        return
    try:
        exec(code, namespace)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
        assert wanted in " ".join(told.split()), f"{block.where}: raised {told}"
    else:
        pytest.fail(f"{block.where}: must raise {wanted!r}")


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command, without comments, prompts and variables set for it."""
    lines = block.code.replace("\\\n", " ").splitlines()
    split = [shlex.split(line, comments=True) for line in lines]
    commands = []
    for words in filter(None, split):
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        commands.append(words)
    return commands


def our_arguments(words: list[str]) -> list[str] | None:
    """What follows ``gac-kernels`` or ``python -m gac_kernels``, under torchrun too; None for another command."""
    if words[0] == "gac-kernels":
        return words[1:]
    if words[0] in ("python", "torchrun") and "gac_kernels" in words and words[words.index("gac_kernels") - 1] == "-m":
        return words[words.index("gac_kernels") + 1 :]
    return None


def extras() -> set[str]:
    text = (ROOT / "pyproject.toml").read_text()
    table = text.split("[project.optional-dependencies]")[1].split("\n[")[0]
    return set(re.findall(r"^([a-z]+) = \[", table, re.MULTILINE))


def check_pip(words: list[str], where: str) -> None:
    assert words[:2] == ["pip", "install"], f"{where}: {words}"
    for word in words[2:]:
        if match := re.fullmatch(r"(?:\.|gac-kernels)\[([a-z,]+)\]", word):
            unknown = set(match[1].split(",")) - extras()
            assert not unknown, f"{where}: no such extra: {sorted(unknown)}"
        elif re.fullmatch(r"[\w./]+/[\w.-]+", word):
            assert (ROOT / word).exists(), f"{where}: no such file: {word}"
        else:
            assert re.fullmatch(r"-[\w-]+|\.|[a-z][\w-]*([=<>]=[\d.*]+)?", word), f"{where}: {word!r}"


def check_command(words: list[str], where: str) -> None:
    """A command as a reader would type it: everything in it exists. Fails for a command that this test cannot judge."""
    arguments = our_arguments(words)
    if arguments is not None:
        try:
            build_parser().parse_args(arguments)
        except SystemExit as left:
            if left.code != 0:
                pytest.fail(f"{where}: {shlex.join(words)} is not accepted by the command line")
    elif words[0] == "make":
        targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        wanted = [word for word in words[1:] if "=" not in word]
        assert set(wanted) <= targets, f"{where}: no such target: {set(wanted) - targets}"
    elif words[0] == "pip":
        check_pip(words, where)
    elif words[0] in ("python", "bash") and len(words) > 1 and words[1].endswith((".py", ".sh")):
        assert (ROOT / words[1]).is_file(), f"{where}: no such file: {words[1]}"
    elif words[:3] == ["python", "-m", "verl.trainer.main_ppo"]:
        from gac_kernels.integrations.verl import NAMES

        modes = {word.partition("=")[2] for word in words if word.partition("=")[0].endswith(".loss_mode")}
        assert modes <= set(NAMES), f"{where}: verl has no {modes}"
    elif words[:2] == ["git", "clone"] or words[0] == "cd":
        pass
    else:
        pytest.fail(f"{where}: a command that this test cannot judge: {shlex.join(words)}")


def parse_data(block: Block) -> None:
    if block.language == "json":
        json.loads(block.code)
    elif block.language == "jsonl":
        for line in block.code.splitlines():
            json.loads(line)
    elif block.language == "yaml":
        pytest.importorskip("yaml").safe_load(block.code)
    elif block.language == "toml":
        (pytest.importorskip("tomllib") if sys.version_info >= (3, 11) else pytest.importorskip("tomli")).loads(
            block.code
        )
    elif block.language == "xml":
        ElementTree.fromstring(block.code)
    else:
        assert block.language == "text", f"{block.where}: language {block.language!r} is not one that a test reads"
