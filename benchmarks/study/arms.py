"""What the study runs: for every arm and seed the settings of its stages of training, and a fingerprint of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gac_kernels import DFPO, GIFT, GRPO, GSPO, NLL, SAPO, HybridObjective
from gac_kernels.objectives import GATES, Policy
from gac_kernels.train import TrainConfig
from gac_kernels.train.demo import POOL, warm_config

RECIPE = 1  # raised when a run's meaning changes without its settings
GROUPS = ("controllers", "gates", "dfpo", "gift")
FIXED = (0.1, 0.5, 0.9)
TEMPERATURES = ((1.0, 1.05), (10.0, 12.0))  # SAPO's defaults; the gate study's best (arXiv 2602.19345v2)
BETAS = (20.0, 3.0)  # GIFT's default, and one that leaves the targets a temperature that can be seen
MU = 0.5  # of gates and DFPO: RL alone from so weak a start unlearns the task at several steps a batch
DEFAULT_ARM = "GAC coefficient"  # what the others are compared with


@dataclass(frozen=True)
class Size:
    """Everything that decides how long the study takes. Steps are optimizer steps, a prompt's group is 4 completions.

    seeds, objective_seeds: of the controllers, and of the three smaller groups. warm_steps: supervised steps of the
    start that all arms of a seed share. steps: of the controllers. objective_steps: of gates and DFPO, at ``updates``
    steps a rollout batch. start_steps, rl_steps: GIFT's two stages. probe_every, eval_every: steps between two
    measurements.
    """

    seeds: int = 3
    objective_seeds: int = 3
    hidden: int = 64
    warm_steps: int = 600
    steps: int = 60
    objective_steps: int = 48
    updates: int = 4
    start_steps: int = 40
    rl_steps: int = 40
    prompts: int = 16
    demonstrations: int = 16
    problems: int = 500
    probe_prompts: int = 64
    probe_every: int = 5
    eval_every: int = 20


SMOKE = Size(
    seeds=2, objective_seeds=2, hidden=16, warm_steps=3, steps=4, objective_steps=4, updates=2, start_steps=2,
    rl_steps=2, prompts=2, demonstrations=2, problems=8, probe_prompts=4, probe_every=2, eval_every=2,
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm with one seed: its stages one after the other, each from the model that the one before left.

    Attributes:
        group, arm, seed: its name. stages: settings of :class:`TrainConfig`, all but ``output``, ``model``, ``seed``.
        size: of the study.
    """

    group: str
    arm: str
    seed: int
    stages: tuple[dict[str, Any], ...]
    size: Size

    @property
    def name(self) -> str:
        words = "".join(letter if letter.isalnum() or letter == "." else "-" for letter in f"{self.group} {self.arm}")
        return f"{words.lower()}-seed{self.seed}"

    @property
    def fingerprint(self) -> str:
        """Of everything that decides the numbers but code and machine: defaults of the loop and the start included."""
        start = start_config(Path(), self.seed, self.size).to_dict()
        stages = [self.config(number, Path(), "tiny").to_dict() for number in range(len(self.stages))]
        probe = (self.size.probe_prompts, self.size.probe_every, self.size.eval_every)
        return fingerprint([RECIPE, self.group, self.arm, start, stages, probe])

    def config(self, stage: int, output: Path, model: str) -> TrainConfig:
        settings = {
            "warmup_sft_steps": 0,
            "warmup_sft_lr": 0.0,
            "learning_rate": 8e-4,
            "digits": 2,
            "max_new_tokens": 24,
        }
        settings |= {"eval_size": self.size.problems, "eval_batch": 500, "demonstration_pool": POOL}
        return TrainConfig(output, model=model, seed=self.seed, **(settings | self.stages[stage]))


