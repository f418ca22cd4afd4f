"""Files and settings of any content: they are accepted, or refused by an error that names the place; nothing else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import gac_kernels as gk
from gac_kernels.train.config import TrainConfig
from gac_kernels.train.tasks import JsonlTask

FUZZ = settings(
    max_examples=150, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip


def attempt(call: Callable[..., Any], *args: Any, **keywords: Any) -> tuple[Any, Exception | None]:
    """What the call gives, or the TypeError or ValueError (no subclass of them) that it refuses by."""
    try:
        return call(*args, **keywords), None
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):  # UnicodeDecodeError is one, and names no file
            raise
        return None, error


WORDS = st.sampled_from(["prompt", "answer", "demonstration", "x"])
TEXTS = st.one_of(st.text(max_size=5), st.just("\ud800"))
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=6,
)
OBJECTS = st.dictionaries(WORDS, st.one_of(TEXTS, JSON), max_size=4)
LINES = st.one_of(
    st.builds(lambda value: json.dumps(value).encode(), st.one_of(OBJECTS, JSON)),
    st.builds(lambda value, cut: json.dumps(value).encode()[:cut], OBJECTS, st.integers(1, 30)),  # torn
    st.binary(max_size=12),
)
GOOD = b'{"prompt": "p", "answer": "a", "demonstration": "d"}\n{"prompt": "q", "answer": "a"}\n'


@FUZZ
@given(st.lists(LINES, max_size=4))
@example([b"\xff\xfe"])
@example([b"[" * 100_000])
@example([b'{"prompt": ' + b"1" * 5000 + b', "answer": "a"}'])
@example([b'{"prompt": "\\ud800", "answer": "a"}'])
@example([b"\x00"])
def test_any_jsonl_is_read_or_refused_by_file_and_line(tmp_path, lines):
    path = tmp_path / "user.jsonl"
    path.write_bytes(GOOD + b"\n".join(lines))
    task, error = attempt(JsonlTask, path, eval_size=1)
    if error is not None:
        assert type(error) is ValueError and str(error).startswith(f"{path}, line "), error
        return
    for text in task.texts():  # what was accepted can be used
        text.encode()


NUMBERS = st.one_of(
    st.floats(), st.integers(-3, 1200), st.just(10**400), st.booleans(), st.none(),
    st.sampled_from(["0.5", "", "gac", "float32", [1], {}, torch.ones(2), gk.KLTarget(), gk.ConstantPrior(0.2)]),
)  # fmt: skip


def settings_of(kind: type) -> st.SearchStrategy:
    names = st.sampled_from([field.name for field in fields(kind)])
    return st.dictionaries(names, NUMBERS, min_size=1, max_size=3)


@pytest.mark.parametrize(
    "kind",
    [gk.ControllerConfig, gk.CosinePrior, gk.KLTarget, gk.SAPO, gk.GRPO, gk.CISPO, gk.GSPO, gk.DFPO, gk.NLL, gk.GIFT,
     gk.HybridObjective, gk.LogitTransform, TrainConfig],
    ids=lambda kind: kind.__name__,
)  # fmt: skip
def test_any_settings_are_taken_or_refused_by_name(kind):
    required = {"output": "unused"} if kind is TrainConfig else {}

    @FUZZ
    @given(settings_of(kind))
    def fuzz(chosen):
        made, error = attempt(kind, **required | chosen)
        if error is not None:  # a bound may be that of another field, which the text then names as well
            assert any(field.name in str(error) for field in fields(kind)), error
            return
        for name, value in chosen.items():
            held = getattr(made, name)
            assert not isinstance(held, float) or math.isfinite(held), (name, value)

    fuzz()


@FUZZ
@given(st.dictionaries(
    st.sampled_from([*gk.GuidedAdaptiveController().state_dict(), "nu", "config"]),
    st.one_of(
        NUMBERS, st.just(...), st.builds(lambda x: torch.tensor(x, dtype=torch.float64), st.floats()),
        st.dictionaries(st.sampled_from(["blend", "prior"]), NUMBERS),
    ),
    min_size=1, max_size=2,
))  # fmt: skip
def test_any_state_is_taken_or_refused_and_then_changes_nothing(changes):
    controller = gk.GuidedAdaptiveController()
    before = controller.state_dict()
    state = {key: value for key, value in (before | changes).items() if value is not ...}
    _, error = attempt(controller.load_state_dict, state)
    if error is not None:
        after = controller.state_dict()
        assert "state_dict" in str(error), error
        assert all(torch.equal(v, after[k]) if torch.is_tensor(v) else v == after[k] for k, v in before.items())
        return
    controller.step()
    assert torch.isfinite(controller.mu) and 0.05 <= float(controller.mu) <= 0.9 + 1e-7
    assert all(torch.isfinite(value) for value in controller.metrics().values())
