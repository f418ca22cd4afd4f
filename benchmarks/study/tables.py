"""The tables of the study, from its collected results alone.

Every interval is a 95 % t interval over seeds (n - 1 degrees of freedom): ``mean ± half width``. Comparisons are
paired by seed, since all arms of a seed share their start, data order and held-out problems.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from .arms import DEFAULT_ARM, MU

LARGE_STEPS = (0.01, 0.05)  # of mu; the first is the controller's own cap a step at its published pace
# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; the normal's beyond.
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

Run = dict[str, Any]
Arms = dict[str, dict[int, Run]]  # arm -> seed -> run


# Numbers of one run ---------------------------------------------------------------------------------------------------


def accuracy(run: Run, stage: int = -1) -> float:
    """Held-out accuracy at the end of a stage, in [0, 1]."""
    return float(run["stages"][stage]["accuracy"][-1][1])


def gain(run: Run) -> float:
    """Change of the accuracy over the whole run; seeds differ most in where they start."""
    return accuracy(run) - float(run["stages"][0]["accuracy"][0][1])


def kl_area(run: Run, stage: int = -1) -> float:
    """Integral over optimizer steps (trapezoids) of the probe's KL to the start policy, nats a token times steps."""
    points = run["stages"][stage]["probe"]
    return math.fsum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(points))


def probe_entropy(run: Run, stage: int = -1) -> float:
    """Entropy on the probe's tokens at the end of a stage, nats a token."""
    return float(run["stages"][stage]["probe"][-1][2])


def large_steps(run: Run, threshold: float) -> float:
    """Share of the moves of mu from one step to the next that are larger than ``threshold``."""
    mu = run["stages"][-1]["steps"]["mu"]
    return sum(abs(b - a) > threshold for a, b in pairwise(mu)) / max(1, len(mu) - 1)


def tail(run: Run, name: str, share: float = 0.1, stage: int = -1) -> float:
    """Mean of a logged value over the last ``share`` of the steps."""
    values = run["stages"][stage]["steps"][name]
    last = values[-max(1, round(share * len(values))) :]
    return math.fsum(last) / len(last)


def off_policy(run: Run, name: str, updates: int) -> float:
    """Mean of a logged value over the steps that are not the first on their rollout batch (there, ratios are 1)."""
    values = [v for step, v in enumerate(run["stages"][-1]["steps"][name]) if step % updates]
    return math.fsum(values) / len(values)


def step_milliseconds(run: Run) -> float:
    """CPU time of an optimizer step, rollouts included."""
    stage = run["stages"][-1]
    return 1e3 * float(stage["cpu_seconds"]) / len(stage["steps"]["mu"])


