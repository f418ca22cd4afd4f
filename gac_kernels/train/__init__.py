"""The thin training loop: hybrid SFT + RL of a causal language model, mixed by GAC or by one of its baselines.

transformers and tokenizers are imported when a run starts, not before: checkpoints, metrics and reports need neither.
"""

from __future__ import annotations

from .config import TrainConfig
from .result import TrainResult

__all__ = ["TrainConfig", "TrainResult", "train"]


def train(config: TrainConfig, resume: bool = False, *, progress: bool = True) -> TrainResult:
    """Run ``config`` to its end: train, evaluate, checkpoint, log, write the report and the trained model.

    Written to ``config.output``: ``config.json``, ``metrics.jsonl``, TensorBoard events, ``checkpoints/``,
    ``summary.json``, ``report.html`` and ``model/``, which ``TrainConfig(model=...)`` and ``AutoModelForCausalLM``
    load. (The tiny model's tokenizer is for ``PreTrainedTokenizerFast``: AutoTokenizer takes Qwen2's own instead.)

    Args:
        config: the run.
        resume: continue from the newest intact checkpoint in ``config.output``, bit for bit as if never interrupted;
            from the beginning where there is none yet.
        progress: show the progress on standard error.

    Raises:
        ValueError: the output directory holds another run (without ``resume``), another run is under way in it, or the
            run that is resumed had other settings, another task file or another tokenizer.
        CheckpointError: every checkpoint is damaged, or the newest was written by a newer version.

    Warns:
        RuntimeWarning: a checkpoint is damaged and the one before it taken; metrics.jsonl was mended; or the run does
            not learn (``TrainResult.notices``).
    """
    from ._lock import OutputLock, is_first_rank

    with OutputLock(config.output, wanted=is_first_rank()) as lock:  # at once: what follows takes seconds to import
        from .run import run

        return run(config, lock, resume=resume, progress=progress)
