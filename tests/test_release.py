"""What a release says of itself is true: versions agree, locks are whole, nothing is loaded that can execute code."""

from __future__ import annotations

import ast
import importlib.util
import json
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import gac_kernels as gk

ROOT = Path(__file__).parents[1]
LOCKS = sorted((ROOT / "requirements").glob("*.lock"))
NAME = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)(\[[\w,-]+\])?==([^\s;]+)")


def locked(path: Path) -> dict[str, list[str]]:
    """Name -> versions, one for each range of Pythons; every entry checked for hashes and nothing else."""
    text = path.read_text()
    found: dict[str, list[str]] = {}
    for entry in re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines():
        match = NAME.match(entry)
        assert match, f"{path.name}: not a pinned requirement: {entry[:80]!r}"
        hashes = re.findall(r"--hash=sha256:[0-9a-f]{64}(?!\w)", entry)
        assert hashes and entry.count("--") == len(hashes), f"{path.name}: {match[1]} without hashes, or with options"
        found.setdefault(match[1].lower().replace("_", "-"), []).append(match[3])
    return found


def required(*extras: str) -> set[str]:
    """Distributions that pyproject's extras name, extras of ours followed."""
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    entries = dict(re.findall(r"^([a-z]+) = (\[.*?\])$", table, re.MULTILINE | re.DOTALL))
    names: set[str] = set()
    for extra in extras:
        for requirement in ast.literal_eval(entries[extra]):
            ours = re.fullmatch(r"gac-kernels\[([a-z,]+)\]", requirement)
            name = re.match(r"[A-Za-z0-9._-]+", requirement)
            assert name
            names |= required(*ours[1].split(",")) if ours else {name[0].lower().replace("_", "-")}
    return names


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_locks_pin_everything_by_hash_and_name_no_index(path):
    versions = locked(path)
    assert versions
    assert "://" not in path.read_text() and not re.search(r"^-", path.read_text(), re.MULTILINE)
    assert "torch" not in versions  # its builds share a version and not a hash


def test_the_development_lock_has_all_that_the_extra_asks_for():
    versions = locked(ROOT / "requirements" / "dev.lock")
    assert required("dev") > {"pytest", "transformers", "mkdocs", "ruff"}
    assert required("dev") <= versions.keys()
    assert {"numpy", "sympy", "networkx", "filelock"} <= versions.keys()  # torch's own
    assert {"cyclonedx-bom", "pip-audit"} <= locked(ROOT / "requirements" / "release.lock").keys()


