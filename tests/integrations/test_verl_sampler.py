"""What verl's sampler corrections and log-probs may hold: at demonstrations anything, at rollouts numbers."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed (extra [verl])")

from verl_support import actor, micro_batch, padded_responses, values

from gac_kernels.integrations import verl as integration


def test_the_samplers_weights_are_not_the_demonstrations():
    """verl makes them of every row's log-probs; nan there, where no sampler was, changes nothing either."""
    config = actor("gac_sapo", mu=0.5, loss_agg_mode="token-mean")
    seen = []
    for spoil in (1.0, 0.0, float("nan")):
        logp, _, data = micro_batch(rollout=True, expert=(0, 4))
        data["rollout_is_weights"][[0, 4]] = spoil
        loss, metrics = integration.hybrid_loss({"log_probs": logp}, data, config=config)
        loss.backward()
        seen.append((loss.detach(), logp.grad, values(metrics)["gac/supervised_loss"]))
    assert seen[0][2] > 0.0
    for loss, gradient, supervised in seen[1:]:
        assert torch.equal(loss, seen[0][0]) and torch.equal(gradient, seen[0][1]) and supervised == seen[0][2]


@pytest.mark.parametrize("name", ["rollout_is_weights", "old_log_probs"])
@pytest.mark.parametrize("hybrid", [False, True])
def test_what_a_sampler_could_not_score_is_named(hybrid, name):
    """At a token that counts, in the registered losses and in the hybrid one; elsewhere it changes nothing."""
    config = actor("gac_sapo", **({"mu": 0.5} if hybrid else {"ours": True}))

    def loss(spoil):
        batch = {"rollout": True, "expert": (0, 4)} if hybrid else {"rollout": True}
        logp, _, data = micro_batch(**batch)
        spoil(data)
        if hybrid:
            return integration.hybrid_loss({"log_probs": logp}, data, config=config)[0].detach()
        rows = [data["old_log_probs"], padded_responses(logp.detach(), data["attention_mask"])]
        return integration.policy_loss(
            "gac_sapo", *rows, data["advantages"], data["response_mask"], config=config,
            rollout_is_weights=data["rollout_is_weights"],
        )[0]  # fmt: skip

    def masked(data):
        data[name][data["response_mask"] == 0] = float("nan")

    assert torch.equal(loss(masked), loss(lambda data: None))
    with pytest.raises(ValueError, match={"old_log_probs": "old_logprobs"}.get(name, "rollout_weights")):
        loss(lambda data: data[name][3].fill_(float("nan")))
