"""The same numbers from logits as the code people run today: TRL's, verl's and Liger's functions of logits.

In float64 (Liger: float32), so that agreement to 1e-6 is agreement on the formula. The loss of the log-probs is theirs
where it is a function (Liger, verl); TRL's is inside its trainer and copied here. ``test_peers.py`` compares more
objectives.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from logit_support import LogitCase, make
from triton_support import DEVICE, convert

import gac_kernels as gk

OBJECTIVE = gk.HybridObjective(gk.SAPO(), gk.NLL("phi"))
ROLLOUTS = (False,) * 4
LENGTHS = (5, 12, 9, 7)  # no sequence ends up fully masked: the peers count those, we do not


def case(**options) -> LogitCase:
    """Rollouts of float64 logits with holes in their mask; what is masked holds ordinary numbers, peers multiply."""
    options = {"dtype": torch.float64, "V": 101, "seed": 31, "kl": False, "rollout": False, "poison": False} | options
    return make(LENGTHS, ROLLOUTS, **options)


def ours(case: LogitCase, objective=OBJECTIVE, **options):
    leaf = case.logits.clone().requires_grad_()
    out = gk.hybrid_loss_from_logits(leaf, case.batch, objective, 0.0, **options)
    out.loss.backward()
    return out, leaf.grad


def agree(got, want):
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)


def trl_sapo(logprobs, batch):
    """`GRPOTrainer._compute_loss` for `loss_type="sapo"`."""
    advantages = batch.advantages[:, None]
    coef = torch.exp(logprobs - batch.old_logprobs)
    temperatures = torch.where(advantages > 0, 1.0, 1.05)
    per_token = -torch.sigmoid(temperatures * (coef - 1)) * 4 / temperatures * advantages
    return ((per_token * batch.mask).sum(-1) / batch.mask.sum(-1).clamp(min=1.0)).mean()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_trl(backend, temperature):
    utils = pytest.importorskip("trl.trainer.utils")
    mine = case(transform=gk.LogitTransform(temperature))
    batch = mine.batch
    leaf = mine.logits.clone().requires_grad_()
    logprobs, entropy = utils.selective_log_softmax_and_entropy(
        leaf, batch.targets, entropy_requires_grad=False, temperature=temperature, row_mask=batch.mask
    )
    loss = trl_sapo(logprobs, batch)
    loss.backward()
    out, gradient = ours(mine, transform=gk.LogitTransform(temperature))
    agree(out.loss, loss)
    agree(gradient, leaf.grad)
    agree(out.logprobs, logprobs.detach())
    agree(out.token_entropy, entropy)


def test_verl(backend):
    functional = pytest.importorskip("verl.utils.torch_functional")
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    mine = case()
    batch = mine.batch
    leaf = mine.logits.clone().requires_grad_()
    logprobs, entropy = functional.logprobs_from_logits(leaf, batch.targets), functional.entropy_from_logits(leaf)
    config = algos.ActorConfig.__new__(algos.ActorConfig)
    for key, value in {"tau_pos": 1.0, "tau_neg": 1.05, "global_batch_info": {}}.items():
        object.__setattr__(config, key, value)
    loss, _ = algos.get_policy_loss_fn("sapo")(
        old_log_prob=batch.old_logprobs, log_prob=logprobs, advantages=batch.advantages[:, None].expand_as(logprobs),
        response_mask=batch.mask.double(), loss_agg_mode="seq-mean-token-mean", config=config,
    )  # fmt: skip
    loss.backward()
    out, gradient = ours(mine)
    agree(out.loss, loss)
    agree(gradient, leaf.grad)
    agree(out.logprobs, logprobs.detach() * batch.mask)
    agree(out.token_entropy, entropy.detach() * batch.mask)


def test_verl_token_logprobs_carry_the_same_gradient(backend):
    """An entropy bonus by verl's functions and by ours."""
    functional = pytest.importorskip("verl.utils.torch_functional")
    mine = case()
    weights = torch.randn(2, *mine.batch.targets.shape, generator=torch.Generator().manual_seed(3)) * mine.batch.mask
    gradients = []
    for by_us in (True, False):
        leaf = mine.logits.clone().requires_grad_()
        if by_us:
            out = gk.token_logprobs(leaf, mine.batch.targets)
            logprobs, entropy = out.logprobs, out.entropy
        else:
            logprobs = functional.logprobs_from_logits(leaf, mine.batch.targets)
            entropy = functional.entropy_from_logits(leaf)
        (logprobs * weights[0] + entropy * weights[1]).sum().backward()
        gradients.append(leaf.grad)
    agree(*gradients)


LIGER = {
    "SAPO": (OBJECTIVE, {"loss_type": "sapo"}),
    "GRPO": (gk.HybridObjective(gk.GRPO(0.2, 0.28)), {"loss_type": "grpo", "eps_low": 0.2, "eps_high": 0.28}),
    "GRPO two-sided": (
        gk.HybridObjective(gk.GRPO(delta=1.3)),
        {"loss_type": "grpo", "eps_low": 0.2, "eps_high": 0.2, "delta": 1.3},
    ),
    "DAPO": (
        gk.HybridObjective(gk.GRPO(), aggregation="token-mean"),
        {"loss_type": "dapo", "eps_low": 0.2, "eps_high": 0.2},
    ),
    "CISPO": (gk.HybridObjective(gk.CISPO(1.2), aggregation="token-mean"), {"loss_type": "cispo", "eps_high": 1.2}),
    "GSPO": (
        gk.HybridObjective(gk.GSPO(0.05, 0.05)),
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "eps_low": 0.05, "eps_high": 0.05},
    ),
}


@pytest.mark.parametrize("kl_coef", [0.0, 0.04])
@pytest.mark.parametrize("name", LIGER)
def test_liger(name, kl_coef):
    """In float32, which its kernels compute in, on a GPU or in Triton's interpreter. It takes T + 1 rows a sequence and
    leaves the last one out."""
    module = pytest.importorskip("liger_kernel.transformers.grpo_loss")
    objective, options = LIGER[name]
    objective = dataclasses.replace(objective, kl_coef=kl_coef)
    mine = case(dtype=torch.float32, kl=True, V=3000)
    mine = LogitCase(mine.logits.to(DEVICE), convert(mine.batch, None, DEVICE))
    batch = mine.batch
    longer = torch.nn.functional.pad(mine.logits, (0, 0, 0, 1)).contiguous().requires_grad_()
    loss, _ = module.triton_grpo_loss(
        longer, batch.old_logprobs, batch.ref_logprobs, batch.targets, batch.advantages, batch.mask.int(),
        temperature=1.0, beta=kl_coef, inplace=False, reduce=True, **options,
    )  # fmt: skip
    loss.backward()
    out, gradient = ours(mine, objective)
    torch.testing.assert_close(out.loss, loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gradient, longer.grad[:, :-1], rtol=2e-5, atol=1e-8)
