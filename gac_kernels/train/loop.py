"""The training loop, one optimizer step at a time.

Simplifications, stated first: rollouts by ``generate`` of the very model that is trained, dropout off, a reference
model that is whole on every rank.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..objectives import GIFT, NLL, HybridObjective
from ..types import Denominators, HybridLoss
from .collect import Collector
from .config import TrainConfig
from .mixing import build_mixing
from .model import build_codec, build_model
from .policy import Policy, head_of
from .ranks import Engine, Ranks
from .rollouts import RolloutBatch
from .tasks import build_task

_WARM_START = HybridObjective(supervised=NLL("none"))


class Trainer:
    """Model, data and controller of one run, and the step that joins them.

    ``step()`` is: prompts -> rollouts -> rewards -> group-relative advantages -> hybrid loss -> AdamW, and signals ->
    controller -> mu of the next step. The whole state goes through ``state_dict`` and ``load_state_dict``: a run
    continued from there takes the same steps bit for bit as one that was never interrupted.

    Args:
        config: the run.
        ranks: the processes that share it; None: this one alone. Every rank must call every method.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks | None = None) -> None:
        self.config, self.ranks = config, ranks or Ranks()
        config.check_ranks(self.ranks.size)
        task = build_task(config)
        self.model, self.tokenizer = build_model(config, task)
        head = head_of(self.model) if config.head == "auto" else None
        self.policy = Policy(self.model, head, config.autocast_dtype)
        self.collector = Collector(config, task, build_codec(self.model, self.tokenizer), self.ranks)
        self.reference: Policy | None = None
        self.engine = Engine(self.policy, self.ranks, config.fsdp)
        self.mixing = build_mixing(config, self.ranks)
        self.optimizer = self._new_optimizer()
        self.steps_done = 0
        self._batch: RolloutBatch | None = None
        self._batch_uses = 0
        self._batch_metrics: dict[str, float] = {}
        self._rng: dict[str, Tensor] = {}
        with self._own_rng():
            torch.manual_seed(config.seed * 1_000_003 + self.ranks.rank)

    @property
    def warming_up(self) -> bool:
        """Whether the next step belongs to the supervised warm start."""
        return self.steps_done < self.config.warmup_sft_steps

    def step(self) -> dict[str, float]:
        """One optimizer step.

        Returns:
            What to log: ``mu`` and the controller's own metrics, ``loss`` and its parts, ``kl`` and ``entropy`` (nats),
            ``effective_update_ratio``, ``reward``, ``grad_norm``, ``lr``, and ``step_seconds`` with the
            shares ``rollout_seconds`` and ``controller_seconds`` in it.
        """
        began = time.perf_counter()
        warming = self.warming_up
        with self._own_rng():
            batch = self._next_batch()
            mu, scale = self.mixing.mu, self.mixing.scale
            if warming:
                mu, scale = torch.ones_like(mu), torch.ones_like(scale)
            objective = _WARM_START if warming else self.config.objective
            rollout_seconds = time.perf_counter() - began
            logged, controller_seconds = self._update(batch, objective, mu, scale)
        logged["mu"] = mu
        if not warming:
            logged |= self.mixing.metrics()
        self.steps_done += 1
        values = torch.stack([value.double().reshape(()) for value in logged.values()]).tolist()
        return {
            **dict(zip(logged, values, strict=True)),
            **self._batch_metrics,
            "lr": self.optimizer.param_groups[0]["lr"],
            "step_seconds": time.perf_counter() - began,
            "rollout_seconds": rollout_seconds,
            "controller_seconds": controller_seconds,
        }

    def evaluate(self) -> float:
        """Accuracy of greedy completions on the held-out problems, in [0, 1]."""
        return self.collector.accuracy(self.policy)

    def state_dict(self) -> dict[str, Any]:
        """``{"tensors": the weights, "state": all else}``, both live: copy before stepping on.

        ``tensors`` is for safetensors; ``state`` holds plain values and tensors only (``weights_only=True`` reads it).
        """
        tensors = {f"policy.{name}": tensor for name, tensor in self.engine.weights().items()}
        if self.reference is not None:
            tensors |= {f"reference.{name}": tensor for name, tensor in self.reference.model.state_dict().items()}
        own = {"rng": self._rng, "batch": None if self._batch is None else self._batch.state_dict()}
        state = {
            "config": self.config.to_dict(),
            "steps_done": self.steps_done,
            "optimizer": self.engine.optimizer_state(self.optimizer),
            "mixing": self.mixing.state_dict(),
            "collector": self.collector.state_dict(),
            "ranks": self.ranks.gather(own),
            "batch_uses": self._batch_uses,
            "batch_metrics": self._batch_metrics,
        }
        return {"tensors": tensors, "state": state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Continue from ``state_dict()``; raises ValueError naming every setting that differs from that run's."""
        tensors, state = saved["tensors"], saved["state"]
        self.config.check_resumable(state["config"])
        if len(state["ranks"]) != self.ranks.size:
            raise ValueError(
                f"resume needs as many ranks as the run it continues: {len(state['ranks'])}, got {self.ranks.size}"
            )
        own = state["ranks"][self.ranks.rank]
        self.engine.load_weights(_with_prefix(tensors, "policy."))
        self.engine.load_optimizer(self.optimizer, state["optimizer"])
        self.mixing.load_state_dict(state["mixing"])
        self.collector.load_state_dict(state["collector"])
        self._rng = dict(own["rng"])
        self.steps_done = state["steps_done"]
        batch = own["batch"]
        device = torch.device(self.config.device)
        self._batch = None if batch is None else RolloutBatch(**{k: v.to(device) for k, v in batch.items()})
        self._batch_uses, self._batch_metrics = state["batch_uses"], dict(state["batch_metrics"])
        if reference := _with_prefix(tensors, "reference."):
            self.reference = self._frozen_copy(reference)

    # one step ---------------------------------------------------------------------------------------------------------

    def _next_batch(self) -> RolloutBatch:
        """The rollout batch under way, or a new one when it has served its ``updates_per_rollout`` steps."""
        if self.warming_up:
            return self.collector.warm_start().batch
        if self.steps_done == self.config.warmup_sft_steps:
            self._begin_run_proper()
        if self._batch is None or self._batch_uses == self.config.updates_per_rollout:
            collected = self.collector.rollouts(self.policy, self.mixing)
            batch = collected.batch
            if self.config.updates_per_rollout > 1:  # else the ratio is 1 by definition and needs no second pass
                batch = replace(batch, old_logprobs=self._logprobs(self.engine.module, batch))
            if self.reference is not None:
                batch = replace(batch, ref_logprobs=self._logprobs(self.reference, batch))
            self._batch, self._batch_uses, self._batch_metrics = batch, 0, collected.metrics
        self._batch_uses += 1
        return self._batch

    def _begin_run_proper(self) -> None:
        """A fresh optimizer, as if the warm start had been a run of its own, and the reference model."""
        self.optimizer = self._new_optimizer()
        if self.config.reference:
            self.reference = self._frozen_copy(self.engine.weights())

    def _update(
        self, batch: RolloutBatch, objective: HybridObjective, mu: Tensor, scale: Tensor
    ) -> tuple[dict[str, Tensor], float]:
        """Gradients of all micro-batches, one AdamW step, one controller step.

        Returns:
            What to log, and the seconds spent in the controller.
        """
        warming, controller_seconds, parts = self.warming_up, 0.0, []
        # Counts of the whole step: micro-batches then add up to the loss of one batch. A branch without rows divides
        # nothing, so any count that is not 0 does.
        policy, supervised = self.ranks.total(
            batch.count(objective.aggregation, expert=False), batch.count(objective.supervised_aggregation, expert=True)
        )
        counts = Denominators(policy=max(1, policy), supervised=max(1, supervised))
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = batch.micro_batches(self.config.micro_batches if self.ranks.size > 1 else 0)
        for done, rows in enumerate(micro_batches, 1):
            with self.engine.synced(last=done == len(micro_batches)):
                loss, result = self.engine.module(
                    rows, self.config.temperature, objective, mu, counts, self._base(objective, rows)
                )
                (self.ranks.size * scale * loss).backward()  # gradients are averaged over ranks
            assert result is not None
            parts.append((result, rows.count("token-mean", expert=False)))
            if not warming:
                tokens, began = rows.token_batch(), time.perf_counter()
                self.mixing.observe(result, tokens)
                controller_seconds += time.perf_counter() - began
        logged = _summary(parts, self.ranks)
        logged["grad_norm"] = self.engine.clip(self.config.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate()
        self.optimizer.step()
        if not warming:
            began = time.perf_counter()
            self.mixing.step(logged["kl"] if self.reference is not None else None)
            controller_seconds += time.perf_counter() - began
        if self.reference is None:
            del logged["kl"]  # to nothing
        return logged, controller_seconds

    def _base(self, objective: HybridObjective, rows: RolloutBatch) -> dict[str, Tensor | None] | None:
        """Of the model that the run proper started from, for GIFT; None for any other objective."""
        if not isinstance(objective.supervised, GIFT):
            return None
        assert self.reference is not None  # the config has seen to it
        return self.reference.as_base(rows, whole_logits=self.policy.head is None)

    def _learning_rate(self) -> float:
        config, step = self.config, self.steps_done
        if self.warming_up:
            return config.warmup_sft_lr * min(1.0, (step + 1) / (config.lr_warmup + 1))
        step -= config.warmup_sft_steps
        rise = min(1.0, (step + 1) / (config.lr_warmup + 1))
        passed = max(0.0, (step - config.lr_warmup) / max(1, config.steps - config.lr_warmup))
        fall = config.lr_final + (1.0 - config.lr_final) * 0.5 * (1.0 + math.cos(math.pi * passed))
        return config.learning_rate * rise * fall

    def _logprobs(self, module: torch.nn.Module, batch: RolloutBatch) -> Tensor:
        """``(S, T)`` by the micro-batches of training, so that no rounding differs from theirs."""
        micro_batches = batch.micro_batches(self.config.micro_batches if self.ranks.size > 1 else 0)
        with torch.no_grad():
            parts = [module(rows, self.config.temperature)[0] for rows in micro_batches]
        return torch.cat(parts)[: len(batch.input_ids)]

    def _new_optimizer(self) -> torch.optim.AdamW:
        return torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=self.config.weight_decay)

    def _frozen_copy(self, weights: dict[str, Tensor]) -> Policy:
        """A policy of these weights that nobody trains."""
        model = copy.deepcopy(self.model) if not self.engine.fsdp else type(self.model)(self.model.config)
        move: Any = model.to  # transformers wraps it without its types
        move(device=self.config.device, dtype=self.config.weights_dtype)
        model.eval().requires_grad_(False)
        model.load_state_dict(weights)
        return Policy(model, self.policy.head, self.policy.autocast_dtype)

    # randomness -------------------------------------------------------------------------------------------------------

    @contextmanager
    def _own_rng(self) -> Iterator[None]:
        """Run on the trainer's own random state: what else the process draws changes nothing here, nor we there."""
        outside = self._rng_state()
        self._set_rng_state(self._rng)
        try:
            yield
            self._rng = self._rng_state()
        finally:
            self._set_rng_state(outside)

    def _rng_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if torch.device(self.config.device).type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.config.device)
        return state

    def _set_rng_state(self, state: dict[str, Tensor]) -> None:
        if "cpu" in state:
            torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.config.device)


def _with_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _summary(parts: list[tuple[HybridLoss, int]], ranks: Ranks) -> dict[str, Tensor]:
    """One number for the step from those of its micro-batches, each given with its rollout tokens, of all ranks.

    Losses, KL and entropy were divided by the step's counts, so they add up; ratios are means over rollout tokens.
    """
    added = ("loss", "policy_loss", "supervised_loss", "kl", "entropy")
    sums = [torch.stack([getattr(result, name).detach() for result, _ in parts]).sum() for name in added]
    logged = dict(zip(added, ranks.sum(torch.stack(sums)).unbind(), strict=True))
    (tokens,) = ranks.total(sum(count for _, count in parts))
    for name in parts[0][0].metrics:
        values = torch.stack([result.metrics[name] for result, _ in parts])
        if name == "ratio_max":
            logged[name] = ranks.max(values.max())
        elif tokens:
            logged[name] = ranks.sum((values * values.new_tensor([count / tokens for _, count in parts])).sum())
    return logged
