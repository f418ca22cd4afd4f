"""One run of the study: its stages of training, what is measured beside them, and the file that holds the result."""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gac_kernels import HybridLoss, HybridObjective, TokenBatch, hybrid_loss
from gac_kernels.train import train
from gac_kernels.train.loop import Trainer
from gac_kernels.train.mixing import Mixing
from gac_kernels.train.model import save_model
from gac_kernels.train.policy import response_logits
from gac_kernels.train.rollouts import Answered, Sampling, assemble, generate

from .arms import Run, Size, fingerprint, start_config

# What is kept of every step, where the loop logs it.
KEPT = ("mu", "reward", "entropy", "effective_update_ratio", "ratio_max", "residual")
DIGITS = 4  # significant, of every number that is kept


# Files --------------------------------------------------------------------------------------------------------------


def result_file(run: Run, output: Path) -> Path:
    """Its name holds the fingerprint: results of another configuration lie beside it and are not read."""
    return output / f"{run.name}-{run.fingerprint}.json"


def read_result(path: Path, expected: str) -> dict[str, Any] | None:
    """A finished result; None where there is none, or only what a kill has left of one.

    Raises:
        ValueError: the file holds the result of another configuration.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    if not isinstance(found, dict) or found.get("fingerprint") != expected:
        own = found.get("fingerprint") if isinstance(found, dict) else found
        raise ValueError(f"{path} must be of the configuration {expected}, got {own!r}; remove it or move it away")
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As a whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, separators=(",", ":"), allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# Measurements -------------------------------------------------------------------------------------------------------


class Probe:
    """KL to the start policy and entropy, on the same tokens for all arms of a seed.

    The tokens are those of one completion a prompt, sampled from the start policy at temperature 1 for held-out
    problems. ``measure`` gives, in nats a token and as means over these tokens,
    ``sum_k p_k (log p_k - log p0_k)`` over the whole vocabulary and ``-sum_k p_k log p_k``.
    """

    def __init__(self, trainer: Trainer, prompts: int, seed: int) -> None:
        codec, examples = trainer.collector.codec, trainer.collector.task.evaluation()[:prompts]
        ids = [codec.prompt(example.prompt) for example in examples]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            sampled = generate(trainer.policy, codec, ids, Sampling(trainer.config.max_new_tokens, 1.0))
        answered = [Answered(i, ids[i], response, 0.0) for i, response in enumerate(sampled)]
        self.rows = assemble(
            codec, answered, [], group_size=1, micro_batches=1, baseline="mean", scale="none", device="cpu"
        )
        self.start = self._log_probs(trainer)

    def measure(self, trainer: Trainer) -> tuple[float, float]:
        now = self._log_probs(trainer)
        p, live = now.exp(), self.rows.response_mask
        kl, entropy = (p * (now - self.start)).sum(-1), -(p * now).sum(-1)
        return float(kl[live].mean()), float(entropy[live].mean())

    @torch.no_grad()
    def _log_probs(self, trainer: Trainer) -> Tensor:
        return response_logits(trainer.model, self.rows).double().log_softmax(-1)


class ResidualWatch(Mixing):
    """A constant mu that logs how far the updates of a group's completions cancel.

    ``F_i = A_i w_i`` is the force on completion i, ``w_i`` the mean over its tokens of the weight that the objective
    really puts on ``A_i grad logp`` (0 where clipped). Logged is the mean over groups of ``|sum_i F_i| / sum_i |F_i|``,
    for any objective; groups without a force stay out.
    """

    def __init__(self, mu: float, objective: HybridObjective) -> None:
        super().__init__(mu)
        self.objective = objective
        self._residual = self.mu.new_zeros(())

    def observe(self, result: HybridLoss, batch: TokenBatch) -> None:
        assert self.objective.aggregation == "seq-mean-token-mean" and batch.groups is not None
        logprobs = result.logprobs.detach().double().requires_grad_()
        loss = hybrid_loss(logprobs, batch, self.objective, 0.0).loss
        (gradient,) = torch.autograd.grad(loss, logprobs)  # of token t: -A w_t / (T S)
        self._residual = group_residual(-gradient.sum(1), batch.groups)

    def metrics(self) -> dict[str, Tensor]:
        return {"residual": self._residual}


def group_residual(force_S: Tensor, groups_S: Tensor) -> Tensor:
    """Mean over groups of ``|sum_i F_i| / sum_i |F_i|``; 0 where no group has a force."""
    ids, place_S = groups_S.unique(return_inverse=True)
    net, total = (force_S.new_zeros(len(ids)).index_add(0, place_S, f) for f in (force_S, force_S.abs()))
    moved = total > 0
    return (net[moved].abs() / total[moved]).mean() if bool(moved.any()) else force_S.new_zeros(())


# Running ------------------------------------------------------------------------------------------------------------


def start_directory(seed: int, size: Size, output: Path) -> Path:
    return output / f"start-seed{seed}-{fingerprint(start_config(Path(), seed, size).to_dict())}"


def make_start(seed: int, size: Size, output: Path) -> Path:
    """Train the warm start of a seed unless it is there; returns its directory. A killed one begins again."""
    directory = start_directory(seed, size, output)
    done = directory / "done.json"
    if not done.exists():
        torch.set_num_threads(1)
        result = train(start_config(directory, seed, size), resume=True, progress=False)
        write_json(done, {"accuracy": result.accuracy_after})
    return directory


def execute(run: Run, output: Path) -> Path:
    """Make one run from its start, which must be there, and write its result file."""
    torch.set_num_threads(1)
    model = start_directory(run.seed, run.size, output) / "warm-start" / "model"
    path = result_file(run, output)
    stages, probe = [], None
    with tempfile.TemporaryDirectory(dir=output, prefix=".stage-") as kept:
        for number in range(len(run.stages)):
            trainer = Trainer(run.config(number, output / "unused", str(model)))
            if run.group == "dfpo":
                trainer.mixing = ResidualWatch(trainer.config.mu, trainer.config.objective)
            probe = probe or Probe(trainer, run.size.probe_prompts, run.seed)
            stages.append(_train_stage(trainer, probe, run.size))
            model = Path(kept) / f"stage{number}"
            save_model(trainer.model, trainer.tokenizer, model, trainer.engine.weights())
    head = {"group": run.group, "arm": run.arm, "seed": run.seed, "fingerprint": run.fingerprint}
    write_json(path, {**head, "stages": stages})
    return path


@dataclass(frozen=True)
class _Clock:
    """CPU seconds of this process and wall seconds since it was made."""

    cpu: float
    wall: float

    @classmethod
    def now(cls) -> _Clock:
        return cls(time.process_time(), time.perf_counter())


def _train_stage(trainer: Trainer, probe: Probe, size: Size) -> dict[str, Any]:
    """All steps of one stage. Times are those of the steps, without probes and evaluations."""
    accuracy = [[0, trainer.evaluate()]]
    measured: list[list[float]] = [[0, *probe.measure(trainer)]]
    columns: dict[str, list[float]] = {}
    cpu = wall = 0.0
    last = trainer.config.steps
    for step in range(1, last + 1):
        began = _Clock.now()
        logged = trainer.step()
        cpu, wall = cpu + time.process_time() - began.cpu, wall + time.perf_counter() - began.wall
        for name in KEPT:
            if name in logged:
                columns.setdefault(name, []).append(_short(logged[name]))
        if step % size.probe_every == 0 or step == last:
            measured.append([step, *probe.measure(trainer)])
        if step % size.eval_every == 0 or step == last:
            accuracy.append([step, trainer.evaluate()])
    return {
        "accuracy": accuracy, "probe": [[s, _short(kl), _short(h)] for s, kl, h in measured], "steps": columns,
        "cpu_seconds": _short(cpu), "wall_seconds": _short(wall),
    }  # fmt: skip


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
