"""A whole run: steps, evaluations, checkpoints, log, report, and the trained model at the end."""

from __future__ import annotations

import json
import time

from .checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from .config import TrainConfig
from .loop import Trainer
from .metrics import MetricsWriter
from .model import save_model
from .ranks import Ranks
from .report import write_report
from .result import TrainResult


def run(config: TrainConfig, *, resume: bool, progress: bool) -> TrainResult:
    """See :func:`gac_kernels.train.train`."""
    ranks = Ranks.from_environment(config.device)
    try:
        return _run(config, ranks, resume=resume, progress=progress)
    finally:
        ranks.close()


def _run(config: TrainConfig, ranks: Ranks, *, resume: bool, progress: bool) -> TrainResult:
    """Every rank takes the steps; the first one writes."""
    checkpoint = ranks.alike(lambda: _open_output(config, resume))
    sitting = _Sitting(config, ranks, checkpoint)
    if ranks.rank != 0:
        sitting.run(None)
        sitting.trainer.engine.weights()  # the first rank gathers them to save
        return sitting.result()
    in_force = {"controller_in_force": str(config.resolved_controller())} if config.controller == "gac" else {}
    _write_json(config, "config.json", config.to_dict() | in_force)
    resume_step = None if checkpoint is None else checkpoint.step
    with MetricsWriter(config.output, resume_step=resume_step, total_steps=config.total_steps, show=progress) as writer:
        sitting.run(writer)
    trainer = sitting.trainer
    save_model(trainer.model, trainer.tokenizer, config.output / "model", trainer.engine.weights())
    result = sitting.result()
    _write_json(config, "summary.json", result.to_dict())
    write_report(config.output)
    return result


def _open_output(config: TrainConfig, resume: bool) -> Checkpoint | None:
    """The checkpoint to continue from, if any; a directory that holds another run is not written over."""
    if resume:
        return load_checkpoint(config.output / "checkpoints")
    for name in ("checkpoints", "metrics.jsonl"):
        if (config.output / name).exists():
            raise ValueError(
                f"output: {config.output} holds a run already ({name}); "
                "continue it with resume=True, or name another directory"
            )
    return None


def _write_json(config: TrainConfig, name: str, value: dict) -> None:
    config.output.mkdir(parents=True, exist_ok=True)
    (config.output / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


class _Sitting:
    """A run from where it stands to its end: the trainer, and what outlives a sitting beside the trainer's state."""

    def __init__(self, config: TrainConfig, ranks: Ranks, checkpoint: Checkpoint | None) -> None:
        self.config, self.trainer = config, Trainer(config, ranks)
        self.before: float | None = None
        self.after: float | None = None
        self.seconds = 0.0
        if checkpoint is not None:
            state = dict(checkpoint.state)
            own = state.pop("run")
            self.trainer.load_state_dict({"tensors": checkpoint.tensors, "state": state})
            self.before, self.after, self.seconds = own["before"], own["after"], own["seconds"]
        self._began = time.perf_counter()

    def run(self, writer: MetricsWriter | None) -> None:
        config, trainer = self.config, self.trainer
        if config.warmup_sft_steps == 0 and self.before is None:
            self.before = trainer.evaluate()
            if writer is not None:
                writer.log(0, {"eval/accuracy": self.before})
        while trainer.steps_done < config.total_steps:
            metrics = trainer.step()
            if self._due(config.eval_every, config.warmup_sft_steps, config.total_steps):
                self.after = metrics["eval/accuracy"] = trainer.evaluate()
                if trainer.steps_done == config.warmup_sft_steps:
                    self.before = self.after
            if writer is not None:
                writer.log(trainer.steps_done, metrics)
            if self._due(config.checkpoint_every, config.total_steps):
                self._save()

    def result(self) -> TrainResult:
        assert self.before is not None and self.after is not None  # both steps are behind a finished run
        return TrainResult(
            accuracy_before=self.before,
            accuracy_after=self.after,
            mu=float(self.trainer.mixing.mu),
            steps=self.trainer.steps_done - self.config.warmup_sft_steps,
            seconds=self.seconds,
            output=self.config.output,
        )

    def _due(self, every: int, *always: int) -> bool:
        done = self.trainer.steps_done
        return done in always or (every > 0 and done % every == 0)

    def _save(self) -> None:
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now
        saved = self.trainer.state_dict()
        if self.trainer.ranks.rank != 0:
            return
        own = {"before": self.before, "after": self.after, "seconds": self.seconds}
        save_checkpoint(
            self.config.output / "checkpoints",
            self.trainer.steps_done,
            tensors=saved["tensors"],
            state={**saved["state"], "run": own},
            keep=self.config.checkpoint_keep,
        )
