"""verl's actor settings and one micro-batch of its data, made of a few numbers."""

from __future__ import annotations

import torch
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig, PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

ROWS, PROMPT, LENGTH = 6, 4, 9
GLOBAL = {"dp_size": 4, "batch_num_tokens": 517, "global_batch_size": 96}
LOCAL = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None}
SETTINGS = (
    "loss_mode",
    "gate",
    "transform",
    "ratio",
    "group_size",
    "mu",
    "controller",
    "supervised",
    "expert_key",
    "hybrid",
)


def actor(loss_mode, *, ours=False, **settings):
    """An ActorConfig; what GACPolicyLossConfig has beyond verl's goes there, and asks for it."""
    from gac_kernels.integrations.verl import GACPolicyLossConfig

    extra = {name: settings.pop(name) for name in (*SETTINGS, "supervised_aggregation") if name in settings}
    kind = GACPolicyLossConfig if extra or ours else PolicyLossConfig
    arguments = {"strategy": "fsdp", "rollout_n": 2, "ppo_micro_batch_size_per_gpu": ROWS, "clip_ratio_high": 0.3}
    return ActorConfig(policy_loss=kind(loss_mode=loss_mode, **extra), **{**arguments, **settings})


def micro_batch(seed=0, *, rollout=False, reference=False, expert=(), info=LOCAL, spread=0.4, dtype=torch.float64):
    """``log_probs`` and ``entropy`` of all tokens (leaves), and verl's data: prompts to the left, responses to the
    right, a tool's answer inside one response, one response that no token of counts."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=g, dtype=dtype)

    prompts = torch.randint(1, PROMPT + 1, (ROWS,), generator=g)
    responses = torch.randint(2, LENGTH + 1, (ROWS,), generator=g)
    places = torch.arange(LENGTH)
    live = places < responses[:, None]
    attention = torch.cat([torch.arange(PROMPT) >= PROMPT - prompts[:, None], live], dim=1).long()
    mask = live.clone()
    mask[1, 1] = False
    mask[2] = False
    tensors = {
        "prompts": torch.randint(0, 9, (ROWS, PROMPT), generator=g),
        "responses": torch.randint(0, 9, (ROWS, LENGTH), generator=g),
        "attention_mask": attention,
        "response_mask": mask.long(),
        "advantages": normal(ROWS, 1).expand(ROWS, LENGTH) * mask,
    }
    logp = -normal(int(attention.sum())).abs()
    entropy = normal(int(attention.sum())).abs()
    padded = padded_responses(logp, attention)
    tensors["old_log_probs"] = padded + spread * normal(ROWS, LENGTH)
    if rollout:
        tensors["rollout_is_weights"] = normal(ROWS, LENGTH).abs()
    if reference:
        tensors["ref_log_prob"] = padded + 0.3 * normal(ROWS, LENGTH)
    if expert:
        tensors["expert_mask"] = torch.tensor([row in expert for row in range(ROWS)])
    data = tu.get_tensordict(tensors, non_tensor_dict=info)
    return logp.requires_grad_(), entropy.requires_grad_(), data


def padded_responses(values, attention):
    """What verl's no_padding_2_padding takes out of values of all tokens: ``(ROWS, LENGTH)``, one place earlier."""
    out, start = values.new_zeros(ROWS, LENGTH), 0
    for row, live in enumerate(attention):
        prompt, response = int(live[:PROMPT].sum()), int(live[PROMPT:].sum())
        first = start + prompt - 1
        out[row, :response] = values[first : first + response]
        start += prompt + response
    return out


def through_ppo_loss(config, *, with_entropy=False, **batch):
    """Loss, gradients and metrics as verl's own ``ppo_loss`` gives them with the loss that ``config`` names."""
    logp, entropy, data = micro_batch(**batch)
    loss, metrics = ppo_loss(config, {"log_probs": logp, **({"entropy": entropy} if with_entropy else {})}, data)
    loss.backward()
    return loss.detach(), logp.grad, metrics


def values(metrics):
    return {name: value.aggregate() if hasattr(value, "aggregate") else value for name, value in metrics.items()}
