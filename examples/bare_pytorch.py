"""The hybrid loss and its controller in a bare PyTorch loop: torch and this package, a CPU, half a minute.

    pip install .
    python examples/bare_pytorch.py

The task is to write a word backwards. Every second prompt has a demonstration; four rollouts a prompt are rewarded by
the share of right letters. What any loop needs is the six lines that are numbered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import gac_kernels as gk

LETTERS, LENGTH, WIDTH = 6, 3, 64  # tokens 0 to 5 are letters, 6 asks for the answer
PROMPTS, GROUP = 32, 4  # a step: so many prompts, so many rollouts of each


class TinyModel(nn.Module):
    """Two causal layers; ``forward`` ends at the hidden states, so that no logits of all tokens are ever made."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(LETTERS + 1, WIDTH)
        self.places = nn.Embedding(2 * LENGTH + 1, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, LETTERS + 1, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """``(S, T)`` ids to ``(S, T, WIDTH)`` hidden states."""
        T = ids.shape[1]
        causal = nn.Transformer.generate_square_subsequent_mask(T)
        return self.layers(self.tokens(ids) + self.places.weight[:T], mask=causal, is_causal=True)


@torch.no_grad()
def rollouts(model: TinyModel, prompts: Tensor) -> Tensor:
    """``(S, LENGTH)`` sampled completions."""
    ids = prompts
    for _ in range(LENGTH):
        probabilities = model.head(model(ids)[:, -1]).softmax(-1)
        ids = torch.cat([ids, torch.multinomial(probabilities, 1)], dim=1)
    return ids[:, prompts.shape[1] :]


def main(steps: int = 150) -> list[float]:
    """Train; the mean reward of every step."""
    torch.manual_seed(0)
    model = TinyModel()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    objective = gk.HybridObjective(gk.SAPO(), gk.NLL("phi"))
    controller = gk.GuidedAdaptiveController()  # 1
    rewards = []
    for step in range(steps):
        words = torch.randint(LETTERS, (PROMPTS, LENGTH))
        prompts, answers = torch.cat([words, torch.full((PROMPTS, 1), LETTERS)], dim=1), words.flip(1)
        asked = prompts.repeat_interleave(GROUP, dim=0)
        written = rollouts(model, asked)
        reward = (written == answers.repeat_interleave(GROUP, dim=0)).float().mean(1)

        # Rollouts and, below them, the demonstrations of every second prompt: one pass serves both.
        targets = torch.cat([written, answers[::2]])
        is_expert = torch.arange(len(targets)) >= len(written)
        advantages = torch.cat([gk.group_advantages(reward, GROUP), torch.zeros(len(targets) - len(written))])
        batch = gk.TokenBatch.from_padded(  # 2
            targets, torch.ones_like(targets), is_expert_S=is_expert, advantages=advantages
        )
        ids = torch.cat([torch.cat([asked, prompts[::2]]), targets], dim=1)
        hidden = model(ids)[:, LENGTH:-1]  # from the place that predicts the first token of the answer on
        out = gk.hybrid_loss_from_hidden(hidden, model.head.weight, batch, objective, controller.mu)  # 3
        optimizer.zero_grad()
        out.loss.backward()  # 4
        optimizer.step()
        controller.observe(out.signals)  # 5
        controller.step()  # 6

        rewards.append(float(reward.mean()))
        if step % 25 == 0 or step == steps - 1:
            print(
                f"step {step:4d}   reward {rewards[-1]:.3f}   mu {float(controller.mu):.3f}   "
                f"supervised loss {float(out.supervised_loss):.3f}"
            )
    return rewards


if __name__ == "__main__":
    main()
