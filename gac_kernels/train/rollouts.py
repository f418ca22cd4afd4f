"""From prompts to a batch that a step can train on: sampled completions and demonstrations side by side.

Every row is a prompt, padded on the left to ``P`` tokens, and a response, padded on the right to ``T``. The logits that
predict the response then stand in the same ``T`` places for all rows. Padding behind a response needs no attention
mask: no live token comes after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..advantages import group_advantages
from ..objectives import LogitTransform
from ..types import TokenBatch
from .tasks import Example

if TYPE_CHECKING:
    from .policy import Policy


@dataclass(frozen=True)
class Codec:
    """Text to token ids and back: the tokenizer with everything that ends or pads a sequence.

    Attributes:
        stop_ids: every id that ends a completion.
        positions: the most tokens that the model takes, prompt and completion together; None: no bound is known.
    """

    tokenizer: PreTrainedTokenizerBase
    stop_ids: list[int]
    positions: int | None = None

    @property
    def pad_id(self) -> int:
        return self.tokenizer.pad_token_id

    @cached_property
    def opening(self) -> list[int]:
        """What the tokenizer puts before a text (a begin token, mostly); what it puts behind one is not ours."""
        bare = self._bare("0")
        whole = self.tokenizer("0")["input_ids"]
        places = range(len(whole) - len(bare) + 1)
        return whole[: next((i for i in places if whole[i : i + len(bare)] == bare), 0)]

    def prompt(self, text: str) -> list[int]:
        """Ids of a prompt, opened as the tokenizer opens a text and not closed.

        A chat template writes the begin token itself, and the tokenizer would put a second one before it. Some
        tokenizers close every text with an end token, behind which a model has nothing left to say.
        """
        bare, opening = self._bare(text), self.opening
        shared = next(n for n in range(len(opening), -1, -1) if bare[:n] == opening[len(opening) - n :])
        return [*opening, *bare[shared:]]

    def response(self, text: str) -> list[int]:
        """Ids of a demonstration, closed by one end token: its own where it is written out, else eos."""
        ids = self._bare(text)
        ends = len(ids)
        while ends and ids[ends - 1] in self.stop_ids:
            ends -= 1
        return [*ids[:ends], ids[ends] if ends < len(ids) else self.tokenizer.eos_token_id]

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _bare(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn; greedy where ``temperature`` is None."""

    max_new_tokens: int
    temperature: float | None


def generate(policy: Policy, codec: Codec, prompts: Sequence[list[int]], sampling: Sampling) -> list[list[int]]:
    """One completion a prompt, ids up to and including the first stop token (or ``max_new_tokens`` of them).

    Samples from the model's own distribution at ``temperature``: top-k, top-p and penalties that a model's
    generation_config.json brings along are set aside, for with them the importance ratio would be a different one.
    """
    input_ids, mask = _pad_left(prompts, codec.pad_id)
    draw = (
        {"do_sample": False}
        if sampling.temperature is None
        else {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
    )
    settings = GenerationConfig(
        max_new_tokens=sampling.max_new_tokens, pad_token_id=codec.pad_id, eos_token_id=codec.stop_ids, **draw
    )
    model = policy.model
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        with torch.no_grad():
            sequences = policy.generate(
                input_ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
            )
    finally:
        model.generation_config = own
    stops = set(codec.stop_ids)
    completions = []
    for row in sequences[:, input_ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(row) if token in stops), len(row) - 1)
        completions.append(row[: end + 1])
    return completions


