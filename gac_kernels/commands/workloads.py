"""Training steps to measure the controller on: a model, one fixed batch, and the step with or without the controller.

Shapes: S sequences, P prompt and T response places, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from ..config import ControllerConfig
from ..controller import GuidedAdaptiveController
from ..objectives import HybridObjective
from ..ops import hybrid_loss_from_logits, signals_from_logprobs, token_logprobs
from ..signals import Signals
from ..train.config import TrainConfig
from ..train.model import build_model, positions_of
from ..train.model import load_model as load_local_model
from ..train.tasks import build_task
from ..types import TokenBatch

QWEN2_HEAD = "qwen2-0.5b-head"


@dataclass(frozen=True)
class Shape:
    """Rollouts, demonstrations, prompt places and response places of a batch."""

    rollouts: int
    demonstrations: int
    prompt: int
    response: int


# The demo's GAC run (train.demo), whose horizon of 150 steps has it refresh every other step.
DEMO_SHAPE, DEMO_UPDATE_EVERY = Shape(rollouts=128, demonstrations=16, prompt=6, response=24), 2


def defaults(model: str) -> tuple[Shape, int]:
    """Batch and refresh interval of a model: the demo's for ``tiny``; else the controller's own interval and a small
    batch, so that the step is short and the controller's share, if anything, large."""
    if model == "tiny":
        return DEMO_SHAPE, DEMO_UPDATE_EVERY
    return Shape(rollouts=3, demonstrations=1, prompt=16, response=16), ControllerConfig().update_every


def load_model(name: str, seed: int, device: str) -> PreTrainedModel:
    """``"tiny"``, ``"qwen2-0.5b-head"`` (widths and head of Qwen2-0.5B, two layers, random weights), or a directory."""
    if name == "tiny":
        config = TrainConfig(output=Path(), seed=seed, device=device)
        return build_model(config, build_task(config))[0]
    torch.manual_seed(seed)
    if name == QWEN2_HEAD:
        shape = Qwen2Config(
            vocab_size=151936,
            hidden_size=896,
            intermediate_size=4864,
            num_hidden_layers=2,
            num_attention_heads=14,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        return _placed(Qwen2ForCausalLM(shape), device)
    if not Path(name).is_dir():
        raise ValueError(f"--model must be tiny, {QWEN2_HEAD} or a local model directory, got {name!r}")
    return _placed(load_local_model(Path(name), torch.float32), device)


def check_fits(model: PreTrainedModel, shape: Shape) -> int:
    """The size of the vocabulary; raises ValueError where the model has no head, or cannot hold such a sequence."""
    head, positions = model.get_output_embeddings(), positions_of(model)
    if head is None:
        raise ValueError(f"--model: {type(model).__name__} has no head whose logits could be read")
    if positions is not None and shape.prompt + shape.response > positions:
        raise ValueError(
            f"--prompt and --response must fit the model's {positions} positions together, got {shape.prompt} and "
            f"{shape.response}"
        )
    return int(head.weight.shape[0])


def _placed(model: PreTrainedModel, device: str) -> PreTrainedModel:
    torch.nn.Module.to(model, device)
    return model.eval()


def random_batch(shape: Shape, vocabulary: int, seed: int, device: str) -> tuple[Tensor, TokenBatch]:
    """Random ids ``(S, P + T)`` and their responses with random advantages, lengths from half to all of the places."""
    generator = torch.Generator().manual_seed(seed)
    S = shape.rollouts + shape.demonstrations
    ids = torch.randint(0, vocabulary, (S, shape.prompt + shape.response), generator=generator)
    length_S = torch.randint((shape.response + 1) // 2, shape.response + 1, (S,), generator=generator)
    batch = TokenBatch.from_padded(
        ids[:, shape.prompt :].to(device),
        (torch.arange(shape.response) < length_S[:, None]).to(device),
        is_expert_S=(torch.arange(S) >= shape.rollouts).to(device),
        advantages=torch.randn(S, generator=generator).to(device),
    )
    return ids.to(device), batch


@dataclass(frozen=True)
class ControllerTime:
    """Seconds inside ``observe`` and ``step`` in one training step, and whether that step refreshed the estimates."""

    seconds: float
    refresh: bool


class Workload:
    """One model and batch with three things to time: the step with the controller, without it, and the signals alone.

    A step is forward, hybrid loss, backward, clipping, AdamW. Both kinds run on the same weights and optimizer.
    Rollouts are no part of it: with them a step is longer and the controller's share smaller.

    Args:
        update_every: of the controller that is run: how often the steps that refresh are sampled.
    """

    def __init__(self, model: PreTrainedModel, ids: Tensor, batch: TokenBatch, update_every: int) -> None:
        self.model, self.ids, self.batch = model, ids, batch
        self.objective = HybridObjective()
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        device = ids.device
        self.controller = GuidedAdaptiveController(ControllerConfig(update_every=update_every), device=device)
        self.fixed_mu = self.controller.mu.clone()
        self.times: list[ControllerTime] = []
        self._synchronize: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        with torch.no_grad():
            stats = token_logprobs(self._forward(), batch.targets, mask=batch.mask, outputs=("logprobs",))
        assert stats.logprobs is not None
        self._logprobs = stats.logprobs

    def step_without(self, _: object = None) -> None:
        """A training step at a fixed mu: nothing is observed."""
        self._update(self.fixed_mu)

    def step_with(self, _: object = None) -> None:
        """The same with the controller, whose time is taken inside. On a GPU the host waits for the device around it,
        so that its kernels are in the figure; the step as a whole then takes longer than without a stopwatch."""
        signals = self._update(self.controller.mu)
        refresh = self.controller.steps % self.controller.config.update_every == 0
        self._synchronize()
        began = time.perf_counter()
        self.controller.observe(signals)
        self.controller.step()
        self._synchronize()
        self.times.append(ControllerTime(time.perf_counter() - began, refresh))

    def signals(self, _: object = None) -> object:
        """The signals by a pass of their own, as a trainer that keeps its loss computes them."""
        return signals_from_logprobs(self._logprobs, self.batch, self.objective)

    def _update(self, mu: Tensor) -> Signals:
        self.optimizer.zero_grad(set_to_none=True)
        result = hybrid_loss_from_logits(self._forward(), self.batch, self.objective, mu, inplace=True)
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return result.signals

    def _forward(self) -> Tensor:
        """Logits of the responses."""
        places = torch.arange(self.ids.shape[1] - self.batch.targets.shape[1] - 1, self.ids.shape[1] - 1)
        return self.model(self.ids, use_cache=False, logits_to_keep=places.to(self.ids.device)).logits
