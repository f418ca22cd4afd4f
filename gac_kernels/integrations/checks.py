"""Whether the hosts we plug into are installed, in a version we know, and with their hooks where we expect them.

Hooks are looked up in the host's source, not by importing it: that would take seconds for each (TRL: 8 s on two cores),
and may read the environment, start what nobody asked for, or fail for reasons of its own.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

HOSTS = {  # distribution -> module of this folder with its check()
    "trl": "_trl_check",
    "verl": "verl",
    "trinity-rft": "trinity",
    "liger-kernel": "liger",
    "transformers": "transformers",
}
OK, ABSENT, UNSUPPORTED, MISSING, FAILED = "ok", "not installed", "unsupported version", "hook missing", "failed"


class Check(NamedTuple):
    """What came of looking at one host.

    Attributes:
        status: ``"ok"``, ``"not installed"``, ``"unsupported version"``, ``"hook missing"`` or ``"failed"``: it is
            there and could not be looked at.
        why: what was expected and what was found; "" where there is nothing to say.
        version: of the installed distribution, or None.
    """

    status: str
    why: str = ""
    version: str | None = None


def check_all() -> dict[str, Check]:
    """Every host's check. One that raises has failed, with the exception's text for a reason."""
    return {distribution: _checked(distribution, module) for distribution, module in HOSTS.items()}


def _checked(distribution: str, module: str) -> Check:
    version = version_of(distribution)
    if version is None:
        return Check(ABSENT)
    try:
        found: Check = importlib.import_module(f".{module}", __package__).check()
    except Exception as error:  # a host may break in any way; doctor says how and goes on with the next
        return Check(FAILED, f"{type(error).__name__}: {error}", version)
    return found


def check_host(distribution: str, oldest: str, before: str, hooks: Mapping[str, tuple[str, ...]]) -> Check:
    """Look at a host: its version, then each hook in its source.

    Args:
        distribution: name on PyPI. oldest, before: versions ``oldest <= v < before`` are supported.
        hooks: ``"module:name"`` or ``"module:Class.name"`` where it is defined or imported -> names of parameters that
            a function, or a class's ``__init__``, must take; () asks only that it exists.
    """
    version = version_of(distribution)
    if version is None:
        return Check(ABSENT)
    if not release(oldest) <= release(version) < release(before):
        return Check(UNSUPPORTED, f"needs >= {oldest}, < {before}; found {version}", version)
    for path, parameters in hooks.items():
        problem = _problem(path, parameters)
        if problem:
            return Check(MISSING, problem, version)
    return Check(OK, "", version)


def version_of(distribution: str) -> str | None:
    """Installed version, from the metadata."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, ...]:
    """The numbers of a version without trailing zeros: 1.16.0.dev0 and 1.16rc1 count as 1.16."""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise ValueError(f"version must begin with a number, got {version!r}")
    numbers = [int(part) for part in match.group().split(".")]
    while len(numbers) > 1 and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


def _problem(path: str, parameters: tuple[str, ...]) -> str:
    """What is wrong with a hook, or ""."""
    module, _, names = path.partition(":")
    file = _source(module)
    if file is None:
        return f"no module {module}"
    node: ast.AST = ast.parse(file.read_bytes())
    for name in names.split("."):
        found = next((inner for inner in _definitions(node) if _names(inner) & {name}), None)
        if found is None:
            return f"no {name!r} where {path} was expected"
        node = found
    if not parameters:
        return ""
    if isinstance(node, ast.ClassDef):
        node = next((inner for inner in _definitions(node) if _names(inner) & {"__init__"}), node)
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return f"{path} is no function that is defined there"
    takes = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
    unknown = [name for name in parameters if name not in takes]
    return f"{path} has no parameter {', '.join(unknown)}; it has {', '.join(takes)}" if unknown else ""


def _source(module: str) -> Path | None:
    """The file of a module, found without importing any package above it."""
    top, *below = module.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        stem = Path(folder, *below)
        for file in (stem.with_name(f"{stem.name}.py"), stem / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definitions(node: ast.AST) -> Iterator[ast.stmt]:
    """Statements of a module's or class's body, those under its conditions and tries as well."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ExceptHandler):
            yield from _definitions(child)
        elif isinstance(child, ast.stmt):
            yield child
            if isinstance(child, (ast.If, ast.Try, ast.With)):
                yield from _definitions(child)


def _names(node: ast.stmt) -> set[str]:
    """What a statement defines."""
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name for alias in node.names}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {part.id for target in targets for part in ast.walk(target) if isinstance(part, ast.Name)}