def fingerprint(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def start_config(output: Path, seed: int, size: Size) -> TrainConfig:
    """The supervised warm start that every arm of a seed begins from: the demo's recipe, narrower."""
    sizes = {"tiny_hidden": size.hidden, "warmup_sft_steps": size.warm_steps, "eval_size": size.problems}
    return replace(warm_config(output, seed), **sizes)  # type: ignore[arg-type]


def plan(size: Size, groups: tuple[str, ...] = GROUPS) -> list[Run]:
    """Every run of these groups: first the controllers, seed by seed, then the rest seed by seed."""
    makers = {"controllers": _controllers, "gates": _gates, "dfpo": _transforms, "gift": _starts}
    parts = [(size.seeds, tuple(g for g in groups if g == "controllers"))]
    parts += [(size.objective_seeds, tuple(g for g in groups if g != "controllers"))]
    return [
        Run(group, arm, seed, stages, size)
        for seeds, part in parts
        for seed in range(seeds)
        for group in part
        for arm, stages in makers[group](size)
    ]


Arms = Iterator[tuple[str, tuple[dict[str, Any], ...]]]


def _controllers(size: Size) -> Arms:
    """One budget for all: the demo's objective (SAPO, NLL with phi) and the same rows a step (HPT routes them)."""
    common: dict[str, Any] = {
        "steps": size.steps, "prompts_per_step": size.prompts, "demonstrations_per_step": size.demonstrations,
    }  # fmt: skip
    for mu in FIXED:
        yield f"fixed {mu}", ({**common, "controller": "fixed", "mu": mu},)
    for name in ("linear", "cosine"):
        yield name, ({**common, "controller": name},)
    yield "KL rule", ({**common, "controller": "kl", "reference": True},)
    for name in ("srft", "hpt"):
        yield name.upper(), ({**common, "controller": name},)
    scaled = TrainConfig(Path("unused"), **common).resolved_controller()
    settings = {
        DEFAULT_ARM: replace(scaled, estimator="coefficient"),
        "GAC logit": replace(scaled, estimator="logit"),
        "GAC hidden": replace(scaled, estimator="hidden"),
        # Its fixed point is 0.990 prior + 0.0099 mu* at the published beta alone, which is therefore not scaled.
        "GAC reference": replace(scaled, estimator="coefficient", smoothing="reference", ema_beta=0.99),
    }
    for arm, config in settings.items():
        yield arm, ({**common, "controller": "gac", "controller_config": config},)


def _fixed(size: Size, policy: Policy, mu: float, steps: int, updates: int) -> dict[str, Any]:
    return {
        "steps": steps, "updates_per_rollout": updates, "objective": HybridObjective(policy), "controller": "fixed",
        "mu": mu, "prompts_per_step": size.prompts, "demonstrations_per_step": size.demonstrations if mu else 0,
    }  # fmt: skip


def _gates(size: Size) -> Arms:
    """Several steps on one rollout batch, for on-policy every ratio is 1 and every gate the same."""
    for tau_pos, tau_neg in TEMPERATURES:
        for gate in GATES:
            policy = SAPO(gate, tau_pos=tau_pos, tau_neg=tau_neg)
            yield f"{gate} ({tau_pos:g}, {tau_neg:g})", (_fixed(size, policy, MU, size.objective_steps, size.updates),)


def _transforms(size: Size) -> Arms:
    policies: dict[str, Policy] = {
        "GRPO": GRPO(), "GSPO": GSPO(), "DFPO min-replace": DFPO("min_replace"),
        "DFPO adv-orthogonal": DFPO("adv_orthogonal"),
    }  # fmt: skip
    for arm, policy in policies.items():
        yield arm, (_fixed(size, policy, MU, size.objective_steps, size.updates),)


def _starts(size: Size) -> Arms:
    """More supervised steps from the shared start, by SFT or by GIFT with that start as base; then RL alone."""
    supervised: dict[str, NLL | GIFT] = {"SFT": NLL("none"), **{f"GIFT beta {beta:g}": GIFT(beta) for beta in BETAS}}
    for arm, term in supervised.items():
        first = {
            "steps": size.start_steps, "objective": HybridObjective(supervised=term), "controller": "fixed", "mu": 1.0,
            "prompts_per_step": 0, "demonstrations_per_step": 2 * size.demonstrations,
            "reference": isinstance(term, GIFT),
        }  # fmt: skip
        yield arm, (first, _fixed(size, SAPO(), 0.0, size.rl_steps, 1))


def describe(size: Size) -> dict[str, Any]:
    """The size as the results hold it."""
    return asdict(size)
