"""verl's ``ppo_loss`` with one of our objectives, then our hybrid loss in its place: on a CPU, nothing fetched.

    pip install '.[train,verl]'
    VERL_USE_EXTERNAL_MODULES=gac_kernels.integrations.verl python examples/verl_losses.py

(The variable is for a package that runs from its sources: an installed one verl finds by its entry point.)

The task is to write a word backwards. What verl's engines do is done by hand here: a mini-batch in verl's layout, split
into micro-batches, each through a loss function ``(model_output, data) -> (loss, metrics)``. In a real run the settings
put the hybrid loss into verl's workers; see gac_kernels/integrations/verl.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.utils import tensordict_utils as tu
from verl.workers.config import ActorConfig
from verl.workers.utils.losses import ppo_loss

import gac_kernels as gk
from gac_kernels.integrations.verl import GACPolicyLossConfig, count_branches, hybrid_loss

LETTERS, LENGTH, EQUALS = 4, 3, 4  # token ids 0..3, and the sign between word and answer
GROUPS, COMPLETIONS, STEPS = 16, 4, 60


def tiny_policy() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    shape = Qwen2Config(
        vocab_size=LETTERS + 1, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=16, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen2ForCausalLM(shape)


def log_probs(model: Qwen2ForCausalLM, ids: Tensor) -> Tensor:
    """Of every next token, ``(S, L)``; the last place of a row predicts nothing that is read."""
    result = gk.token_logprobs(model(input_ids=ids).logits, ids.roll(-1, dims=1)).logprobs
    assert result is not None
    return result


@torch.no_grad()
def mini_batch(model: Qwen2ForCausalLM, demonstrations: bool) -> tuple[tu.TensorDict, float]:
    """Rollouts with their group-relative advantages, demonstrations below them; and the rollouts' mean reward."""
    words = torch.randint(0, LETTERS, (GROUPS, LENGTH))
    asked = torch.cat([words, torch.full((GROUPS, 1), EQUALS)], dim=1)
    prompts, answers = (x.repeat_interleave(COMPLETIONS, dim=0) for x in (asked, words.flip(1)))
    ids = prompts
    for _ in range(LENGTH):
        ids = torch.cat([ids, torch.multinomial(model(input_ids=ids).logits[:, -1].softmax(-1), 1)], dim=1)
    responses = ids[:, prompts.shape[1] :]
    rewards = (responses == answers).float().mean(1)
    advantages = gk.group_advantages(rewards, COMPLETIONS)
    expert = torch.zeros(len(ids), dtype=torch.bool)
    if demonstrations:
        prompts, responses = torch.cat([prompts, asked]), torch.cat([responses, words.flip(1)])
        advantages = torch.cat([advantages, torch.zeros(GROUPS)])
        expert = torch.cat([expert, torch.ones(GROUPS, dtype=torch.bool)])
    rows, order = len(prompts), torch.randperm(len(prompts))
    ids = torch.cat([prompts, responses], dim=1)
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": torch.ones_like(ids),
        "response_mask": torch.ones_like(responses),
        "advantages": advantages[:, None].expand(rows, LENGTH),
        "old_log_probs": log_probs(model, ids)[:, -LENGTH - 1 : -1],
        "expert_mask": expert,
    }
    data = tu.get_tensordict({name: value[order] for name, value in tensors.items()})
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=rows * LENGTH, global_batch_size=rows)
    return data, float(rewards.mean())


def train(loss_fn: Callable, controller: gk.GuidedAdaptiveController | None, demonstrations: bool) -> list[float]:
    """Mean reward of every step."""
    model, rewards = tiny_policy(), []
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(STEPS):
        data, reward = mini_batch(model, demonstrations)
        count_branches(data)
        for micro_batch in tu.chunk_tensordict(data, 2):
            ids = torch.cat([micro_batch["prompts"], micro_batch["responses"]], dim=1)
            loss, _ = loss_fn({"log_probs": log_probs(model, ids).flatten()}, micro_batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if controller is not None:
            controller.step()
        rewards.append(reward)
    return rewards


def main() -> None:
    """Train thrice, and print what became of the reward."""
    settings = GACPolicyLossConfig(loss_mode="gac_sapo", gate="erf")
    config = ActorConfig(
        strategy="fsdp", rollout_n=COMPLETIONS, ppo_micro_batch_size_per_gpu=8, loss_agg_mode="seq-mean-token-mean",
        policy_loss=settings,
    )  # fmt: skip
    controller = gk.GuidedAdaptiveController(gk.ControllerConfig(update_every=1, prior=gk.CosinePrior(20, 40)))
    runs = {
        "ppo_loss, gac_sapo": (partial(ppo_loss, config), None, False),
        "hybrid_loss, mu from GAC": (partial(hybrid_loss, config=config, controller=controller), controller, True),
    }
    for name, (loss_fn, steps_with, demonstrations) in runs.items():
        rewards = train(loss_fn, steps_with, demonstrations)
        tenths = [sum(rewards[i : i + 10]) / 10 for i in range(0, STEPS, 10)]
        print(f"{name:26}", "reward of 10 steps each:", " ".join(f"{value:.2f}" for value in tenths))
    print(f"mu now {float(controller.mu):.3f} after {controller.steps} steps")


if __name__ == "__main__":
    main()
