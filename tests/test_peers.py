"""The same numbers as the code people run today: Liger's token-level loss and verl's policy losses, where installed.

The peers run in float64 on ready log-probs, so that agreement to 1e-6 is agreement on the formula.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support import Case

import gac_kernels as gk

LENGTHS = (5, 12, 16, 4, 9, 7)  # no sequence ends up fully masked: Liger counts those, verl and we do not


@dataclasses.dataclass(frozen=True)
class Peer:
    """One objective here, and how to ask the others for it; `verl` is (loss name, aggregation, config)."""

    objective: gk.HybridObjective
    liger: dict
    verl: tuple[str, str, dict]


def hybrid(policy, aggregation="seq-mean-token-mean", **keywords):
    return gk.HybridObjective(policy, aggregation=aggregation, **keywords)


NORM = "seq-mean-token-sum-norm"
PEERS = {
    "SAPO": Peer(
        hybrid(gk.SAPO()),
        {"loss_type": "sapo"},
        ("sapo", "seq-mean-token-mean", {"tau_pos": 1.0, "tau_neg": 1.05}),
    ),
    "SAPO sharp": Peer(
        hybrid(gk.SAPO("sigmoid", 10.0, 12.0)),
        {"loss_type": "sapo", "sapo_temperature_pos": 10.0, "sapo_temperature_neg": 12.0},
        ("sapo", "seq-mean-token-mean", {"tau_pos": 10.0, "tau_neg": 12.0}),
    ),
    "GRPO": Peer(
        hybrid(gk.GRPO()),
        {"loss_type": "grpo"},
        ("vanilla", "seq-mean-token-mean", {"clip_ratio": 0.2, "clip_ratio_c": 1e9}),
    ),
    "GRPO two-sided": Peer(
        hybrid(gk.GRPO(delta=1.3)),
        {"loss_type": "grpo", "delta": 1.3},
        ("vanilla", "seq-mean-token-mean", {"clip_ratio": 0.2, "clip_ratio_c": 1.3}),
    ),
    "DAPO": Peer(
        hybrid(gk.GRPO(0.2, 0.28), "token-mean"),
        {"loss_type": "dapo", "epsilon_high": 0.28},
        ("vanilla", "token-mean", {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1e9}),
    ),
    "Dr. GRPO": Peer(
        hybrid(gk.GRPO(), NORM, norm_length=64.0),
        {"loss_type": "dr_grpo", "max_completion_length": 64},
        ("vanilla", NORM, {"clip_ratio": 0.2, "clip_ratio_c": 1e9, "global_batch_info": {"loss_scale_factor": 64}}),
    ),
    "CISPO": Peer(
        hybrid(gk.CISPO(1.2), "token-mean"),
        {"loss_type": "cispo", "epsilon_high": 1.2},
        ("cispo", "token-mean", {"clip_ratio_low": 1.0, "clip_ratio_high": 0.2}),
    ),
    "GSPO": Peer(
        hybrid(gk.GSPO(0.05, 0.05)),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.05},
        ("gspo", "seq-mean-token-mean", {"clip_ratio": 0.05}),
    ),
}


def ours(case: Case, objective: gk.HybridObjective):
    batch, extra = case.padded()
    leaf = extra["logprobs"].clone().requires_grad_()
    loss = gk.hybrid_loss(leaf, batch, objective, 0.0).loss
    loss.backward()
    return loss.detach(), leaf.grad


def check(case: Case, objective: gk.HybridObjective, peer_loss, leaf):
    peer_loss.backward()
    loss, grad = ours(case, objective)
    torch.testing.assert_close(loss, peer_loss.detach(), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(grad, leaf.grad * case.mask, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("name", PEERS)
def test_liger(backend, name, kl_coef):
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    peer = PEERS[name]
    case = Case(LENGTHS, (False,) * 6, seed=21, poison=False, spread=0.4)
    leaf = case.logp.clone().requires_grad_()
    mask = case.mask.double()
    loss, _ = module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf, mask, case.adv, mask, ref_per_token_logps=case.ref, old_per_token_logps=case.old,
        vllm_is_ratio=case.rollout, beta=kl_coef, **peer.liger,
    )  # fmt: skip
    check(case, dataclasses.replace(peer.objective, kl_coef=kl_coef), loss, leaf)


def test_liger_ratio_weighted_kl(backend):
    module = pytest.importorskip("liger_kernel.chunked_loss.grpo_loss")
    case = Case(LENGTHS, (False,) * 6, seed=22, poison=False, spread=0.4)
    leaf = case.logp.clone().requires_grad_()
    mask = case.mask.double()
    loss, _ = module.LigerFusedLinearGRPOFunction.ppo_loss_fn(
        leaf, mask, case.adv, mask, ref_per_token_logps=case.ref, old_per_token_logps=case.old,
        vllm_is_ratio=case.rollout, beta=0.1, loss_type="grpo", use_bias_correction_kl=True,
    )  # fmt: skip
    check(case, hybrid(gk.GRPO(), kl_coef=0.1, kl_ratio_weighted=True), loss, leaf)


@pytest.mark.parametrize("name", PEERS)
def test_verl(backend, name):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    loss_name, aggregation, settings = PEERS[name].verl
    config = algos.ActorConfig.__new__(algos.ActorConfig)
    defaults = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "global_batch_info": {}}
    for key, value in (defaults | settings).items():
        object.__setattr__(config, key, value)
    # verl's GSPO is the token variant: it equals the paper's only where the weights inside a sequence are equal.
    case = Case(LENGTHS, (False,) * 6, seed=23, poison=False, spread=0.4, rollout=name != "GSPO")
    leaf = case.logp.clone().requires_grad_()
    loss, _ = algos.get_policy_loss_fn(loss_name)(
        old_log_prob=case.old, log_prob=leaf, advantages=case.adv[:, None].expand_as(leaf),
        response_mask=case.mask.double(), loss_agg_mode=aggregation, config=config, rollout_is_weights=case.rollout,
    )  # fmt: skip
    check(case, PEERS[name].objective, loss, leaf)
