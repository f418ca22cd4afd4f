"""Train a causal language model on demonstrations and on rollouts with a verifiable reward, mixed by a controller.

The model is the built-in tiny Qwen2 or a local Hugging Face directory; the task is built-in addition or a JSONL file
whose lines hold "prompt", "answer" and, optionally, "demonstration". The output directory receives metrics.jsonl,
TensorBoard events, checkpoints, report.html and the trained model. A run that was interrupted goes on with --resume and
the same options, bit for bit. Under torchrun the ranks share every step's prompts and demonstrations.
"""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from ..objectives import HybridObjective

HELP = "train: the thin loop from prompts to the optimizer step"
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}  # spinning threads make a step many times as long beside other work
CONTROLLERS = ("gac", "fixed", "linear", "cosine", "kl", "srft", "hpt")
OBJECTIVES = ("sapo", "grpo", "dapo", "dr-grpo", "cispo", "gspo", "dfpo")

# Settings of TrainConfig that are options as they are: (name, type, what it is). None is the config's own default.
SETTINGS: tuple[tuple[str, type, str], ...] = (
    ("steps", int, "optimizer steps after the warm start"),
    ("prompts_per_step", int, "prompts of a rollout batch"),
    ("group_size", int, "completions a prompt"),
    ("demonstrations_per_step", int, "demonstrations in a rollout batch"),
    ("micro_batches", int, "passes whose gradients make one step"),
    ("updates_per_rollout", int, "optimizer steps on one rollout batch"),
    ("warmup_sft_steps", int, "supervised steps before the run proper"),
    ("warmup_sft_batch", int, "demonstrations a step of them"),
    ("learning_rate", float, "peak, of AdamW"),
    ("max_new_tokens", int, "length limit of a completion"),
    ("temperature", float, "of the rollouts"),
    ("mu", float, "weight of the demonstrations, for --controller fixed"),
    ("digits", int, "of the arithmetic task"),
    ("demonstration_pool", int, "how many distinct demonstrations there are"),
    ("tiny_hidden", int, "width of the tiny model"),
    ("tiny_layers", int, "its layers"),
    ("eval_size", int, "held-out problems"),
    ("eval_every", int, "steps between evaluations, 0: before and after only"),
    ("checkpoint_every", int, "steps between checkpoints, 0: only at the end"),
    ("dtype", str, "of the weights: float32, bfloat16 or float64"),
    ("device", str, "where everything runs"),
    ("head", str, "auto: the loss from hidden states where the model's head is understood; logits: from its logits"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="tiny", metavar="DIR|tiny", help="default: tiny")
    parser.add_argument("--task", default="arithmetic", metavar="arithmetic|FILE.jsonl", help="default: arithmetic")
    parser.add_argument(
        "--objective", choices=OBJECTIVES, default="sapo", help="of the rollouts (default: %(default)s)"
    )
    parser.add_argument(
        "--supervised", choices=("phi", "none"), default="phi", help="token weight of the demonstrations"
    )
    parser.add_argument("--controller", choices=CONTROLLERS, default="gac", help="what sets mu (default: %(default)s)")
    parser.add_argument("--output", default="runs/train", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--resume", action="store_true", help="go on from the newest intact checkpoint in --output")
    parser.add_argument(
        "--reference", action="store_true", help="keep a frozen copy of the model and measure the KL to it"
    )
    parser.add_argument("--kl-coef", type=float, default=0.0, help="weight of the KL penalty; brings --reference")
    parser.add_argument("--entropy-coef", type=float, default=0.0, help="weight of the entropy bonus")
    parser.add_argument("--fsdp", action="store_true", help="under torchrun: spread the weights over the ranks (FSDP2)")
    settings = parser.add_argument_group("settings of the loop; default: gac_kernels.train.TrainConfig's")
    for name, kind, what in SETTINGS:
        settings.add_argument(f"--{name.replace('_', '-')}", type=kind, help=what)


def run(args: argparse.Namespace, console: Console) -> int:
    from ..train import TrainConfig, train
    from ..train._extras import require
    from ..train.checkpoint import CheckpointError
    from .devices import pick_device

    require("transformers", package="transformers", purpose="gac-kernels train")
    if args.device is not None:
        pick_device(args.device)
    given: dict[str, Any] = {name: getattr(args, name) for name, _, _ in SETTINGS if getattr(args, name) is not None}
    if args.objective == "dr-grpo":
        given["advantage_scale"] = "none"
    config = TrainConfig(
        output=args.output,
        model=args.model,
        task=args.task,
        objective=objective(args),
        controller=args.controller,
        reference=args.reference or args.kl_coef > 0 or args.controller == "kl",
        seed=args.seed,
        fsdp=args.fsdp,
        **given,
    )
    try:
        result = train(config, resume=args.resume)
    except CheckpointError as error:  # of what --output names
        raise ValueError(str(error)) from error
    if int(os.environ.get("RANK", "0")) != 0:  # one voice under torchrun
        return 0
    rows = [
        ("accuracy before", f"{result.accuracy_before:.1%}"),
        ("accuracy after", f"{result.accuracy_after:.1%}"),
        ("mu", f"{result.mu:.3f}"),
        ("steps", str(result.steps)),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    console.table(f"{config.task} with {args.objective}, mixed by {args.controller}", ("", "value"), rows)
    console.text(f"report: {result.output / 'report.html'}")
    console.result(result.to_dict())
    return 0


def objective(args: argparse.Namespace) -> HybridObjective:
    """The hybrid objective that ``--objective`` names; DAPO and Dr. GRPO are GRPO with another clip and aggregation."""
    from ..objectives import CISPO, DFPO, GRPO, GSPO, NLL, SAPO, HybridObjective, Policy

    mean = "seq-mean-token-mean"
    policies: dict[str, tuple[Policy, str]] = {
        "sapo": (SAPO(), mean),
        "grpo": (GRPO(), mean),
        "dapo": (GRPO(clip_high=0.28), "token-mean"),
        "dr-grpo": (GRPO(), "seq-mean-token-sum-norm"),
        "cispo": (CISPO(), "token-mean"),
        "gspo": (GSPO(), mean),
        "dfpo": (DFPO(), mean),
    }
    policy, aggregation = policies[args.objective]
    norm_length = (args.max_new_tokens or _default_length()) if args.objective == "dr-grpo" else None
    return HybridObjective(
        policy,
        NLL(args.supervised),
        kl_coef=args.kl_coef,
        entropy_coef=args.entropy_coef,
        aggregation=aggregation,
        norm_length=norm_length,
    )


def _default_length() -> int:
    from ..train import TrainConfig

    return TrainConfig.max_new_tokens
