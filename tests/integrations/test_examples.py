"""The examples, run at their smallest."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """An example as a module, found as Python finds its neighbours when it is run."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_bare_pytorch_learns(example, capsys):
    rewards = example("bare_pytorch").main(steps=60)
    assert sum(rewards[:5]) / 5 < 0.3 and sum(rewards[-5:]) / 5 > 0.6
    assert capsys.readouterr().out.count("mu 0.") == 4


@pytest.mark.parametrize("accelerate", [True, False])
def test_loss_function_is_transformers_own_with_plain_nll(example, accelerate, monkeypatch):
    pytest.importorskip("transformers")
    if accelerate:
        pytest.importorskip("accelerate")
    module = example("transformers_loss_function")
    if not accelerate:
        monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    measured = module.main(steps=12)
    own, ours, phi = (measured[name] for name in ("transformers' own", "ours, NLL", "ours, NLL-phi"))
    assert ours == pytest.approx(own, rel=1e-4)
    assert own[0] < 2.0 and abs(phi[0] / own[0] - 1) > 1e-2  # not the same by much more than those two are


def test_trl_hybrid(example, capsys):
    pytest.importorskip("trl")
    pytest.importorskip("datasets")
    example("trl_hybrid").main(steps=2)
    assert "step    2   reward 0." in capsys.readouterr().out