def installed(tmp_path: Path, lock: Path, *, triton: bool, fails: bool = False) -> tuple[int, str, str, str]:
    """Exit status of requirements/install, what it asked pip for, from which text, and what it said."""
    python = tmp_path / "python"  # stands for a Python: answers about triton, keeps what pip was given
    python.write_text(
        f"#!/usr/bin/env bash\nif [ $1 = -c ]; then exit {int(not triton)}; fi\n"
        f'echo "$@" > {tmp_path}/asked; cp "${{@: -1}}" {tmp_path}/given; exit {int(fails)}\n'
    )
    python.chmod(0o755)
    command = [str(ROOT / "requirements" / "install"), str(python), str(lock)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.returncode, (tmp_path / "asked").read_text(), (tmp_path / "given").read_text(), run.stderr


def test_the_environment_is_installed_from_the_lock_by_hash(tmp_path):
    """All of it; but the triton that a torch brought stays, for that torch needs its very version."""
    lock = ROOT / "requirements" / "dev.lock"
    status, asked, given, _ = installed(tmp_path, lock, triton=False)
    assert status == 0 and given == lock.read_text()
    assert asked.startswith("-m pip install") and " --require-hashes " in asked and " --no-deps " in asked
    status, _, given, _ = installed(tmp_path, lock, triton=True)
    (tmp_path / "given.lock").write_text(given)
    all_of_it = locked(lock)
    assert status == 0 and all_of_it.pop("triton") and locked(tmp_path / "given.lock") == all_of_it
    status, _, _, said = installed(tmp_path, lock, triton=True, fails=True)
    assert status == 1 and "make LOCK=" in said


def test_make_installs_from_the_lock_unless_told_otherwise(tmp_path):
    """Nothing is installed: make says what it would do."""

    def plan(*arguments: str) -> str:
        command = ["make", "-n", f"VENV={tmp_path}", *arguments, "test"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    usual, other = plan(), plan("LOCK=")
    assert f"requirements/install {tmp_path}/bin/python requirements/dev.lock" in usual
    assert re.search(r"install .*--no-deps -e \.$", usual, re.MULTILINE) and ".[dev]" not in usual
    assert "requirements/install" not in other and '-e ".[dev]"' in other


def test_setuptools_is_one_without_known_holes():
    """CVE-2025-47273 (a path that leaves the directory) is mended in 78.1.1."""
    for name in ("pyproject.toml", "Makefile"):
        bounds = re.findall(r"setuptools>=([\d.]+)", (ROOT / name).read_text())
        assert bounds and all(tuple(map(int, bound.split("."))) >= (78, 1, 1) for bound in bounds), name
    for version in locked(ROOT / "requirements" / "dev.lock")["setuptools"]:
        assert tuple(map(int, version.split("."))) >= (78, 1, 1)


def test_the_lock_reader_notices(tmp_path):
    path = tmp_path / "bad.lock"
    for entry in ("six\n", "six==1.0\n", "-r other.txt\n", "six==1.0 \\\n    --hash=sha256:12\n",
                  f"six==1.0 \\\n    --hash=sha256:{'0' * 64} --no-binary\n"):  # fmt: skip
        path.write_text(entry)
        with pytest.raises(AssertionError):
            locked(path)
    path.write_text(f"six==1.0 \\\n    --hash=sha256:{'0' * 64}\n    # via us\n")
    assert locked(path) == {"six": ["1.0"]}


def test_versions_agree():
    assert f'version = "{gk.__version__}"' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {gk.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert gk.__version__ in (ROOT / "CHANGELOG.md").read_text()


def test_the_papers_are_those_that_the_code_names():
    cited = set(re.findall(r"arXiv:(\d{4}\.\d{5})", (ROOT / "CITATION.cff").read_text()))
    named = {n for p in (ROOT / "gac_kernels").rglob("*.py") for n in re.findall(r"(\d{4}\.\d{5})", p.read_text())}
    assert {"2605.26184", "2511.20347", "2602.19345", "2604.13088", "2601.09233"} == cited <= named


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]


def unsafe(call: ast.Call) -> str | None:
    """Why a call may execute what it reads, or None."""
    name = ast.unparse(call.func)
    keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
    if name.split(".")[-2:] == ["torch", "load"] and keywords.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name.split(".")[0] in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"):
        return name
    if name in ("eval", "exec", "__import__", "yaml.load", "os.system", "os.popen"):
        return name
    if name.endswith("from_pretrained"):
        if keywords.get("local_files_only") != "True":
            return "from_pretrained that may fetch"
        # Left out, transformers asks on standard input; and what is no safetensors file is unpickled.
        if keywords.get("trust_remote_code") != "False":
            return "from_pretrained without trust_remote_code=False"
        if "Model" in name and keywords.get("use_safetensors") != "True":
            return "from_pretrained that may unpickle"
    return "trust_remote_code" if keywords.get("trust_remote_code", "False") != "False" else None


def test_nothing_that_is_loaded_can_execute_code():
    files = sorted(
        path for folder in ("gac_kernels", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    )
    found = [f"{p.relative_to(ROOT)}:{c.lineno}: {why}" for p in files for c in calls(p) if (why := unsafe(c))]
    assert found == []
    local = "Auto.from_pretrained(n, local_files_only=True, trust_remote_code=False"
    assert unsafe(ast.parse(f"{local})", mode="eval").body) is None  # type: ignore[arg-type]
    asking = "Auto.from_pretrained(n, local_files_only=True)"
    planted = ("torch.load(f)", "torch.load(f, weights_only=False)", "pickle.loads(b)", "eval(s)", "yaml.load(f)",
               "Auto.from_pretrained(n, trust_remote_code=False)", asking,
               asking.replace(")", ", trust_remote_code=True)"), f"{local})".replace("Auto", "AutoModel"))  # fmt: skip
    for text in planted:
        assert unsafe(ast.parse(text, mode="eval").body)  # type: ignore[arg-type]


class Hostile:
    """Its unpickling calls ``open(path, "w")``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("place", ["state", "inside"])
def test_a_hostile_pickle_is_refused_before_it_runs(tmp_path, place):
    """The manifest is right, as an attacker would write it: what protects is how the file is read."""
    pytest.importorskip("safetensors")
    from gac_kernels.train import checkpoint

    trace = tmp_path / "trace"
    shutil.copytree(ROOT / "tests" / "data" / "checkpoints_v1", tmp_path / "checkpoints")
    directory = tmp_path / "checkpoints" / "step-00000007"
    hostile = Hostile(trace)
    torch.save(hostile if place == "state" else {"step": 7, "rng": [torch.zeros(2), hostile]}, directory / "state.pt")
    manifest = json.loads((directory / "manifest.json").read_text())
    manifest["files"]["state.pt"] = checkpoint._seal(directory / "state.pt")
    (directory / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError, match=r"[Ww]eights"):
        checkpoint.load_checkpoint(tmp_path / "checkpoints")
    assert not trace.exists()
    torch.load(directory / "state.pt", weights_only=False)  # it would have
    assert trace.exists()


@pytest.fixture
def audit(monkeypatch):
    """requirements/audit.py with pip-audit's answers set: service -> (standard output, standard error)."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / "requirements" / "audit.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(answers, *arguments):
        def ask(command, **_):
            out, err = answers[command[command.index("-s") + 1]]
            return subprocess.CompletedProcess(command, 1, json.dumps(out) if out else "", err)

        monkeypatch.setattr(module.subprocess, "run", ask)
        monkeypatch.setattr(sys, "argv", ["audit", *arguments])
        return module.main()

    return run


def report(*entries):
    return {"dependencies": [dict(entry) for entry in entries], "fixes": []}, ""


GOOD = {"name": "six", "version": "1.0", "vulns": []}
BAD = {"name": "pip", "version": "1.0", "vulns": [{"id": "PYSEC-1", "fix_versions": ["2"], "aliases": []}]}
LEFT_OUT = {"name": "odd", "skip_reason": "Dependency not found on PyPI"}
GONE = (None, "Traceback ...\nConnectionError: no route")


@pytest.mark.parametrize(
    ("answers", "status", "required", "said"),
    [
        ({"pypi": report(GOOD)}, 0, 0, "1 packages audited, 0 vulnerable"),
        ({"pypi": report(GOOD, BAD)}, 1, 1, "VULNERABLE: pip 1.0: PYSEC-1"),
        ({"pypi": report(GOOD, LEFT_OUT)}, 0, 1, "1 left out: Dependency not found"),
        ({"pypi": report(LEFT_OUT), "osv": report(BAD)}, 1, 1, "VULNERABLE: pip 1.0: PYSEC-1"),
        (
            {"pypi": GONE, "osv": GONE},
            0,
            1,
            "NOT AUDITED: six==1.0: no database of vulnerabilities could be asked (Conn",
        ),
    ],
)
def test_an_audit_that_did_not_happen_is_said(audit, capsys, answers, status, required, said):
    assert audit(answers, "six==1.0") == status
    assert said in capsys.readouterr().out
    assert audit(answers, "--required", "six==1.0") == required
