"""Every rule that sets mu, against its definition; state that continues exactly."""

from __future__ import annotations

import math

import pytest
import torch

import gac_kernels as gk
from gac_kernels.train.config import CONTROLLERS, TrainConfig
from gac_kernels.train.mixing import HPT, SRFT, KLDriven, Schedule, build_mixing


def make(controller, **settings):
    needs = {"kl": {"reference": True}}
    return build_mixing(TrainConfig("unused", controller=controller, **needs.get(controller, {}), **settings))


def batch_and_result(entropy=0.7, tokens=(3, 2), seed=0):
    """Two rollouts and two demonstrations of up to three tokens, demonstrations with the given token entropy."""
    generator = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(4, 3, generator=generator)
    mask = torch.tensor(
        [[1, 1, 1], [1, 1, 0], [1] * tokens[0] + [0] * (3 - tokens[0]), [1] * tokens[1] + [0] * (3 - tokens[1])]
    )
    batch = gk.TokenBatch.from_padded(
        torch.ones(4, 3, dtype=torch.long),
        mask,
        is_expert_S=torch.tensor([False, False, True, True]),
        advantages=torch.tensor([1.0, -1.0, 0.0, 0.0]),
    )
    entropies = torch.full((4, 3), 0.1)
    entropies[2:] = entropy
    return batch, gk.hybrid_loss(logprobs, batch, gk.HybridObjective(), 0.5, entropy=entropies)


def advance(mixing, steps, start=0):
    """The values of mu before each of ``steps`` steps, with a batch of its own and a KL each."""
    seen = []
    for step in range(start, start + steps):
        seen.append((mixing.mu.item(), mixing.scale.item()))
        mixing.route(torch.linspace(0, 1, 4) * ((step % 3) / 2))
        batch, result = batch_and_result(entropy=0.1 * step, seed=step)
        mixing.observe(result, batch)
        mixing.step(torch.tensor(0.005 * step))
    return seen


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_a_rule_continued_from_its_state_goes_on_bit_for_bit(controller):
    whole = advance(make(controller, steps=40), 20)
    first = make(controller, steps=40)
    advance(first, 9)
    saved = first.state_dict()
    second = make(controller, steps=40)
    second.load_state_dict(saved)
    assert advance(second, 11, start=9) == whole[9:]


@pytest.mark.parametrize("controller", CONTROLLERS)
def test_mu_is_a_tensor_for_the_losses_and_stays_in_its_range(controller):
    mixing = make(controller, steps=30)
    for mu, scale in advance(mixing, 30):
        assert 0.0 <= mu <= 1.0 and 1.0 <= scale <= 1.5
    assert mixing.mu.shape == mixing.scale.shape == ()
    assert all(value.shape == () for value in mixing.metrics().values())


def test_schedules_follow_their_closed_forms():
    cosine, linear = Schedule("cosine", 200), Schedule("linear", 200)
    assert [cosine.at(0), linear.at(0)] == [0.9, 0.9]
    assert cosine.at(50) == pytest.approx(0.05 + 0.85 * (1 + math.cos(math.pi / 4)) / 2)
    assert linear.at(50) == pytest.approx(0.9 - 0.85 / 4)
    for schedule in (cosine, linear):
        assert schedule.at(100) == pytest.approx(0.475)
        assert schedule.at(200) == schedule.at(500) == pytest.approx(0.05)
        values = [mu for mu, _ in advance(schedule, 3)]
        assert values == pytest.approx([schedule.at(step) for step in range(3)], rel=1e-6)


def test_fixed_never_moves():
    assert {mu for mu, _ in advance(make("fixed", mu=0.25), 5)} == {0.25}


def test_the_kl_rule_rises_above_its_target_falls_below_and_ignores_what_is_not_finite():
    rule = KLDriven()
    for kl, expected in (
        (0.02, 0.5),
        (0.03, 0.5 * math.exp(0.05)),
        (1.0, 0.5 * math.exp(0.15)),
        (0.0, 0.5 * math.exp(0.05)),
    ):
        rule.step(torch.tensor(kl))
        assert rule.mu.item() == pytest.approx(expected, rel=1e-6)
    before = rule.mu.item()
    for kl in (math.nan, math.inf):
        rule.step(torch.tensor(kl))
    assert rule.mu.item() == pytest.approx(
        before * math.exp(0.1), rel=1e-6
    )  # inf is above any target, nan says nothing
    for _ in range(50):
        rule.step(torch.tensor(1.0))
    assert rule.mu.item() == pytest.approx(0.9)
    with pytest.raises(ValueError, match="kl must be given"):
        rule.step(None)


def test_srft_weighs_demonstrations_by_their_entropy_beside_a_full_rl_loss():
    rule = SRFT()
    assert (rule.scale * rule.mu).item() == pytest.approx(0.5)
    for entropy in (0.7, 2.0):
        # Two micro-batches of unequal size: the mean is over tokens.
        for factor, tokens in ((1.0, (3, 2)), (0.5, (1, 0))):
            batch, result = batch_and_result(entropy=entropy * factor, tokens=tokens)
            rule.observe(result, batch)
        rule.step()
        mean = entropy * (5 * 1.0 + 1 * 0.5) / 6
        assert (rule.scale * rule.mu).item() == pytest.approx(0.5 * math.exp(-mean), rel=1e-6)
        assert (rule.scale * (1 - rule.mu)).item() == pytest.approx(1.0, rel=1e-6)


def test_hpt_switches_prompts_at_gamma_and_weighs_each_prompt_alike():
    rule = HPT(gamma=0.25)
    keep = rule.route(torch.tensor([0.0, 0.25, 0.5, 1.0, 0.1]))
    assert keep.tolist() == [False, False, True, True, False]
    assert rule.mu.item() == pytest.approx(3 / 5)
    assert make("gac").route(torch.zeros(3)) is None


def test_gac_takes_the_papers_settings_at_a_thousand_steps_and_scales_their_clock_below():
    paper = TrainConfig("unused", steps=1000).resolved_controller()
    assert paper == gk.ControllerConfig()
    assert TrainConfig("unused", steps=5000).resolved_controller() == paper
    short = TrainConfig("unused", steps=100).resolved_controller()
    assert (short.prior.warmup, short.prior.decay) == (20, 80)
    assert short.update_every == 1 and short.change_cap == pytest.approx(0.1)
    assert short.ema_beta**100 == pytest.approx(paper.ema_beta**1000)
    for step in (0, 10, 20, 60, 100):
        assert short.prior.value(step) == pytest.approx(paper.prior.value(10 * step))
    own = gk.ControllerConfig(blend=0.9)
    assert TrainConfig("unused", steps=100, controller_config=own).resolved_controller() is own
