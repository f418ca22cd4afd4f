"""Train a causal language model on demonstrations and on rollouts with a verifiable reward, mixed by a controller.

The model is the built-in tiny Qwen2 or a local Hugging Face directory; the task is built-in addition or a JSONL file
whose lines hold "prompt", "answer" and, optionally, "demonstration". The output directory receives metrics.jsonl,
TensorBoard events, checkpoints, report.html and the trained model. A run that was interrupted goes on with --resume and
the same options, bit for bit. Under torchrun the ranks share every step's prompts and demonstrations.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from ..objectives import HybridObjective

HELP = "train: the thin loop from prompts to the optimizer step"
# Spinning threads make a step many times as long beside other work. Nothing is fetched, whatever a model directory or
# transformers would ask a hub for.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}
CONTROLLERS = ("gac", "fixed", "linear", "cosine", "kl", "srft", "hpt")
OBJECTIVES = ("sapo", "grpo", "dapo", "dr-grpo", "cispo", "gspo", "dfpo")

# Settings of TrainConfig that are options as they are: name, type, its default in words, what it is.
SETTINGS: tuple[tuple[str, type, str, str], ...] = (
    ("steps", int, "150", "optimizer steps after the warm start"),
    ("prompts_per_step", int, "32", "prompts of a rollout batch"),
    ("group_size", int, "4", "completions a prompt"),
    ("demonstrations_per_step", int, "16", "demonstrations in a rollout batch"),
    ("micro_batches", int, "1", "passes whose gradients make one step"),
    ("updates_per_rollout", int, "1", "optimizer steps on one rollout batch"),
    ("warmup_sft_steps", int, "300 of the tiny model, none of another", "supervised steps before the run proper"),
    ("warmup_sft_batch", int, "32", "demonstrations a step of them"),
    ("learning_rate", float, "5e-4 of the tiny model, 1e-6 of another", "peak, of AdamW"),
    ("max_new_tokens", int, "48", "length limit of a completion"),
    ("temperature", float, "1", "of the rollouts"),
    ("mu", float, "0.5", "weight of the demonstrations, for --controller fixed"),
    ("digits", int, "2", "of the arithmetic task"),
    ("demonstration_pool", int, "all of a file, 128 of arithmetic", "how many distinct demonstrations there are"),
    ("tiny_hidden", int, "128", "width of the tiny model"),
    ("tiny_layers", int, "2", "its layers"),
    ("eval_size", int, "256, at most a fifth of a file", "held-out problems"),
    ("eval_every", int, "0", "steps between evaluations, 0: before and after only"),
    ("checkpoint_every", int, "50", "steps between checkpoints, 0: only at the end"),
    ("dtype", str, "float32", "float32; bfloat16: products by autocast, weights float32; float64"),
    ("device", str, "cpu", "where everything runs"),
    ("head", str, "auto", "auto: the loss from hidden states where the head is understood; logits: from logits"),
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
    parser.add_argument(
        "--estimator", choices=("coefficient", "logit", "hidden"), help="of --controller gac (default: coefficient)"
    )
    settings = parser.add_argument_group("settings of the loop")
    for name, kind, default, what in SETTINGS:
        settings.add_argument(_option(name), type=kind, help=f"{what} (default: {default})")


def run(args: argparse.Namespace, console: Console) -> int:
    from ..train import TrainConfig, train
    from ..train._extras import require
    from ..train.checkpoint import CheckpointError
    from .devices import pick_device

    require("transformers", package="transformers", purpose="gac-kernels train")
    if args.device is not None:
        pick_device(args.device)
    given: dict[str, Any] = {name: value for name, *_ in SETTINGS if (value := getattr(args, name)) is not None}
    for name, controller in (("mu", "fixed"), ("estimator", "gac")):
        if getattr(args, name) is not None and args.controller != controller:
            raise ValueError(f"--{name} is a setting of --controller {controller}, got --controller {args.controller}")
    if args.objective == "dr-grpo":
        given["advantage_scale"] = "none"
    first = int(os.environ.get("RANK", "0")) == 0  # one voice under torchrun
    try:
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
        if args.estimator is not None:
            settings = replace(config.resolved_controller(), estimator=args.estimator)
            config = replace(config, controller_config=settings)
        if first and args.resume and not (config.output / "checkpoints").exists():
            console.remark(f"nothing to resume in {config.output}: a new run begins")
        finished = args.resume and (config.output / "summary.json").exists()
        with _warnings_as_remarks(console):
            result = train(config, resume=args.resume)
    except (ValueError, CheckpointError) as error:  # a damaged checkpoint is one of what --output names
        raise ValueError(_in_options(str(error))) from error
    if not first:
        return 0
    if finished:
        console.remark(f"{config.output} was finished before: this is its result")
    rows = [
        ("accuracy before", f"{result.accuracy_before:.1%}"),
        ("accuracy after", f"{result.accuracy_after:.1%}"),
        ("mu after the last step", f"{result.mu:.3f}"),
        ("steps, after the warm start's", f"{result.steps}, {config.warmup_sft_steps}"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    console.table(f"{config.task} with {args.objective}, mixed by {args.controller}", ("", "value"), rows)
    console.text(f"report: {result.output / 'report.html'}")
    console.result(result.to_dict())
    return 0


@contextmanager
def _warnings_as_remarks(console: Console) -> Iterator[None]:
    """What the run has to say, in a line each; other packages' warnings as ever."""
    with warnings.catch_warnings():
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *rest: Any) -> None:
            if category is RuntimeWarning:
                console.remark(f"warning: {_in_options(' '.join(str(message).split()))}")
            else:
                others(message, category, *rest)

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _in_options(text: str) -> str:
    """An error of the loop's with its settings named as the command line does."""
    for name, *_ in SETTINGS:
        text = re.sub(rf"\b{name}(?== | must\b)" if "_" not in name else rf"\b{name}\b", _option(name), text)
    return text.replace("resume=True", "--resume")


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
