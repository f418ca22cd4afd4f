"""Every code block of README.md and docs/ is run, and the site is built.

What a block is, decides what happens to it:

* ``python``: executed; the blocks of a page share one namespace and an empty working directory. What a page takes for
  granted stands before the block, where readers do not see it: ``<!-- setup`` ... ``-->``. Under ``<!-- raises: TEXT
  -->`` the block must end in an error whose type and message hold TEXT. A block that imports a trainer's integration
  needs that trainer; without it the page's test ends as skipped and names what was left out.
* ``bash``: our own commands are parsed by our own parser, options and all; ``make`` targets and the extras and files of
  ``pip install`` must exist. Under ``<!-- run -->`` the commands are run as well.
* ``json``, ``jsonl``, ``yaml``, ``toml``, ``xml``: parsed. ``text``: shown, not checked: output and formulas.

Any other language, or none, is an error.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from gac_kernels.cli import build_parser, main

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# Module of ours -> package that the user must have to use it.
HOSTS = {"trl": "trl", "verl": "verl", "verl_head": "verl", "trinity": "trinity"}
README_SETUPS = [ROOT / "docs" / name for name in ("integrations.md", "quickstart.md")]  # README.md is shorter without


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
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
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


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("setup", "python")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))  # trainers for the setups
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks, left_out, lost = python_blocks(page), [], set()
    if page.name == "README.md":
        blocks = [b for other in README_SETUPS for b in python_blocks(other) if b.language == "setup"] + blocks
    for block in blocks:
        if host := missing_host(block.code):
            left_out.append(f"{block.where} needs {host}")
            lost |= bound_names(block.code)
        elif names := (used_names(block.code) - bound_names(block.code)) & (lost - namespace.keys()):
            left_out.append(f"{block.where} goes on from {', '.join(sorted(names))}")
        else:
            execute(block, namespace)
    if left_out:
        pytest.skip(f"{len(blocks) - len(left_out)} blocks ran, not: {'; '.join(left_out)}")


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


BASH = [block for page in PAGES for block in blocks_of(page) if block.language == "bash"]


@pytest.mark.parametrize("block", BASH, ids=lambda block: block.where)
def test_commands_exist(block: Block) -> None:
    commands = commands_of(block)
    assert commands, f"{block.where}: no command"
    for words in commands:
        check_command(words, block.where)


RUN = [block for block in BASH if block.directive("run") is not None]


@pytest.mark.parametrize("block", RUN, ids=lambda block: block.where)
def test_commands_marked_run_do(
    block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the page's own files: a block ``<!-- file: NAME -->`` stands in the working directory under that name."""
    monkeypatch.chdir(tmp_path)
    for other in blocks_of(block.page):
        if name := other.directive("file"):
            Path(name).write_text(other.code)
    for words in commands_of(block):
        arguments = our_arguments(words)
        assert arguments is not None, f"{block.where}: not a command of ours: {words}"
        status = main(arguments)
        assert status == 0, f"{block.where}: {shlex.join(words)} ended with {status}\n{capsys.readouterr().err}"


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_block_is_left_out(page: Path) -> None:
    known = {"file", "raises", "run"}
    for block in blocks_of(page):
        for directive in block.directives:
            assert directive.partition(":")[0] in known, f"{block.where}: unknown directive {directive!r}"
        if block.language not in ("python", "bash", "setup"):
            parse_data(block)


def test_the_harness_notices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted faults: an error, an error that does not come, a wrong option, extra, target, language, directive."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    for name in ("pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((Path(__file__).parents[1] / name).read_text())
    page = tmp_path / "page.md"

    def one(text: str) -> Block:
        page.write_text(text)
        return blocks_of(page)[-1]

    with pytest.raises(ZeroDivisionError):
        execute(one("```python\n1 / 0\n```\n"), {})
    with pytest.raises(pytest.fail.Exception, match="must raise"):
        execute(one("<!-- raises: ValueError -->\n```python\n1 / 1\n```\n"), {})
    with pytest.raises(AssertionError, match="raised ZeroDivisionError"):
        execute(one("<!-- raises: ValueError -->\n```python\n1 / 0\n```\n"), {})
    execute(one("<!-- raises: ZeroDivisionError: division -->\n```python\n1 / 0\n```\n"), {})
    for command in ("gac-kernels train --no-such", "gac-kernels nothing", "pip install '.[nothing]'", "make nothing",
                    "pip install docs/none.txt", "python none.py"):  # fmt: skip
        block = one(f"```bash\n{command}\n```\n")
        with pytest.raises((AssertionError, pytest.fail.Exception), match=r"page.md:2"):
            check_command(commands_of(block)[0], block.where)
    with pytest.raises(pytest.fail.Exception, match="cannot judge"):
        check_command(["rm", "-rf", "runs"], "page")
    for text in ("```\nx\n```\n", "```ruby\nx\n```\n", "<!-- skip -->\n```text\nx\n```\n"):
        one(text)
        with pytest.raises(AssertionError):
            test_no_block_is_left_out(page)
    setup, block = (one("<!-- setup\n    x = 1\n-->\n\n```python\nassert x == 1\n```\n"), *blocks_of(page))[1:]
    assert (setup.language, setup.code, block.line) == ("setup", "x = 1", 6)
    assert missing_host("from gac_kernels.integrations.trl import attach") in (None, "trl")
    assert missing_host("import gac_kernels.integrations.liger") is None


def test_the_site_is_built_and_fetches_nothing(tmp_path: Path) -> None:
    missing = [name for name in ("mkdocs", "material", "mkdocstrings") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: pip install 'gac-kernels[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(PAGES) - 2
    for page in pages:
        fetched = re.findall(r"<(?:script|link|img|iframe)\b[^>]*(?:src|href)=\"?(https?:)?//[^\s>]*", page.read_text())
        assert not fetched, f"{page.name} loads from elsewhere: {fetched}"
    api = (tmp_path / "site" / "api" / "index.html").read_text()
    import gac_kernels as gk

    for name in gk.__all__:
        assert f'id="gac_kernels.{name}"' in api, f"docs/api.md does not show {name}"
    (commands,) = (action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction))
    cli = (tmp_path / "site" / "cli" / "index.html").read_text()
    for name, parser in commands.choices.items():
        assert f'id="{name}"' in cli, f"docs/cli.md does not show {name}"
        assert all(flag in cli for action in parser._actions for flag in action.option_strings[-1:] if flag != "--help")
