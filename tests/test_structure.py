"""The house rules, read from the imports themselves, and what importing the package costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gac_kernels"

# module (or folder) -> what it must never import, as names relative to gac_kernels or top-level packages
FORBIDDEN = {
    "tensors": ("", "triton", "numpy"),
    "types": ("", "triton", "numpy"),  # but `tensors` and `results`, which stand below it
    "objectives": ("advantages", "controller", "library", "ops", "reference", "signals", "train", "triton"),
    "reference": ("library", "ops", "_triton", "_C", "controller", "train", "triton"),
    "_triton": ("controller", "train", "integrations", "ops"),
    "ops": ("controller", "train", "integrations"),
    "signals": ("library", "ops", "reference", "controller", "train"),
    # The controller's step is an operator, which only `library` can call; of the losses it knows nothing.
    "controller": ("ops", "train"),
    "controller_schema": ("ops", "library", "reference", "controller", "train"),
    "train": ("_triton", "_C"),
}


def imports_of(path: Path) -> set[str]:
    """Names imported anywhere in a file, type checking only imports excepted: `types`, `train.loop`, `torch`, ..."""
    tree = ast.parse(path.read_text())
    inside = path.relative_to(PACKAGE).parent.parts
    names: set[str] = set()
    skip = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skip:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name.removeprefix("gac_kernels.") for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level:
            base = inside[: len(inside) - (node.level - 1)]
            stem = ".".join((*base, *((node.module or "").split(".") if node.module else ())))
            names |= {stem} if node.module else {".".join(filter(None, (stem, a.name))) for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").removeprefix("gac_kernels."))
    return names


def modules(name: str) -> list[Path]:
    single = PACKAGE / f"{name}.py"
    return [single] if single.exists() else sorted((PACKAGE / name).rglob("*.py"))


@pytest.mark.parametrize("name", FORBIDDEN)
def test_layers(name):
    files = modules(name)
    assert files, f"no such module: {name}"
    own = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
    for path in files:
        for imported in imports_of(path):
            top = imported.split(".")[0]
            for banned in FORBIDDEN[name]:
                hit = top in own - {"results", "tensors"} if banned == "" else top == banned
                assert not hit, f"{path.relative_to(ROOT)} imports {imported}"


def test_nothing_imports_integrations_or_benchmarks():
    """But doctor, which asks them for their hosts' state and reaches no further than that."""
    for path in PACKAGE.rglob("*.py"):
        if "integrations" in path.parts:
            continue
        names = imports_of(path)
        if path == PACKAGE / "commands" / "doctor.py":
            names.remove("integrations.checks")
        tops = {name.split(".")[0] for name in names}
        assert not tops & {"integrations", "benchmarks", "trl", "verl", "trinity"}, path


def test_hosts_are_imported_inside_functions_only():
    """Importing an integration needs no host: its names are there for whoever asks what is missing."""
    for path in (PACKAGE / "integrations").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module]
            tops = {name.split(".")[0] for name in modules}
            assert not tops & {"trl", "verl", "trinity", "liger_kernel", "transformers"}, f"{path} line {node.lineno}"


def test_checker_sees_a_planted_import(tmp_path, monkeypatch):
    planted = tmp_path / "gac_kernels"
    planted.mkdir()
    (planted / "controller.py").write_text("def f():\n    from .ops import hybrid_loss\n")
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", planted)
    assert imports_of(planted / "controller.py") == {"ops"}


def test_math_headers_know_no_torch():
    headers = list((ROOT / "csrc" / "math").glob("*"))
    assert headers
    for path in headers:
        lines = [line for line in path.read_text().splitlines() if line.lstrip().startswith("#include")]
        assert not any("torch" in line or "ATen" in line or "c10" in line for line in lines), path


def test_import_is_light():
    """`import gac_kernels` loads nothing heavy beyond what torch alone loads, and writes no file."""
    code = "import sys, torch; before = set(sys.modules); import gac_kernels; print(*sorted(set(sys.modules) - before))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = {name.split(".")[0] for name in run.stdout.split()}
    assert "gac_kernels" in loaded
    assert not loaded & {"triton", "transformers", "matplotlib", "tensorboard", "rich", "safetensors", "tokenizers"}


def test_files_stay_small():
    """A file over 400 lines has not been split; the house asks for about 300."""
    patterns = ("gac_kernels/**/*.py", "csrc/**/*.h", "csrc/**/*.cpp", "tests/**/*.py")
    for path in (p for pattern in patterns for p in ROOT.glob(pattern)):
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"


def test_every_public_name_has_a_docstring():
    import gac_kernels as gk

    for name in gk.__all__:
        thing = getattr(gk, name)
        assert thing.__doc__ and not thing.__doc__.startswith(f"{name}("), f"{name} has no docstring of its own"
