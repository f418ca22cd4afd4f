"""Runs that learn nothing say so: once, in words, with what to try."""

from __future__ import annotations

import json

import pytest
from small_runs import small

import gac_kernels as gk
from gac_kernels.train import train
from gac_kernels.train.collect import Collector
from gac_kernels.train.loop import Trainer
from gac_kernels.train.notices import PATIENCE, Watch
from gac_kernels.train.rollouts import Answered


def metrics(mixed=0.5, ended=0.5, reward=0.25):
    return {"groups_mixed": mixed, "response_ended": ended, "reward": reward, "loss": 0.1}


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"mixed": 0.0, "reward": 0.0}, ["in 10 steps in a row all", "mean 0)", "warm start", "group_size"]),
        ({"mixed": 0.0, "reward": 1.0}, ["got the same reward (mean 1)", "harder", "temperature"]),
        ({"ended": 0.0}, ["in 10 steps in a row no completion ended", "max_new_tokens=24", "chat template"]),
    ],
)  # fmt: skip
def test_a_habit_is_told_once(values, says):
    watch = Watch(small())
    assert [watch.step(metrics(**values)) for _ in range(PATIENCE - 1)] == [[]] * (PATIENCE - 1)
    (text,) = watch.step(metrics(**values))
    assert all(part in text for part in says), text
    assert watch.step(metrics(**values)) == watch.finish(0.0, 0.5, 0.0) == []
    other = Watch(small())
    other.load_state_dict(watch.state_dict())  # as the next sitting does
    assert other.step(metrics(**values)) == [] and other.told == watch.told


def test_a_habit_that_is_broken_starts_anew():
    watch = Watch(small())
    for _ in range(3):
        for _ in range(PATIENCE - 1):
            assert watch.step(metrics(mixed=0.0, ended=0.0)) == []
        assert watch.step(metrics(mixed=0.01, ended=0.01)) == []
    assert watch.finish(0.0, 0.5, 0.5) == []


def test_the_end_of_a_short_run_and_of_one_without_rollouts():
    watch = Watch(small())
    for _ in range(3):
        assert watch.step(metrics(mixed=0.0, ended=0.0)) == []
    first, second, third = watch.finish(0.0, 0.0, 0.0)
    assert "in 3 steps in a row all completions" in first and "in 3 steps" in second and "accuracy" in third
    watch = Watch(small())
    assert watch.step({"loss": 1.0}) == [] and len(watch.finish(0.0, 0.0, None)) == 1
    assert Watch(small()).finish(0.0, 0.1, None) == Watch(small()).finish(0.1, 0.0, None) == []
    alone = Watch(small(controller="fixed", mu=1.0))  # rewards are looked at and not learned from
    assert [alone.step(metrics(mixed=0.0)) for _ in range(PATIENCE)] == [[]] * PATIENCE


def test_the_share_of_mixed_groups():
    rows = [Answered(k // 3, [1], [2], reward) for k, reward in enumerate([0, 0, 0, 1, 0, 1, 1, 1, 1, 0.5, 0.5, 1])]
    collector = Trainer(small(prompts_per_step=4)).collector
    assert isinstance(collector, Collector)
    assert collector._metrics(rows)["groups_mixed"] == 0.5


def test_a_run_says_what_went_wrong_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr("gac_kernels.train.tasks.ArithmeticTask.reward", lambda *_: 0.0)
    config = small(tmp_path / "run", steps=3, max_new_tokens=24)
    with pytest.warns(RuntimeWarning) as record:
        result = train(config, progress=False)
    texts = [str(warning.message) for warning in record if "sitting" in warning.filename or "train" in warning.filename]
    assert [text for text in texts if text in result.notices] == list(result.notices)  # once each
    assert any("same reward (mean 0)" in text for text in result.notices)
    assert any("the accuracy on the held-out problems is 0 before and after" in text for text in result.notices)
    assert json.loads((config.output / "summary.json").read_text())["notices"] == list(result.notices)
    page = (config.output / "report.html").read_text()
    assert page.count("the accuracy on the held-out problems is 0 before and after") == 1
    assert train(config, resume=True, progress=False).notices == result.notices


def test_groups_of_one_are_refused_where_they_would_teach():
    objective = gk.HybridObjective(entropy_coef=0.01)
    for settings in ({}, {"objective": objective}, {"advantage_scale": "none"}, {"controller": "fixed", "mu": 0.9}):
        with pytest.raises(ValueError, match=r"group_size must be >= 2 to learn from rewards, got 1: .* Try 4 or more"):
            small(group_size=1, **settings)
    for settings in ({"controller": "fixed", "mu": 1.0}, {"controller": "hpt"}, {"steps": 0, "warmup_sft_steps": 1}):
        assert small(group_size=1, **settings).group_size == 1
