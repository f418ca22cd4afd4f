"""What doctor says of the hosts: of made-up ones in every state, and of those that are installed."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import pytest

from gac_kernels.cli import main
from gac_kernels.integrations import Check, check_host, checks

SOURCE = """
try:
    from elsewhere import borrowed
except ImportError:
    borrowed = None
if True:
    class Trainer:
        hook: int = 0
        def __init__(self, model, /, *, args): ...
        def compute(self, inputs, **rest): ...
LIMIT, OTHER = 1, 2
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host on the path, which must never be imported."""
    package = tmp_path / "made_up_host" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "made_up_host" / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "__init__.py").write_text("from .trainer import Trainer\nraise RuntimeError('imported')")
    (package / "trainer.py").write_text(SOURCE)
    metadata = tmp_path / "made_up_host-1.4.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: made-up-host\nVersion: 1.4.2\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()


WHERE = "made_up_host.inner.trainer"


@pytest.mark.parametrize(
    ("hooks", "problem"),
    [
        ({}, ""),
        ({f"{WHERE}:Trainer": ("model", "args"), f"{WHERE}:Trainer.compute": ("inputs",)}, ""),
        ({f"{WHERE}:Trainer.hook": (), f"{WHERE}:borrowed": (), f"{WHERE}:LIMIT": (), f"{WHERE}:OTHER": ()}, ""),
        ({"made_up_host.inner:Trainer": ()}, ""),
        ({"made_up_host.gone:Trainer": ()}, "no module made_up_host.gone"),
        ({"made_up_host.inner:Model": ()}, "no 'Model' where made_up_host.inner:Model was expected"),
        ({f"{WHERE}:Trainer.step": ()}, f"no 'step' where {WHERE}:Trainer.step was expected"),
        (
            {f"{WHERE}:Trainer.compute": ("inputs", "model", "rest")},
            f"{WHERE}:Trainer.compute has no parameter model, rest; it has self, inputs",
        ),
        ({f"{WHERE}:borrowed": ("a",)}, f"{WHERE}:borrowed is no function that is defined there"),
        ({f"{WHERE}:Trainer": ("eval",)}, f"{WHERE}:Trainer has no parameter eval; it has self, model, args"),
    ],
)
def test_hooks_are_read_in_the_source(host, hooks, problem):
    found = check_host("made-up-host", "1.4", "2", hooks)
    assert found == Check("hook missing" if problem else "ok", problem, "1.4.2")
    assert "made_up_host" not in sys.modules


@pytest.mark.parametrize(
    ("oldest", "before", "status"),
    [
        ("1.4.2", "1.4.3", "ok"),
        ("1.4", "2", "ok"),
        ("1.4.3", "2", "unsupported version"),
        ("1.2", "1.4.2", "unsupported version"),
        ("1.0", "1.4", "unsupported version"),
        ("1.10", "2", "unsupported version"),
    ],
)
def test_versions(host, oldest, before, status):
    found = check_host("made-up-host", oldest, before, {})
    assert found.status == status and found.version == "1.4.2"
    assert found.why == ("" if status == "ok" else f"needs >= {oldest}, < {before}; found 1.4.2")


def test_releases():
    assert checks.release("1.16.0.dev0") == checks.release("1.16rc1") == checks.release("1.16") == (1, 16)
    assert checks.release("0.9") < checks.release("0.10") < checks.release("0.10.1")
    with pytest.raises(ValueError, match="version must begin with a number, got 'main'"):
        checks.release("main")


def test_what_is_not_installed():
    assert check_host("no-such-host", "1", "2", {"nowhere:at_all": ()}) == Check("not installed")


def test_a_check_that_raises_is_reported_and_the_others_go_on(host, monkeypatch, capsys):
    def broken():
        raise OSError("the source cannot be read")

    monkeypatch.setattr("gac_kernels.integrations._trl_check.check", broken)
    monkeypatch.setattr(checks, "HOSTS", {"made-up-host": "_trl_check", "no-such-host": "liger"})
    failed = Check("failed", "OSError: the source cannot be read", "1.4.2")
    assert checks.check_all() == {"made-up-host": failed, "no-such-host": Check("not installed")}
    assert main(["doctor"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("made-up-host"))
    assert row.split(maxsplit=3) == ["made-up-host", "1.4.2", "failed", "OSError: the source cannot be read"]


def test_doctor_says_what_is_wrong_with_a_host(host, monkeypatch, capsys):
    monkeypatch.setattr("gac_kernels.integrations._trl_check.check", lambda: check_host("made-up-host", "2", "3", {}))
    monkeypatch.setattr(checks, "HOSTS", {"made-up-host": "_trl_check"})
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["integrations"]
    why = "needs >= 2, < 3; found 1.4.2"
    assert found == {"made-up-host": {"status": "unsupported version", "why": why, "version": "1.4.2"}}


@pytest.mark.parametrize("distribution", checks.HOSTS)
def test_every_integration_has_a_check(distribution):
    """Of what is installed the tests of that integration show that it works: so must its check."""
    module = importlib.import_module(f"gac_kernels.integrations.{checks.HOSTS[distribution]}")
    found = module.check()
    assert isinstance(found, Check)
    if checks.version_of(distribution) is None:
        assert found == Check("not installed")
        pytest.skip(f"{distribution} is not installed")
    assert found.status == "ok", found


def test_no_host_is_imported():
    code = """
import sys
from gac_kernels.integrations.checks import check_all
print([name for name, found in check_all().items() if found.status == "failed"])
print(*{name.partition(".")[0] for name in sys.modules} & {"trl", "verl", "trinity", "liger_kernel", "transformers"})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n\n"
