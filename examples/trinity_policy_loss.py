"""Trinity-RFT's own policy loss callable with ours inside: on a CPU, nothing fetched, no trainer started.

    pip install '.[trinity]'
    python examples/trinity_policy_loss.py

What a run's configuration file needs:

    algorithm:
      algorithm_type: mix_chord
      sample_strategy_args: {expert_data_ratio: 0.25, sft_dataset_name: sft_dataset}
      policy_loss_fn: gac_kernels.integrations.trinity.GACPolicyLossFn
      policy_loss_fn_args:
        objective: sapo
        objective_args: {gate: erf, tau_pos: 1.0, tau_neg: 1.05}
        controller: {update_every: 10}
        ppo_mini_batch_size: 32
        ppo_micro_batch_size_per_gpu: 8
        train_batch_size_usual: 24
        train_batch_size_expert: 8
      entropy_loss_fn: mix
      entropy_loss_fn_args: {entropy_coef: 0.0}

Here a softmax policy over eight tokens learns from rollouts, whose reward is the share of token 3, and demonstrations,
which hold nothing but it. The batch is laid out as Trinity's trainer hands it to its loss.
"""

from __future__ import annotations

import torch
from omegaconf import OmegaConf
from trinity.trainer.verl.losses import build_trinity_loss
from verl.utils import tensordict_utils as tu

import gac_kernels as gk

VOCABULARY, LENGTH, WANTED, ROLLOUTS, DEMONSTRATIONS, MICRO, STEPS = 8, 6, 3, 24, 8, 8, 40
CONFIG = OmegaConf.create(
    {
        "policy_loss_fn": "gac_kernels.integrations.trinity.GACPolicyLossFn",
        "policy_loss_fn_args": {
            "objective": "sapo",
            "objective_args": {"gate": "erf", "tau_pos": 1.0, "tau_neg": 1.05},
            "controller": {"update_every": 1, "prior": {"warmup": 10, "decay": 30}},
            "ppo_mini_batch_size": ROLLOUTS + DEMONSTRATIONS,
            "ppo_micro_batch_size_per_gpu": MICRO,
            "train_batch_size_usual": ROLLOUTS,
            "train_batch_size_expert": DEMONSTRATIONS,
        },
        "loss_agg_mode": "token-mean",
        "kl_loss_fn": "none",
        "kl_loss_fn_args": {},
        "entropy_loss_fn": "none",
        "entropy_loss_fn_args": {"entropy_coef": 0.0},
    }
)


@torch.no_grad()
def step_batch(logits: torch.Tensor, step: int) -> tuple[tu.TensorDict, float]:
    """The rows of a training step, in an order that mixes the branches, and the rollouts' mean reward."""
    responses = torch.multinomial(logits.softmax(-1), ROLLOUTS * LENGTH, replacement=True).view(ROLLOUTS, LENGTH)
    rewards = (responses == WANTED).float().mean(1)
    responses = torch.cat([responses, torch.full((DEMONSTRATIONS, LENGTH), WANTED)])
    rows, order = len(responses), torch.randperm(len(responses))
    advantages = torch.cat([gk.group_advantages(rewards, ROLLOUTS), torch.zeros(DEMONSTRATIONS)])
    tensors = {
        "prompts": torch.zeros(rows, 1, dtype=torch.long),
        "responses": responses,
        "attention_mask": torch.ones(rows, 1 + LENGTH, dtype=torch.long),
        "response_mask": torch.ones(rows, LENGTH, dtype=torch.long),
        "old_log_probs": logits.log_softmax(-1)[responses],
        "advantages": advantages[:, None].expand(rows, LENGTH),
        "expert_mask": torch.arange(rows) >= ROLLOUTS,
        "step": torch.full((rows,), step, dtype=torch.int32),
    }
    return tu.get_tensordict({name: value[order] for name, value in tensors.items()}), float(rewards.mean())


def main() -> None:
    """Train, and print reward and mu every eighth step."""
    torch.manual_seed(0)
    logits = torch.zeros(VOCABULARY, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=0.1)
    loss_fn = build_trinity_loss(CONFIG)
    for step in range(STEPS):
        data, reward = step_batch(logits, step)
        for micro_batch in tu.chunk_tensordict(data, len(data) // MICRO):
            # One log-prob a token, each standing where its predecessor is read; the last place is not read.
            placed = torch.nn.functional.pad(logits.log_softmax(-1)[micro_batch["responses"]], (0, 1))
            loss, metrics = loss_fn({"log_probs": placed.flatten()}, micro_batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 8 == 7:
            print(f"step {step + 1:3d}   reward {reward:.3f}   mu {metrics['actor/mu']:.3f}")


if __name__ == "__main__":
    main()