@dataclass(frozen=True, eq=False)
class RolloutBatch:
    """Rows of one rollout batch, in the order of their micro-batches. ``S`` rows, ``P`` prompt, ``T`` response places.

    Attributes:
        input_ids: ``(S, P + T)`` int64. prompt_mask: ``(S, P)`` bool.
        response_mask: ``(S, T)`` bool, the stop token included.
        is_expert: ``(S,)`` bool. advantages: ``(S,)`` float32, 0 on expert rows. groups: ``(S,)`` int64.
        micro: ``(S,)`` int64, the micro-batch of each row, never falling.
        old_logprobs, ref_logprobs: ``(S, T)`` or None.
    """

    input_ids: Tensor
    prompt_mask: Tensor
    response_mask: Tensor
    is_expert: Tensor
    advantages: Tensor
    groups: Tensor
    micro: Tensor
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None

    def micro_batches(self, at_least: int = 0) -> list[RolloutBatch]:
        """The rows of each micro-batch; one that HPT left without rows is not there. Where ranks keep in step every one
        must go through as many passes: up to ``at_least``, further ones hold a row without a live token."""
        _, counts = torch.unique_consecutive(self.micro, return_counts=True)
        bounds = [0, *counts.cumsum(0).tolist()]
        parts = [self._rows(low, high) for low, high in pairwise(bounds)]
        idle = self._rows(0, 1)
        idle = replace(idle, response_mask=torch.zeros_like(idle.response_mask))
        return parts + [idle] * (at_least - len(parts))

    def _rows(self, low: int, high: int) -> RolloutBatch:
        return replace(self, **{name: value[low:high] for name, value in self.state_dict().items()})

    @property
    def targets(self) -> Tensor:
        """``(S, T)`` response ids."""
        return self.input_ids[:, self.prompt_mask.shape[1] :]

    def token_batch(self) -> TokenBatch:
        """The rows as the losses take them."""
        return TokenBatch.from_padded(
            self.targets,
            self.response_mask,
            is_expert_S=self.is_expert,
            advantages=self.advantages,
            old_logprobs=self.old_logprobs,
            ref_logprobs=self.ref_logprobs,
            groups=self.groups,
        )

    def count(self, aggregation: str, *, expert: bool) -> int:
        """What a branch's loss is divided by: its tokens for ``token-mean``, else its rows (none is empty)."""
        rows = self.is_expert if expert else ~self.is_expert
        return int(self.response_mask[rows].sum() if aggregation == "token-mean" else rows.sum())

    def state_dict(self) -> dict[str, Tensor]:
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


def sampled_transform(rows: RolloutBatch, temperature: float) -> LogitTransform:
    """Rollouts are scored at the temperature that sampled them, demonstrations at 1."""
    if temperature == 1.0:
        return LogitTransform()
    heat_S = torch.full(rows.is_expert.shape, temperature, dtype=torch.float64, device=rows.is_expert.device)
    return LogitTransform(heat_S.masked_fill(rows.is_expert, 1.0))


@dataclass(frozen=True)
class Answered:
    """One sampled completion."""

    group: int
    prompt: list[int]
    response: list[int]
    reward: float


def assemble(
    codec: Codec,
    answered: Sequence[Answered],
    demonstrations: Sequence[tuple[int, Example]],
    *,
    group_size: int,
    micro_batches: int,
    baseline: str,
    scale: str,
    device: torch.device | str,
) -> RolloutBatch:
    """Lay rollouts and demonstrations out as one batch.

    Args:
        answered: whole groups of ``group_size``, one after the other.
        demonstrations: (slot, example) pairs. Group or slot ``k`` belongs to micro-batch ``k % micro_batches``.
    """
    if not answered and not demonstrations:
        raise ValueError("a batch needs a rollout or a demonstration, got none")
    rewards = torch.tensor([row.reward for row in answered], dtype=torch.float32)
    advantages = group_advantages(rewards, group_size, baseline=baseline, scale=scale) if answered else rewards
    rows = [(row.group % micro_batches, row.group, row.prompt, row.response) for row in answered]
    for slot, example in demonstrations:
        assert example.demonstration is not None
        rows.append((slot % micro_batches, -1, codec.prompt(example.prompt), codec.response(example.demonstration)))
    order = sorted(range(len(rows)), key=lambda index: rows[index][0])  # stable: a group stays together
    micro, groups, prompts, responses = zip(*(rows[index] for index in order), strict=True)
    prompt_ids, prompt_mask = _pad_left(prompts, codec.pad_id)
    response_ids, response_mask = _pad_right(responses, codec.pad_id)
    index = torch.tensor(order)
    batch = RolloutBatch(
        input_ids=torch.cat([prompt_ids, response_ids], dim=1),
        prompt_mask=prompt_mask.bool(),
        response_mask=response_mask,
        is_expert=index >= len(answered),
        advantages=torch.cat([advantages, torch.zeros(len(demonstrations))])[index],
        groups=torch.tensor(groups),
        micro=torch.tensor(micro),
    )
    return replace(batch, **{name: value.to(device) for name, value in batch.state_dict().items()})


def _pad_left(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def _pad_right(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
