"""One run of the training loop, described completely and checked before anything heavy is loaded."""

from __future__ import annotations

import math
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from ..controller import ControllerConfig, CosinePrior, KLTarget
from ..objectives import CISPO, DFPO, GIFT, GRPO, GSPO, SAPO, HybridObjective, Policy

CONTROLLERS = ("gac", "fixed", "linear", "cosine", "kl", "srft", "hpt")
POLICIES: dict[str, Policy] = {"sapo": SAPO(), "grpo": GRPO(), "cispo": CISPO(), "gspo": GSPO(), "dfpo": DFPO()}
DTYPES = ("float32", "bfloat16", "float64")
# What a resumed run may change: none of these touches a weight. Everything else must be as it was.
RESUME_FREE = ("output", "eval_every", "checkpoint_every", "checkpoint_keep", "device")

# Where a setting is left None: for the tiny model, for a local one.
_BY_MODEL = {"warmup_sft_steps": (300, 0), "warmup_sft_lr": (2e-3, 1e-5), "learning_rate": (5e-4, 1e-6)}
_AT_LEAST = {
    "digits": 2, "tiny_hidden": 8, "tiny_layers": 1, "warmup_sft_steps": 0, "warmup_sft_batch": 1, "steps": 0,
    "prompts_per_step": 0, "group_size": 1, "demonstrations_per_step": 0, "micro_batches": 1, "updates_per_rollout": 1,
    "lr_warmup": 0, "max_new_tokens": 1, "eval_every": 0, "eval_batch": 1, "checkpoint_every": 0,
    "checkpoint_keep": 1, "seed": 0,
}  # fmt: skip
_RANGES = {
    "mu": (0.0, 1.0), "lr_final": (0.0, 1.0), "hpt_gamma": (0.0, 1.0), "warmup_sft_lr": (0.0, math.inf),
    "learning_rate": (0.0, math.inf), "weight_decay": (0.0, math.inf), "clip_norm": (1e-12, math.inf),
    "temperature": (1e-3, math.inf),
}  # fmt: skip


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a run; two runs of one config on one machine give the same weights bit for bit.

    Attributes:
        output: directory of checkpoints, metrics.jsonl, TensorBoard events, report and the trained model.
        model: ``"tiny"`` (a Qwen2 built here, characters as tokens) or a local model directory.
        task: ``"arithmetic"`` or a ``.jsonl`` file with ``prompt``, ``answer``, optional ``demonstration``.
        digits: digits of a number of the arithmetic task.
        demonstration_pool: how many distinct demonstrations exist; None: all that the file has (128 for arithmetic).
        tiny_hidden, tiny_layers: width and layers of the tiny model.
        objective: the hybrid objective. GIFT's base is the model that the run proper starts from (``reference``).
        controller: what sets mu, see ``mixing``: gac, fixed, linear, cosine, kl, srft, hpt.
        mu: the weight of ``fixed``.
        controller_config: settings of ``gac``; None: the paper's, with every time constant scaled to the horizon.
        mixing_horizon: steps over which a schedule runs its course; None: ``min(steps, 1000)``.
        hpt_gamma: ``hpt`` keeps a prompt on RL while its pass rate is above this.
        warmup_sft_steps, warmup_sft_batch, warmup_sft_lr: supervised steps before the run proper (plain NLL), their
            demonstrations a step and their learning rate; a model without any reward cannot start otherwise. None:
            300 steps at 2e-3 for the tiny model; none (or at 1e-5) for a local one.
        steps: optimizer steps of the run proper.
        prompts_per_step, group_size: prompts of a rollout batch and completions a prompt. ``prompts_per_step=0``
            trains on demonstrations alone (needs ``controller="fixed", mu=1.0``).
        demonstrations_per_step: demonstrations in every rollout batch; 0 trains on rollouts alone (needs ``mu=0.0``).
        micro_batches: passes whose gradients add up to one step; each holds whole groups.
        updates_per_rollout: optimizer steps on one rollout batch; above 1, importance ratios leave 1.
        advantage_baseline, advantage_scale: see :func:`gac_kernels.group_advantages`.
        learning_rate, lr_warmup, lr_final: AdamW's rate rises over ``lr_warmup`` steps to its peak (None: 5e-4 for the
            tiny model, 1e-6 for a local one) and falls by half a cosine to ``lr_final`` times the peak. The warm start
            rises to ``warmup_sft_lr`` and stays there.
        weight_decay, clip_norm: of AdamW, and the bound on the gradient's norm.
        max_new_tokens: length limit of a completion; every demonstration must fit in it.
        temperature: of the rollouts and of their log-probs. Demonstrations are scored at 1.
        reference: keep a frozen copy of the model the run proper starts from; the KL is measured against it.
        eval_size, eval_every: held-out problems (None: 256, of a file at most a fifth) and the steps
            between evaluations (0: only before and after).
        eval_batch: problems decoded at once.
        checkpoint_every, checkpoint_keep: steps between checkpoints (0: only the last) and how many are kept.
        seed: of weights, data order and sampling.
        dtype: ``"float32"`` or ``"float64"``, of everything; or ``"bfloat16"``, mixed precision: autocast computes
            products in bfloat16, while the weights, their gradients, AdamW's state, checkpoints and the exported model
            stay float32. (Updates of 1e-6 are below half the spacing of bfloat16 weights: most would be lost.)
        device: where everything runs.
        head: ``"auto"`` makes the loss from the last hidden states, without the whole batch's logits, where the model's
            head is understood, else from its logits; ``"logits"`` always from these.
        fsdp: spread the weights over ranks with FSDP2; otherwise several ranks train under DDP.

    Counts (prompts, demonstrations) are those of all ranks together.
    """

    output: Path
    model: str = "tiny"
    task: str = "arithmetic"
    digits: int = 2
    demonstration_pool: int | None = None
    tiny_hidden: int = 128
    tiny_layers: int = 2
    objective: HybridObjective = field(default_factory=HybridObjective)
    controller: str = "gac"
    mu: float = 0.5
    controller_config: ControllerConfig | None = None
    mixing_horizon: int | None = None
    hpt_gamma: float = 0.0
    warmup_sft_steps: int = None  # type: ignore[assignment]  # never None once built, see _BY_MODEL
    warmup_sft_batch: int = 32
    warmup_sft_lr: float = None  # type: ignore[assignment]
    steps: int = 150
    prompts_per_step: int = 32
    group_size: int = 4
    demonstrations_per_step: int = 16
    micro_batches: int = 1
    updates_per_rollout: int = 1
    advantage_baseline: str = "mean"
    advantage_scale: str = "group"
    learning_rate: float = None  # type: ignore[assignment]
    lr_warmup: int = 10
    lr_final: float = 0.1
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    max_new_tokens: int = 48
    temperature: float = 1.0
    reference: bool = False
    eval_size: int | None = None
    eval_every: int = 0
    eval_batch: int = 256
    checkpoint_every: int = 50
    checkpoint_keep: int = 2
    seed: int = 0
    dtype: str = "float32"
    device: str = "cpu"
    head: str = "auto"
    fsdp: bool = False

    def __post_init__(self) -> None:
        for name, kinds in (
            ("output", (str, Path)),
            ("model", (str, Path)),
            ("task", str),
            ("device", (str, torch.device)),
        ):
            if not isinstance(getattr(self, name), kinds):
                raise TypeError(f"{name} must be a string, got {type(getattr(self, name)).__name__}")
        object.__setattr__(self, "output", Path(self.output))
        for name, (tiny, local) in _BY_MODEL.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, tiny if self.model == "tiny" else local)
        self._check_numbers()
        self._check_choices()
        self._check_sources()
        self._check_branches()

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, warm start included."""
        return self.warmup_sft_steps + self.steps

    @property
    def horizon(self) -> int:
        """Steps over which the mixing schedules run their course."""
        return self.mixing_horizon or max(1, min(self.steps, 1000))

    def resolved_controller(self) -> ControllerConfig:
        """The settings of ``gac``: the user's, or the paper's scaled from 1,000 steps to the horizon.

        Scaled are the prior's two phases, the EMA's memory, the cap on mu's change and the refresh interval, so that a
        short run passes through the same course of mu; at a horizon of 1,000 they are the paper's own.
        """
        if self.controller_config is not None:
            return self.controller_config
        paper, pace = ControllerConfig(), 1000 / self.horizon
        warmup = round(200 / pace)
        return replace(
            paper,
            ema_beta=paper.ema_beta**pace,
            update_every=max(1, round(paper.update_every / pace)),
            change_cap=min(1.0, paper.change_cap * pace),
            prior=CosinePrior(warmup=warmup, decay=max(1, self.horizon - warmup), peak=0.85, valley=0.15),
        )

    @property
    def weights_dtype(self) -> torch.dtype:
        """Of the weights, their gradients and the optimizer's state."""
        return torch.float32 if self.dtype == "bfloat16" else getattr(torch, self.dtype)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Of the products where that is not the weights'; else None."""
        return torch.bfloat16 if self.dtype == "bfloat16" else None

    def check_ranks(self, size: int) -> None:
        """Raise ValueError where the run cannot be shared by ``size`` ranks: each needs rows in every step."""
        if size == 1:
            return
        rows = [("warmup_sft_batch", self.warmup_sft_batch)] if self.warmup_sft_steps else []
        if self.steps:
            name = "prompts_per_step" if self.prompts_per_step else "demonstrations_per_step"
            rows.append((name, getattr(self, name)))
        for name, count in rows:
            if count < size:
                raise ValueError(f"{name} must be >= {size}, the number of ranks, got {count}")
        if self.advantage_scale == "batch":
            raise ValueError("advantage_scale='batch' is not supported with several ranks: each sees its own rewards")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for config.json; the objective and controller settings as their ``repr``."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    def check_resumable(self, saved: dict[str, Any]) -> None:
        """Raise ValueError naming every setting that differs from the run that wrote the checkpoint."""
        own = self.to_dict()
        differing = [
            f"{name}: {saved.get(name)!r} -> {own[name]!r}"
            for name in own
            if name not in RESUME_FREE and saved.get(name) != own[name]
        ]
        if differing:
            raise ValueError(f"resume needs the settings of the run it continues; these differ: {'; '.join(differing)}")

    def _check_numbers(self) -> None:
        for name, least in _AT_LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be an int, got {type(value).__name__}")
            if value < least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        for name in ("mixing_horizon", "demonstration_pool", "eval_size"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be None or an int >= 1, got {value!r}")
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"{name} must be a number, got {type(value).__name__}")
            if not low <= value <= min(high, sys.float_info.max):
                raise ValueError(f"{name} must be finite and in [{low:g}, {high:g}], got {value!r}")
        if self.total_steps == 0:
            raise ValueError("steps and warmup_sft_steps must not both be 0")
        if self.tiny_hidden % 8:
            raise ValueError(f"tiny_hidden must be a multiple of 8 (4 heads of even width), got {self.tiny_hidden}")

    def _check_choices(self) -> None:
        if self.dtype == "float16":
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}; got 'float16', which needs a loss scale, and this loop has "
                "none: take 'bfloat16'"
            )
        for name, allowed in (
            ("controller", CONTROLLERS),
            ("dtype", DTYPES),
            ("head", ("auto", "logits")),
            ("advantage_baseline", ("mean", "leave_one_out")),
            ("advantage_scale", ("group", "batch", "none")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}")
        for name, kind in (("objective", HybridObjective), ("reference", bool), ("fsdp", bool)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if not isinstance(self.controller_config, (ControllerConfig, type(None))):
            raise TypeError(
                f"controller_config must be a ControllerConfig, got {type(self.controller_config).__name__}"
            )
        torch.device(self.device)  # raises a RuntimeError that names the device

    def _check_sources(self) -> None:
        if self.model != "tiny" and not Path(self.model).is_dir():
            raise ValueError(f"model must be 'tiny' or a local model directory, got {self.model!r}")
        if self.task != "arithmetic":
            if not self.task.endswith(".jsonl"):
                raise ValueError(f"task must be 'arithmetic' or a path to a .jsonl file, got {self.task!r}")
            if not Path(self.task).is_file():
                raise ValueError(f"task: there is no file {self.task!r}")

    def _check_branches(self) -> None:
        if self.prompts_per_step % self.micro_batches:
            raise ValueError(
                f"micro_batches must divide prompts_per_step = {self.prompts_per_step}, got {self.micro_batches}"
            )
        if self.steps and self.prompts_per_step == 0 and (self.controller, self.mu) != ("fixed", 1.0):
            raise ValueError(
                f"prompts_per_step=0 needs controller='fixed' and mu=1.0, got {self.controller!r}, {self.mu}"
            )
        if self.steps and self.demonstrations_per_step == 0 and (self.controller, self.mu) != ("fixed", 0.0):
            raise ValueError(
                f"demonstrations_per_step=0 needs controller='fixed' and mu=0.0, got {self.controller!r}, {self.mu}"
            )
        learns = self.steps and self.prompts_per_step and (self.controller, self.mu) != ("fixed", 1.0)
        if learns and self.group_size == 1 and self.controller != "hpt":  # which asks for the reward alone
            raise ValueError(
                "group_size must be >= 2 to learn from rewards, got 1: a completion's advantage is its reward less the "
                "mean of its group, which is 0 for one alone. Try 4 or more; or, to train on demonstrations alone, "
                "controller='fixed' and mu=1.0"
            )
        if self.steps and 0 < self.demonstrations_per_step < self.micro_batches:
            raise ValueError(
                f"demonstrations_per_step must be 0 or >= micro_batches = {self.micro_batches}, "
                f"got {self.demonstrations_per_step}"
            )
        self._check_reference()

    def _check_reference(self) -> None:
        alpha = None if self.controller_config is None else self.controller_config.alpha
        if not self.reference and (
            self.controller == "kl" or isinstance(alpha, KLTarget) or self.objective.kl_coef > 0
        ):
            raise ValueError(
                "reference must be True where a KL is used (controller='kl', alpha=KLTarget or kl_coef > 0)"
            )
        if not self.reference and isinstance(self.objective.supervised, GIFT):
            raise ValueError("reference must be True for GIFT, which compares with the model that the run starts from")


def _plain(value: object) -> Any:
    if value is None or isinstance(value, (int, float, str)):
        return value
    # A gate of the user's own shows its functions by address, which is another one in every process.
    return re.sub(" at 0x[0-9a-f]+", "", str(value))