# Statistics -----------------------------------------------------------------------------------------------------------


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % t interval (nan for one value)."""
    n = len(values)
    mean = math.fsum(values) / n
    if n == 1:
        return mean, math.nan
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    quantile = T975[n - 2] if n - 2 < len(T975) else 1.96
    return mean, quantile * math.sqrt(variance / n)


def paired(ours: dict[int, Run], theirs: dict[int, Run], value: Callable[[Run], float]) -> tuple[float, float]:
    """:func:`interval` of ``value(ours) - value(theirs)`` over the seeds of both."""
    return interval([value(ours[seed]) - value(theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())])


def by_arm(results: dict[str, Any], group: str) -> Arms:
    """The runs of a group, arms in the order of the results."""
    arms: Arms = {}
    for run in results["runs"]:
        if run["group"] == group:
            arms.setdefault(run["arm"], {})[run["seed"]] = run
    return arms


# Markdown -------------------------------------------------------------------------------------------------------------


def write_tables(results: dict[str, Any], docs: Path) -> Path:
    """``docs/tables.md``: every table there are results for."""
    parts = ["# Tables of the study", _head(results)]
    for group, make in (("controllers", _controllers), ("gates", _gates), ("dfpo", _transforms), ("gift", _starts)):
        if arms := by_arm(results, group):
            parts.append(make(arms, results["size"]))
    path = docs / "tables.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return path


def _head(results: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    size = ", ".join(f"{name} {value}" for name, value in results["size"].items())
    return (
        "Written by `python benchmarks/study.py` from `results.json`; do not edit. `mean ± half width` of the 95 % t "
        "interval over seeds. Gain: of the accuracy over the start's. Minus an arm: "
        "accuracy at the end, points, paired by seed; `*` where the interval leaves out 0.\n\n"
        f"Size: {size}.\n\n{versions}; {results['machine']}, one thread a run."
    )


def _controllers(arms: Arms, size: dict[str, Any]) -> str:
    header = [
        "arm",
        "accuracy, %",
        "gain, points",
        "KL-drift area",
        *(f"moves of mu > {t:g}, %" for t in LARGE_STEPS),
        "last mu",
        "ms a step",
    ]
    rows = []
    for arm, runs in arms.items():
        mean_mu = interval([tail(run, "mu", 0.0) for run in runs.values()])[0]
        rows.append([
            arm, cell(runs, accuracy, 100, 1), cell(runs, gain, 100, 1), cell(runs, kl_area, 1, 2),
            *(f"{100 * interval([large_steps(r, t) for r in runs.values()])[0]:.0f}" for t in LARGE_STEPS),
            f"{mean_mu:.2f}", f"{interval([step_milliseconds(r) for r in runs.values()])[0]:.0f}",
        ])  # fmt: skip
    text = f"## Controllers\n\n{_seeds(arms)}, {size['steps']} steps each.\n\n{markdown(header, rows)}"
    return text + "\n\n" + _against(arms) if DEFAULT_ARM in arms else text


def _against(arms: Arms) -> str:
    """The default arm minus every other, paired by seed; an interval without 0 is marked."""
    ours, rows = arms[DEFAULT_ARM], []
    for arm, runs in arms.items():
        if arm == DEFAULT_ARM:
            continue
        ahead = paired(ours, runs, lambda run: 100 * accuracy(run))
        area, half = paired(ours, runs, lambda run: math.log(kl_area(run)))
        low, high = (100 * math.expm1(bound) for bound in (area - half, area + half))
        bounds = f" [{low:+.0f}, {high:+.0f}]"
        rows.append([
            arm, f"{ahead[0]:+.1f}{around(ahead[1], 1)}{mark(ahead)}",
            f"{100 * math.expm1(area):+.0f}{'' if math.isnan(half) else bounds}{mark((area, half))}",
        ])  # fmt: skip
    header = [f"{DEFAULT_ARM} against", "accuracy, points", "KL-drift area, %"]
    note = (
        f"`*`: the interval leaves out 0. Of {2 * len(rows)} such intervals about one does so by chance. The area is "
        "compared by the geometric mean over seeds."
    )
    return f"### {DEFAULT_ARM} minus each other arm, paired by seed\n\n{markdown(header, rows)}\n\n{note}"


def _gates(arms: Arms, size: dict[str, Any]) -> str:
    measured = "effective update ratio", lambda r: off_policy(r, "effective_update_ratio", size["updates"])
    return f"## Gates\n\n{_objectives(arms, size, 'ratio')}\n\n{_policies(arms, 'gate (tau_pos, tau_neg)', *measured)}"


def _transforms(arms: Arms, size: dict[str, Any]) -> str:
    measured = "cancellation residual", lambda r: off_policy(r, "residual", size["updates"])
    text = _objectives(arms, size, "residual")
    return f"## DFPO against GSPO and GRPO\n\n{text}\n\n{_policies(arms, 'objective', *measured)}"


def _policies(arms: Arms, kind: str, measure: str, measured: Callable[[Run], float]) -> str:
    """A row for each policy term, with one measurement of its own."""
    header = [
        kind, "accuracy, %", "gain, points", f"minus {next(iter(arms))}", measure, "entropy of rollouts",
        "KL-drift area",
    ]  # fmt: skip
    rows = [
        [
            arm, cell(runs, accuracy, 100, 1), cell(runs, gain, 100, 1), _minus_first(arms, runs),
            cell(runs, measured, 1, 3), cell(runs, lambda r: tail(r, "entropy"), 1, 3), cell(runs, kl_area, 1, 1),
        ]
        for arm, runs in arms.items()
    ]  # fmt: skip
    return markdown(header, rows)


def _objectives(arms: Arms, size: dict[str, Any], value: str) -> str:
    return (
        f"mu fixed at {MU:g}, {_seeds(arms)}, {size['objective_steps']} steps, {size['updates']} on each rollout "
        f"batch. The {value} is the mean over the steps that are not the first on their batch; the entropy, nats a "
        "token, is of the last tenth of the steps."
    )


def _starts(arms: Arms, size: dict[str, Any]) -> str:
    header = ["start", "accuracy after it, %", "entropy after it", "accuracy after RL, %", "entropy after RL"]
    header.append(f"minus {next(iter(arms))}")
    rows = [
        [
            arm, *(
                cell(runs, lambda r, stage=stage, of=of: of(r, stage), *form)  # type: ignore[misc]
                for stage in (0, 1) for of, form in ((accuracy, (100, 1)), (probe_entropy, (1, 4)))
            ),
            _minus_first(arms, runs),
        ]
        for arm, runs in arms.items()
    ]  # fmt: skip
    text = f"{_seeds(arms)}, {size['start_steps']} supervised steps, then {size['rl_steps']} steps of RL alone."
    entropy = "Entropy on the probe's tokens, nats."
    return f"## GIFT against SFT as a start for RL\n\n{text} {entropy}\n\n{markdown(header, rows)}"


def _minus_first(arms: Arms, runs: dict[int, Run]) -> str:
    """Accuracy at the end minus the first arm's, in points, paired by seed."""
    first = next(iter(arms.values()))
    if runs is first:
        return ""
    ahead = paired(runs, first, lambda run: 100 * accuracy(run))
    return f"{ahead[0]:+.1f}{around(ahead[1], 1)}{mark(ahead)}"


def cell(runs: dict[int, Run], value: Callable[[Run], float], scale: float, digits: int) -> str:
    mean, half = interval([scale * value(run) for run in runs.values()])
    return f"{mean:.{digits}f}{around(half, digits)}"


def around(half: float, digits: int) -> str:
    """Nothing for a single seed."""
    return "" if math.isnan(half) else f" ± {half:.{digits}f}"


def mark(difference: tuple[float, float]) -> str:
    return " *" if abs(difference[0]) > difference[1] else ""


def _seeds(arms: Arms) -> str:
    counts = sorted({len(runs) for runs in arms.values()})
    return " or ".join(map(str, counts)) + (" seed" if counts == [1] else " seeds")


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
