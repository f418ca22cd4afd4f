"""The demo on a toy budget: both arms start from one model, take the same steps, and the summary says what happened."""

from __future__ import annotations

import pytest
import torch

from gac_kernels.train import demo


def test_both_arms_start_from_one_model_with_the_same_budget(tmp_path):
    warm = demo.warm_config(tmp_path, 3)
    (warm.output / "model").mkdir(parents=True)
    sft, gac = demo.arm_configs(warm).values()
    assert sft.model == gac.model == str(warm.output / "model")
    assert sft.total_steps == gac.total_steps and sft.learning_rate == gac.learning_rate
    assert (sft.controller, sft.mu, sft.prompts_per_step) == ("fixed", 1.0, 0)
    alike = ("seed", "digits", "demonstration_pool", "eval_size", "lr_warmup", "lr_final", "clip_norm")
    assert all(getattr(sft, name) == getattr(gac, name) == getattr(warm, name) for name in alike)


def test_the_demo_runs_and_prints_what_it_returns(tmp_path, capsys):
    threads = torch.get_num_threads()
    outcome = demo.run_demo(tmp_path, seed=1, smoke=True, progress=False)
    assert torch.get_num_threads() == threads
    assert len(outcome["mu"]) == 6 and all(0.05 <= mu <= 0.9 for mu in outcome["mu"])
    assert 0 < outcome["controller_share"] < 1 and outcome["clearly_better"] is False
    printed = capsys.readouterr().out
    assert f"{outcome['accuracy_sft']:.1%}" in printed and "GAC is not clearly ahead of SFT alone" in printed
    assert "too short to learn anything" in printed
    page = (tmp_path / "report.html").read_text()
    assert "SFT alone" in page and "GAC" in page
    with pytest.raises(ValueError, match="holds a run already"):
        demo.run_demo(tmp_path, smoke=True, progress=False)


def test_ahead_is_said_only_beyond_two_standard_errors():
    log = [{"step": s, "mu": 0.5, "controller_seconds": 0.01, "step_seconds": 1.0} for s in (1, 2)]

    def outcome(sft, gac):
        return demo._outcome(0.5, sft, gac, 500, log)

    assert outcome(0.50, 0.56)["clearly_better"] is False  # 500 problems: two standard errors are 6.3 points
    assert outcome(0.50, 0.57)["clearly_better"] is True
    assert outcome(0.57, 0.50)["clearly_better"] is False
    assert outcome(0.50, 0.50)["standard_error"] == pytest.approx((0.5 / 500) ** 0.5)
    assert outcome(0.50, 0.50)["controller_share"] == pytest.approx(0.01)


def test_the_sparkline_spans_the_range():
    assert demo.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert demo.sparkline([0.0] * 100 + [1.0] * 100, width=4) == "▁▁██"


def test_the_command_leaves_an_earlier_demo_alone(tmp_path):
    assert demo._free(tmp_path / "demo") == tmp_path / "demo"
    for name in ("demo", "demo-2"):
        (tmp_path / name).mkdir()
    assert demo._free(tmp_path / "demo") == tmp_path / "demo-3"
