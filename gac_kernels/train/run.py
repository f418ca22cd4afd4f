"""A whole run: steps, evaluations, checkpoints, log, report, and the trained model at the end."""

from __future__ import annotations

import time
import warnings

from torch import Tensor

from ._lock import OutputLock
from .checkpoint import save_checkpoint
from .config import TrainConfig
from .loop import Trainer
from .metrics import MetricsWriter
from .model import save_model
from .notices import Watch
from .output import Found, sweep, write_json
from .ranks import Ranks
from .report import write_report
from .result import TrainResult


def run(config: TrainConfig, lock: OutputLock, *, resume: bool, progress: bool) -> TrainResult:
    """See :func:`gac_kernels.train.train`."""
    ranks = Ranks.from_environment(config.device)
    try:
        return _run(config, ranks, lock, resume=resume, progress=progress)
    finally:
        ranks.close()


def _run(config: TrainConfig, ranks: Ranks, lock: OutputLock, *, resume: bool, progress: bool) -> TrainResult:
    """Every rank takes the steps; the first one writes."""
    ranks.alike(lock.check)
    found = ranks.alike(lambda: Found.look(config, resume))
    found.agree(ranks, config)
    ranks.alike(lambda: found.check(config))
    sitting = _Sitting(config, ranks, found)
    if ranks.rank != 0:
        sitting.run(None)
        sitting.trainer.engine.weights()  # the first rank gathers them to save
        return sitting.result()
    sweep(config, 0 if found.checkpoint is None else found.checkpoint.step)
    in_force = {"controller_in_force": str(config.resolved_controller())} if config.controller == "gac" else {}
    write_json(config.output / "config.json", config.to_dict() | in_force)
    with MetricsWriter(
        config.output,
        resume_step=None if found.checkpoint is None else found.checkpoint.step,
        resume_log=sitting.log,
        total_steps=config.total_steps,
        show=progress,
    ) as writer:
        sitting.run(writer)
    trainer = sitting.trainer
    save_model(trainer.model, trainer.tokenizer, config.output / "model", trainer.engine.weights())
    result = sitting.result()
    write_json(config.output / "summary.json", result.to_dict())
    write_report(config.output)
    return result


class _Sitting:
    """A run from where it stands to its end: the trainer, and what outlives a sitting beside the trainer's state."""

    def __init__(self, config: TrainConfig, ranks: Ranks, found: Found) -> None:
        self.config, self.trainer, self.fingerprints = config, Trainer(config, ranks), found.fingerprints
        self.before: float | None = None
        self.after: float | None = None
        self.reward: float | None = None
        self.log: Tensor | None = None
        self.seconds, self.watch = 0.0, Watch(config)
        if found.checkpoint is not None:
            state = dict(found.checkpoint.state)
            own = state.pop("run")
            self.trainer.load_state_dict({"tensors": found.checkpoint.tensors, "state": state})
            self.before, self.after, self.seconds = own["before"], own["after"], own["seconds"]
            self.reward, self.log = own.get("reward"), own.get("log")
            if "watch" in own:  # not in checkpoints of earlier versions
                self.watch.load_state_dict(own["watch"])
        self._writer: MetricsWriter | None = None
        self._began = time.perf_counter()

    def run(self, writer: MetricsWriter | None) -> None:
        config, trainer, self._writer = self.config, self.trainer, writer
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
                self.reward = metrics.get("reward", self.reward)
                self._say(self.watch.step(metrics))
            if self._due(config.checkpoint_every, config.total_steps):
                self._save()
        if writer is not None:
            assert self.before is not None and self.after is not None  # both steps are behind a finished run
            self._say(self.watch.finish(self.before, self.after, self.reward))

    def _say(self, notices: list[str]) -> None:
        for text in notices:
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def result(self) -> TrainResult:
        assert self.before is not None and self.after is not None
        return TrainResult(
            accuracy_before=self.before,
            accuracy_after=self.after,
            mu=float(self.trainer.mixing.mu),
            steps=self.trainer.steps_done - self.config.warmup_sft_steps,
            seconds=self.seconds,
            output=self.config.output,
            notices=tuple(self.watch.told.values()),
        )

    def _due(self, every: int, *always: int) -> bool:
        done = self.trainer.steps_done
        return done in always or (every > 0 and done % every == 0)

    def _save(self) -> None:
        now = time.perf_counter()
        self.seconds, self._began = self.seconds + now - self._began, now
        saved = self.trainer.state_dict()
        if self._writer is None:
            return
        own = {
            "before": self.before,
            "after": self.after,
            "seconds": self.seconds,
            "reward": self.reward,
            "log": self._writer.packed(),
            "watch": self.watch.state_dict(),
            "fingerprints": self.fingerprints,
        }
        save_checkpoint(
            self.config.output / "checkpoints",
            self.trainer.steps_done,
            tensors=saved["tensors"],
            state={**saved["state"], "run": own},
            keep=self.config.checkpoint_keep,
        )
