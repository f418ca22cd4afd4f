"""Tasks: what a position gives, that held-out problems stay unseen, what earns a reward, which lines are refused."""

from __future__ import annotations

import json
import re

import pytest

from gac_kernels.train.config import TrainConfig
from gac_kernels.train.tasks import ArithmeticTask, Example, JsonlTask, build_task


@pytest.mark.parametrize("digits", [2, 3, 5])
def test_a_worked_demonstration_adds_up_column_by_column(digits):
    task = ArithmeticTask(digits=digits, demonstrations=20, eval_size=10)
    for position in range(20):
        example = task.demonstration(position)
        a, b = map(int, example.prompt.rstrip("=").split("+"))
        *columns, answer = example.demonstration.split(" ")
        carry, value = 0, 0
        for place, column in enumerate(columns):
            x, y, c, total = map(int, re.fullmatch(r"(\d)\+(\d)\+(\d)=(\d\d)", column).groups())
            assert (x, y, c) == (a // 10**place % 10, b // 10**place % 10, carry)
            assert total == x + y + c
            carry, value = total // 10, value + total % 10 * 10**place
        assert len(columns) == digits
        assert answer == f"#{value + carry * 10**digits}" == f"#{a + b}"
        assert example.answer == str(a + b)
        assert task.reward(example, example.demonstration) == 1.0


def test_arithmetic_reward_reads_the_final_answer_only():
    task, example = ArithmeticTask(eval_size=1, demonstrations=1), Example("347+185=", "532")
    assert task.reward(example, "nonsense #532") == 1.0
    for wrong in ("532", "#5320", "#1532", "#0532", "#53", "#532 ", "#532#", "#", ""):
        assert task.reward(example, wrong) == 0.0, wrong


def test_no_training_problem_is_ever_held_out():
    task = ArithmeticTask(digits=2, demonstrations=200, eval_size=300, seed=3)
    held_out = {e.prompt for e in task.evaluation()}
    assert len(held_out) == 300
    assert not held_out & {task.prompt(position).prompt for position in range(4000)}
    assert not held_out & {task.demonstration(position).prompt for position in range(200)}
    other_seed = ArithmeticTask(digits=2, demonstrations=200, eval_size=300, seed=4)
    assert not held_out & {other_seed.prompt(position).prompt for position in range(4000)}


def _jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def lines(tmp_path):
    records = [{"prompt": f"q{i}", "answer": str(i), "demonstration": f"so {i}"} for i in range(20)]
    del records[7]["demonstration"]
    return _jsonl(tmp_path / "t.jsonl", records)


@pytest.mark.parametrize("kind", ["arithmetic", "jsonl"])
def test_an_example_depends_on_seed_and_position_alone(kind, lines):
    def make(seed):
        if kind == "jsonl":
            return JsonlTask(lines, eval_size=4, seed=seed)
        return ArithmeticTask(demonstrations=10, eval_size=4, seed=seed)

    forward = make(1)
    drawn = [(forward.prompt(p), forward.demonstration(p)) for p in range(60)]
    again = make(1)
    assert [(again.prompt(p), again.demonstration(p)) for p in reversed(range(60))] == drawn[::-1]
    assert again.evaluation() == forward.evaluation()
    other = make(2)
    assert [(other.prompt(p), other.demonstration(p)) for p in range(60)] != drawn


def test_every_epoch_passes_over_all_demonstrations_in_a_new_order():
    task = ArithmeticTask(demonstrations=16, eval_size=1)
    first, second = ([task.demonstration(p) for p in range(e * 16, e * 16 + 16)] for e in (0, 1))
    assert len({e.prompt for e in first}) == 16
    assert first != second and sorted(e.prompt for e in first) == sorted(e.prompt for e in second)


def test_jsonl_holds_lines_out_and_keeps_to_the_pool(lines):
    task = JsonlTask(lines, eval_size=5, demonstrations=3)
    held_out = {e.prompt for e in task.evaluation()}
    trained = {task.prompt(p).prompt for p in range(15)}
    assert len(held_out) == 5 and len(trained) == 15 and not held_out & trained
    assert task.demonstrations == 3 == len({task.demonstration(p).prompt for p in range(30)})
    assert {task.demonstration(p).prompt for p in range(30)} <= trained - {"q7"}


def test_a_fifth_of_a_small_file_is_held_out(lines, tmp_path):
    assert len(JsonlTask(lines).evaluation()) == 4  # of 20
    assert len(build_task(TrainConfig(tmp_path / "o", task=str(lines))).evaluation()) == 4
    two = _jsonl(tmp_path / "two.jsonl", [{"prompt": f"p{i}", "answer": "a", "demonstration": "d"} for i in range(2)])
    assert len(JsonlTask(two).evaluation()) == 1
    assert len(build_task(TrainConfig(tmp_path / "o")).evaluation()) == 256


def test_a_file_that_cannot_serve_says_why(tmp_path, lines):
    with pytest.raises(ValueError, match="holds no problem"):
        JsonlTask(_jsonl(tmp_path / "empty.jsonl", []))
    for size in (0, 20):
        with pytest.raises(ValueError, match="expected 1 to 19 for the 20 problems"):
            JsonlTask(lines, eval_size=size)
    bare = _jsonl(tmp_path / "bare.jsonl", [{"prompt": f"p{i}", "answer": str(i)} for i in range(9)])
    with pytest.raises(ValueError, match="no line with a demonstration"):
        build_task(TrainConfig(tmp_path / "o", task=str(bare), eval_size=2))
    rollouts_only = {"warmup_sft_steps": 0, "demonstrations_per_step": 0, "controller": "fixed", "mu": 0.0}
    assert build_task(TrainConfig(tmp_path / "o", task=str(bare), eval_size=2, **rollouts_only)).demonstrations == 0


def test_lines_of_one_problem_stay_on_one_side(tmp_path):
    """Several solutions a problem, answers that differ, white space that differs: one problem each, 20 of them."""
    records = [
        {"prompt": f"{i}+1" + " =" * (way % 2) + "\n" * way, "answer": str(i + way // 2), "demonstration": f"way {way}"}
        for way in range(4)
        for i in range(10)
    ]
    path = _jsonl(tmp_path / "ways.jsonl", records)
    for seed in range(5):
        task = JsonlTask(path, eval_size=6, seed=seed)
        held = {e.problem for e in task.evaluation()}
        trained = {task.prompt(p).problem for p in range(40)} | {task.demonstration(p).problem for p in range(40)}
        assert len(task.evaluation()) == len(held) == 6 and len(trained) == 14 and not held & trained
        assert len(task.problems()) == 6 + 14 * 2  # every line of what is trained on
    assert JsonlTask(path, eval_size=6, seed=1).evaluation() == JsonlTask(path, eval_size=6, seed=1).evaluation()
    assert len(JsonlTask(path).evaluation()) == 4  # a fifth of the problems, not of the lines
    with pytest.raises(ValueError, match="expected 1 to 19 for the 20 problems"):
        JsonlTask(path, eval_size=20)


@pytest.mark.parametrize(("field", "value"), [("digits", 1), ("demonstrations", -1), ("eval_size", 10**6)])
def test_arithmetic_settings_out_of_range_are_named(field, value):
    with pytest.raises(ValueError, match=field):
        ArithmeticTask(**{field: value})
