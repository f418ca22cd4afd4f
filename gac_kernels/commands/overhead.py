"""Measure the share of a training step that the controller and its signals take, and hold it against a bound.

A step is forward, hybrid loss, backward, clipping and AdamW of one batch on a warm heap; rollouts are left out, since
they only make the step longer. Steps with the controller and at a fixed mu take turns on the same weights.

controller_share is the sum of two medians over the median of the steps at a fixed mu:
  1. the time inside observe() and step(). Steps that refresh the estimates cost more; both kinds are sampled alike and
     weighted as often as they occur, 1 in --update-every;
  2. the signals by a pass of their own over the log-probs. The fused loss yields them as by-products of the pass that
     it makes anyway, so this is more than they cost there: an upper bound.
Not in it: entropy and sum p^2, which the pass over the logits yields whether or not a controller runs.

paired_share is the other view, the difference between a step with and a step without, round by round (median of each
kind, weighted likewise), with a 95 % bootstrap interval: the noise of whole steps, mostly wider than the effect.

The verdict is ok where controller_share is below --bound, unless the paired difference is above it beyond doubt: with
99.9 % (one-sided), for a measurement of noise must not fail one time in forty.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..bench.measure import Timing
    from .workloads import ControllerTime, Shape

HELP = "share of a training step that the controller and its signals take"
# Nothing is fetched, whatever a model directory or transformers would ask a hub for.
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "NO"}
RESAMPLES = 2000
MIN_ROUNDS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="tiny", help="tiny (the demo's), qwen2-0.5b-head or a local model directory (default: tiny)"
    )
    parser.add_argument("--bound", type=float, default=0.01, help="largest share that is ok (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=30.0, help="to spend on the steps (default: %(default)s)")
    parser.add_argument("--update-every", type=int, help="steps from refresh to refresh; default: 2 for tiny, else 10")
    parser.add_argument("--rollouts", type=int, help="sequences of the RL branch; default: the model's own workload")
    parser.add_argument("--demonstrations", type=int, help="sequences of the expert branch; likewise")
    parser.add_argument("--prompt", type=int, help="prompt tokens a sequence; likewise")
    parser.add_argument("--response", type=int, help="response places a sequence; likewise")
    parser.add_argument("--threads", type=int, help="CPU threads; default: PyTorch's own")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")


@dataclass(frozen=True)
class Overhead:
    """What was measured; seconds are medians. The first four fields are those of the contract."""

    controller_share: float
    step_seconds: float
    bound: float
    ok: bool
    plain_seconds: float
    refresh_seconds: float
    signals_seconds: float
    paired_share: float
    paired_low: float
    paired_high: float
    paired_at_least: float
    rounds: int
    update_every: int
    model: str
    device: str


def run(args: argparse.Namespace, console: Console) -> int:
    for name in ("update_every", "rollouts", "demonstrations", "prompt", "response", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if not 0.0 <= args.seconds < float("inf"):
        raise ValueError(f"--seconds must be finite and at least 0, got {args.seconds}")
    from ..train._extras import require

    require("transformers", package="transformers", purpose="gac-kernels overhead")
    import torch

    from ..bench.measure import conditions, keep_heap_warm
    from .devices import pick_device

    device = pick_device(args.device)
    threads = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        where = conditions(device, keep_heap_warm() if device == "cpu" else "")
        measured, shape = _measure(args, device, console)
    finally:
        torch.set_num_threads(threads)
    _tell(console, measured, shape, where)
    console.result(asdict(measured))
    return 0 if measured.ok else 1


def _measure(args: argparse.Namespace, device: str, console: Console) -> tuple[Overhead, Shape]:
    from ..bench.measure import Contestant, device_name, measure
    from .workloads import Workload, check_fits, defaults, load_model, random_batch

    shape, update_every = defaults(args.model)
    update_every = args.update_every or update_every
    given = {
        "rollouts": args.rollouts,
        "demonstrations": args.demonstrations,
        "prompt": args.prompt,
        "response": args.response,
    }
    shape = type(shape)(**(asdict(shape) | {name: value for name, value in given.items() if value is not None}))
    with console.progress("overhead") as progress:
        model = load_model(args.model, args.seed, device)
        vocabulary = check_fits(model, shape)
        workload = Workload(model, *random_batch(shape, vocabulary, args.seed, device), min(update_every, 2))
        timings = measure(
            [
                Contestant("without", workload.step_without),
                Contestant("with", workload.step_with),
                Contestant("signals", workload.signals),
            ],
            device=device,
            budget_seconds=args.seconds,
            min_rounds=MIN_ROUNDS,
            warmup_rounds=2,
            seed=args.seed,
            progress=progress,
        )
    return _conclude(args, update_every, workload.times, timings, device_name(device)), shape


def _conclude(
    args: argparse.Namespace, update_every: int, times: list[ControllerTime], timings: dict[str, Timing], device: str
) -> Overhead:
    without, signals = timings["without"], timings["signals"].p50
    rounds = len(without.seconds)
    times = times[-rounds:]  # without those of the warm-up
    differences = [on - off for on, off in zip(timings["with"].seconds, without.seconds, strict=True)]
    plain, refresh = _by_kind([t.seconds for t in times], times)
    share_of_refresh = 1.0 / update_every
    controller = _weighted([t.seconds for t in times], times, share_of_refresh)
    paired = _weighted(differences, times, share_of_refresh)
    at_least, low, high = _bootstrap(differences, times, share_of_refresh, args.seed)
    step = without.p50
    share = (controller + signals) / step
    return Overhead(
        controller_share=share,
        step_seconds=step,
        bound=args.bound,
        ok=share < args.bound and at_least / step <= args.bound,
        plain_seconds=_median(plain),
        refresh_seconds=_median(refresh),
        signals_seconds=signals,
        paired_share=paired / step,
        paired_low=low / step,
        paired_high=high / step,
        paired_at_least=at_least / step,
        rounds=rounds,
        update_every=update_every,
        model=args.model,
        device=device,
    )


def _median(values: Sequence[float]) -> float:
    """nan without values: with ``--update-every 1`` no step is plain."""
    from ..bench.measure import quantile

    return quantile(values, 0.5) if values else float("nan")


def _by_kind(values: Sequence[float], times: Sequence[ControllerTime]) -> tuple[list[float], list[float]]:
    """The values of the plain steps and those of the refreshing ones."""
    pairs = list(zip(values, times, strict=True))
    return [v for v, t in pairs if not t.refresh], [v for v, t in pairs if t.refresh]


def _weighted(values: Sequence[float], times: Sequence[ControllerTime], share_of_refresh: float) -> float:
    """Median of each kind of step, weighted as often as it occurs; a kind without samples counts as the other."""
    plain, refresh = _by_kind(values, times)
    plain_median, refresh_median = _median(plain or refresh), _median(refresh or plain)
    return (1.0 - share_of_refresh) * plain_median + share_of_refresh * refresh_median


def _bootstrap(
    values: Sequence[float], times: Sequence[ControllerTime], share_of_refresh: float, seed: int
) -> tuple[float, float, float]:
    """Of :func:`_weighted` over resampled rounds: the one-sided 99.9 % lower end and the 95 % interval."""
    from ..bench.measure import quantile

    draw, places = random.Random(seed), range(len(values))
    estimates = []
    for _ in range(RESAMPLES):
        picked = draw.choices(places, k=len(values))
        estimates.append(_weighted([values[i] for i in picked], [times[i] for i in picked], share_of_refresh))
    at_least, low, high = (quantile(estimates, share) for share in (0.001, 0.025, 0.975))
    return at_least, low, high


def _tell(console: Console, found: Overhead, shape: Shape, where: str) -> None:
    console.text(where)
    title = (
        f"{found.model}: {shape.rollouts} rollouts + {shape.demonstrations} demonstrations of {shape.prompt} + "
        f"{shape.response} tokens, {found.rounds} rounds"
    )

    def line(what: str, seconds: float) -> tuple[str, str, str]:
        return what, f"{seconds * 1e3:.3f}", f"{seconds / found.step_seconds:.3%}"

    rows = [line("step at a fixed mu", found.step_seconds), line("observe + step, plain", found.plain_seconds)]
    rows.append(line(f"observe + step, refresh (1 in {found.update_every})", found.refresh_seconds))
    rows.append(line("signals by a pass of their own (upper bound)", found.signals_seconds))
    rows.append(
        ("with - without, paired", f"{found.paired_share * found.step_seconds * 1e3:.3f}", f"{found.paired_share:.3%}")
    )
    rows.append(("  95 % interval", "", f"{found.paired_low:.3%} to {found.paired_high:.3%}"))
    console.table(title, ("", "ms", "of a step"), rows)
    verdict = "ok" if found.ok else "NOT ok"
    console.text(f"controller's share of a step: {found.controller_share:.3%}, bound {found.bound:.2%}: {verdict}")
