"""Where a step's rows come from: positions in the task's streams, rollouts of the policy, demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .config import TrainConfig
from .mixing import Mixing
from .rollouts import Answered, Codec, RolloutBatch, Sampling, assemble, generate
from .tasks import Example, Task


@dataclass(frozen=True)
class Collected:
    """Rows to train on, and what the rollouts looked like."""

    batch: RolloutBatch
    metrics: dict[str, float]


class Collector:
    """Draws prompts and demonstrations by position and turns them into batches.

    Two integers are its whole state. Every rank takes its own share of the positions and moves on by the same amount,
    so ranks never draw the same position and need not talk to each other.
    """

    def __init__(self, config: TrainConfig, task: Task, codec: Codec, *, rank: int = 0, world_size: int = 1) -> None:
        self.config, self.task, self.codec = config, task, codec
        self.rank, self.world_size = rank, world_size
        self.positions = {"prompt": 0, "demonstration": 0}
        self._check_lengths()

    def warm_start(self) -> Collected:
        """A batch of demonstrations alone."""
        demonstrations = self._demonstrations(self.config.warmup_sft_batch)
        return Collected(self._assemble([], list(enumerate(demonstrations))), {})

    def rollouts(self, model: PreTrainedModel, mixing: Mixing) -> Collected:
        """A batch of sampled completions with their advantages, and the demonstrations that go with them."""
        config = self.config
        examples = [self.task.prompt(position) for position in self._take("prompt", config.prompts_per_step)]
        answered = self._answer(model, examples)
        rewards = torch.tensor([row.reward for row in answered])
        keep = mixing.route(rewards.view(-1, config.group_size).mean(dim=1)) if answered else None
        if keep is None:
            demonstrations = list(enumerate(self._demonstrations(config.demonstrations_per_step)))
        else:
            demonstrations = self._stand_ins(examples, keep)
        kept = answered if keep is None else [row for row in answered if keep[row.group]]
        return Collected(self._assemble(kept, demonstrations), self._metrics(answered, rewards))

    def accuracy(self, model: PreTrainedModel) -> float:
        """Share of the held-out problems that greedy completions answer rightly. Draws no random number."""
        examples, right = self.task.evaluation(), 0.0
        sampling = Sampling(self.config.max_new_tokens, None)
        for start in range(0, len(examples), self.config.eval_batch):
            part = examples[start : start + self.config.eval_batch]
            completions = generate(model, self.codec, [self.codec.prompt(e.prompt) for e in part], sampling)
            right += sum(self.task.reward(e, self.codec.text(c)) for e, c in zip(part, completions, strict=True))
        return right / len(examples)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.positions)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.positions = {name: state[name] for name in self.positions}

    def _take(self, stream: str, count: int) -> list[int]:
        first = self.positions[stream] + self.rank * count
        self.positions[stream] += self.world_size * count
        return list(range(first, first + count))

    def _demonstrations(self, count: int) -> list[Example]:
        return [self.task.demonstration(position) for position in self._take("demonstration", count)]

    def _stand_ins(self, examples: Sequence[Example], keep: Tensor) -> list[tuple[int, Example]]:
        """For each prompt that is not kept its own demonstration, or the pool's next where it has none."""
        slots = [slot for slot, kept in enumerate(keep.tolist()) if not kept]
        pool = iter(self._demonstrations(sum(examples[slot].demonstration is None for slot in slots)))
        return [(slot, e if (e := examples[slot]).demonstration is not None else next(pool)) for slot in slots]

    def _answer(self, model: PreTrainedModel, examples: Sequence[Example]) -> list[Answered]:
        """``group_size`` completions of every example, in order, each with its reward."""
        if not examples:
            return []
        config = self.config
        asked = [(group, self.codec.prompt(example.prompt)) for group, example in enumerate(examples)]
        asked = [row for row in asked for _ in range(config.group_size)]
        sampling = Sampling(config.max_new_tokens, config.temperature)
        responses = generate(model, self.codec, [prompt for _, prompt in asked], sampling)
        return [
            Answered(group, prompt, ids, self.task.reward(examples[group], self.codec.text(ids)))
            for (group, prompt), ids in zip(asked, responses, strict=True)
        ]

    def _assemble(self, answered: Sequence[Answered], demonstrations: Sequence[tuple[int, Example]]) -> RolloutBatch:
        config = self.config
        return assemble(
            self.codec,
            answered,
            demonstrations,
            group_size=config.group_size,
            micro_batches=config.micro_batches,
            baseline=config.advantage_baseline,
            scale=config.advantage_scale,
            device=config.device,
        )

    def _metrics(self, answered: Sequence[Answered], rewards: Tensor) -> dict[str, float]:
        if not answered:
            return {}
        ended = sum(row.response[-1] in self.codec.stop_ids for row in answered)
        return {
            "reward": rewards.mean().item(),
            "response_length": sum(len(row.response) for row in answered) / len(answered),
            "response_ended": ended / len(answered),
        }

    def _check_lengths(self) -> None:
        """A demonstration longer than a completion may get teaches what a rollout can never show."""
        limit = self.config.max_new_tokens
        for position in range(self.task.demonstrations):
            example = self.task.demonstration(position)
            assert example.demonstration is not None
            if (length := len(self.codec.response(example.demonstration))) > limit:
                raise ValueError(
                    f"max_new_tokens must hold every demonstration: that of prompt {example.prompt!r} has {length} "
                    f"tokens with eos, got max_new_tokens={limit}"
                )
