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
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import docs_support
import pytest
from docs_support import (
    ROOT,
    Block,
    blocks_of,
    bound_names,
    check_command,
    commands_of,
    execute,
    missing_host,
    our_arguments,
    parse_data,
    used_names,
)

from gac_kernels.cli import build_parser, main

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
# README.md is shorter without what its blocks go on from.
README_SETUP = """
import types
import torch

torch.manual_seed(0)
S, T, V, H = 6, 5, 33, 16
hidden = torch.randn(S, T, H, requires_grad=True)
model = types.SimpleNamespace(lm_head=torch.nn.Linear(H, V, bias=False))
targets, mask = torch.randint(V, (S, T)), torch.ones(S, T, dtype=torch.bool)
is_expert, advantages = torch.arange(S) < 3, torch.tensor([0.0, 0.0, 0.0, 1.0, -0.5, 0.2])
logits = model.lm_head(hidden)
logprobs = torch.log_softmax(logits.detach(), -1).gather(-1, targets[..., None]).squeeze(-1).requires_grad_()
old = logprobs.detach() + 0.01
"""


def python_blocks(page: Path) -> list[Block]:
    return [block for block in blocks_of(page) if block.language in ("setup", "python")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "integrations"))  # trainers for the setups
    namespace: dict[str, Any] = {"__name__": "__docs__"}
    blocks, left_out, lost = python_blocks(page), [], set()
    if page == ROOT / "README.md":
        own = Block(page, 0, "setup", README_SETUP, ())
        others = python_blocks(ROOT / "docs" / "integrations.md")
        blocks = [*(b for b in others if b.language == "setup"), own, *blocks]
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
    monkeypatch.setattr(docs_support, "ROOT", tmp_path)
    for name in ("pyproject.toml", "Makefile"):
        (tmp_path / name).write_text((ROOT / name).read_text())
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
