"""Where a step's rows come from: positions in the task's streams, rollouts of the policy, demonstrations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .config import TrainConfig
from .mixing import Mixing
from .policy import Policy
from .ranks import Ranks
from .rollouts import Answered, Codec, RolloutBatch, Sampling, assemble, generate
from .tasks import Example, Task


@dataclass(frozen=True)
class Collected:
    """Rows to train on, and what the rollouts looked like."""

    batch: RolloutBatch
    metrics: dict[str, float]


class Collector:
    """Draws prompts and demonstrations by position and turns them into batches.

    Two integers are its whole state. The config's counts are those of all ranks together: each takes its own share of
    the positions and moves on by all of them, so ranks never draw the same position and need not talk to each other.
    """

    def __init__(self, config: TrainConfig, task: Task, codec: Codec, ranks: Ranks) -> None:
        self.config, self.task, self.codec, self.ranks = config, task, codec, ranks
        self.positions = {"prompt": 0, "demonstration": 0}
        self._check_lengths()

    def warm_start(self) -> Collected:
        """A batch of demonstrations alone."""
        demonstrations = self._demonstrations(self.config.warmup_sft_batch)
        return Collected(self._assemble([], list(enumerate(demonstrations))), {})

    def rollouts(self, policy: Policy, mixing: Mixing) -> Collected:
        """A batch of sampled completions with their advantages, and the demonstrations that go with them."""
        config = self.config
        examples = [self.task.prompt(position) for position in self._take("prompt", config.prompts_per_step)]
        answered = self._answer(policy, examples)
        rewards = torch.tensor([row.reward for row in answered])
        keep = mixing.route(rewards.view(-1, config.group_size).mean(dim=1)) if answered else None
        if keep is None:
            demonstrations = list(enumerate(self._demonstrations(config.demonstrations_per_step)))
        else:
            demonstrations = self._stand_ins(examples, keep)
        kept = answered if keep is None else [row for row in answered if keep[row.group]]
        return Collected(self._assemble(kept, demonstrations), self._metrics(answered))

    def accuracy(self, policy: Policy) -> float:
        """Share of the held-out problems that greedy completions answer rightly. Draws no random number."""
        examples, right = self.task.evaluation(), 0.0
        sampling = Sampling(self.config.max_new_tokens, None)
        share = -(-len(examples) // self.ranks.size)
        first = self.ranks.rank * share
        for start in range(0, share, self.config.eval_batch):
            # Ranks whose weights are spread keep in step: one that has no problem left answers another's, uncounted.
            places = range(first + start, first + min(start + self.config.eval_batch, share))
            part = [examples[min(place, len(examples) - 1)] for place in places]
            completions = generate(policy, self.codec, [self.codec.prompt(e.prompt) for e in part], sampling)
            rewards = (self.task.reward(e, self.codec.text(c)) for e, c in zip(part, completions, strict=True))
            right += sum(r for place, r in zip(places, rewards, strict=True) if place < len(examples))
        return sum(self.ranks.gather(right)) / len(examples)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.positions)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.positions = {name: state[name] for name in self.positions}

    def _take(self, stream: str, count: int) -> list[int]:
        first, rank, size = self.positions[stream], self.ranks.rank, self.ranks.size
        self.positions[stream] += count
        return list(range(first + count * rank // size, first + count * (rank + 1) // size))

    def _demonstrations(self, count: int) -> list[Example]:
        return [self.task.demonstration(position) for position in self._take("demonstration", count)]

    def _stand_ins(self, examples: Sequence[Example], keep: Tensor) -> list[tuple[int, Example]]:
        """For each prompt that is not kept its own demonstration, or the pool's next where it has none."""
        slots = [slot for slot, kept in enumerate(keep.tolist()) if not kept]
        wanted = self.ranks.gather(sum(examples[slot].demonstration is None for slot in slots))
        first = self.positions["demonstration"] + sum(wanted[: self.ranks.rank])
        self.positions["demonstration"] += sum(wanted)
        pool = (self.task.demonstration(first + i) for i in range(wanted[self.ranks.rank]))
        return [(slot, e if (e := examples[slot]).demonstration is not None else next(pool)) for slot in slots]

    def _answer(self, policy: Policy, examples: Sequence[Example]) -> list[Answered]:
        """``group_size`` completions of every example, in order, each with its reward."""
        if not examples:
            return []
        config = self.config
        asked = [(group, self.codec.prompt(example.prompt)) for group, example in enumerate(examples)]
        asked = [row for row in asked for _ in range(config.group_size)]
        sampling = Sampling(config.max_new_tokens, config.temperature)
        responses = generate(policy, self.codec, [prompt for _, prompt in asked], sampling)
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

    def _metrics(self, answered: Sequence[Answered]) -> dict[str, float]:
        """Means over the rollouts of all ranks."""
        sums = (
            len(answered),
            sum(row.reward for row in answered),
            sum(len(row.response) for row in answered),
            sum(row.response[-1] in self.codec.stop_ids for row in answered),
            self.config.group_size * sum(min(group) < max(group) for group in self._rewards(answered)),
        )
        count, *totals = (sum(column) for column in zip(*self.ranks.gather(sums), strict=True))
        names = ("reward", "response_length", "response_ended", "groups_mixed")
        return {name: total / count for name, total in zip(names, totals, strict=True)} if count else {}

    def _rewards(self, answered: Sequence[Answered]) -> list[list[float]]:
        """Of each group: where all are equal it teaches nothing."""
        size = self.config.group_size
        return [[row.reward for row in answered[start : start + size]] for start in range(0, len(answered), size)]

    def _check_lengths(self) -> None:
        """Every prompt fits the model with its completion, and every demonstration fits a completion: one that is
        longer teaches what a rollout can never show."""
        limit, positions = self.config.max_new_tokens, self.codec.positions
        for example in self.task.problems():
            length, where = len(self.codec.prompt(example.prompt)), _where(example)
            if not length:
                raise ValueError(f"{where}prompt {example.prompt!r:.80} has no token")
            if positions is not None and length + limit > positions:
                raise ValueError(
                    f"{where}prompt {example.prompt!r:.80} has {length} tokens, with max_new_tokens={limit} more than "
                    f"the model's {positions} positions (max_position_embeddings)"
                )
        for position in range(self.task.demonstrations):
            example = self.task.demonstration(position)
            assert example.demonstration is not None
            if (length := len(self.codec.response(example.demonstration))) > limit:
                raise ValueError(
                    f"{_where(example)}max_new_tokens must hold every demonstration: that of prompt "
                    f"{example.prompt!r:.80} has {length} tokens with eos, got max_new_tokens={limit}"
                )


def _where(example: Example) -> str:
    return f"{example.where}: " if example.where else ""
