"""Time the fused ops against eager PyTorch, torch.compile and the peers that are installed, side by side in one run.

Every contestant is first held against the reference in float64; one that is wrong is not timed, and the command fails.
Contestants take turns in random order; figures are medians. Beside each stands the floor: the bytes that the work must
move at the least, at the speed of a plain copy of as many bytes that takes part in the same rounds.

  provider   gac-BACKEND: this package; eager: PyTorch by hand, all outputs (loss, log-probs, signals, metrics);
             eager-loss: the loss alone; compile, compile-loss: torch.compile of the two; liger, verl: their own
             functions of ready log-probs, policy loss alone
  mode       forward, backward, or full (both)
  metric     speed in milliseconds; memory: peak beyond what was held before the call, in MiB

On a CPU the process runs under OMP_WAIT_POLICY=passive unless you set it, with a heap that is kept warm.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from .console import Console

if TYPE_CHECKING:
    from ..bench.cases import TokenCase
    from ..bench.session import Record, Session

HELP = "time the fused ops against eager PyTorch, torch.compile and peers"
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
BUSY = 0.2  # share of interrupted calls from which a median tells more about the machine than about the call
CSV_COLUMNS = ("kernel", "provider", "mode", "metric", "x", "p20", "p50", "p80", "device", "version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=("token",), default="token", help="what to compute (default: %(default)s)")
    parser.add_argument(
        "--tokens",
        nargs="+",
        type=_size,
        default=[(64, 2048)],
        metavar="SxT",
        help="sequences x tokens (default: 64x2048)",
    )
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float64"), default="float32", help="of the log-probs"
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--backend", choices=("reference", "cpu", "triton", "cuda"), help="of ours; default: all there are"
    )
    parser.add_argument("--providers", metavar="NAME,...", help="whom to measure; default: everyone")
    parser.add_argument("--modes", default="forward,backward,full", metavar="MODE,...", help="default: %(default)s")
    parser.add_argument(
        "--seconds", type=float, default=5.0, help="to spend on each mode and size (default: %(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: the thread's own time, for a busy machine, 1 thread",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="write a chart (needs matplotlib)")
    parser.add_argument("--csv", type=Path, metavar="FILE.csv", help=f"write columns {', '.join(CSV_COLUMNS)}")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected SxT such as 64x2048, got {text!r}")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace, console: Console) -> int:
    import torch

    from ..bench.cases import CASES, DTYPES
    from ..bench.measure import conditions, keep_heap_warm
    from ..bench.session import run_case
    from .devices import pick_device

    device = pick_device(args.device)
    if args.clock == "cpu" and (device != "cpu" or args.threads > 1):
        raise ValueError("--clock cpu: is for --device cpu --threads 1, where one thread does all the work")
    if not 0.0 <= args.seconds < float("inf"):
        raise ValueError(f"--seconds must be finite and at least 0, got {args.seconds}")
    names, modes = _names(args), _modes(args)
    for path in (args.csv, args.plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {str(path.parent)!r}")
    draw = _plotter() if args.plot is not None else None
    make, dtype = CASES[args.case], DTYPES[args.dtype]
    cases = [make(sequences, tokens, dtype, device, args.seed) for sequences, tokens in args.tokens]
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        console.text(conditions(device, keep_heap_warm() if device == "cpu" else "", args.clock))
        sessions: list[tuple[TokenCase, Session]] = []
        with console.progress("bench") as progress:
            for done, case in enumerate(cases):

                def show(share: float, note: str, done: int = done, x: str = case.x) -> None:
                    progress((done + share) / len(cases), f"{x} {note}")

                found = run_case(case, names, modes, clock=args.clock, budget_seconds=args.seconds, progress=show)
                sessions.append((case, found))
    finally:
        torch.set_num_threads(threads)
    for case, session in sessions:
        for mode in modes:
            _table(console, case, session, mode)
    _report_missing(console, sessions)
    records = [record for _, session in sessions for record in session.records]
    if args.csv is not None:
        write_csv(args.csv, records)
    if draw is not None:
        draw(args.plot, records)
    console.result({"records": [record for _, session in sessions for record in session.json_records()]})
    return 1 if any(session.wrong for _, session in sessions) else 0


def _names(args: argparse.Namespace) -> list[str]:
    from ..bench.providers import OURS, PROVIDERS

    names = list(PROVIDERS) if args.providers is None else args.providers.split(",")
    for name in names:
        if name not in PROVIDERS:
            raise ValueError(f"--providers: {name!r} is none of {', '.join(PROVIDERS)}")
    if args.backend is None:
        return names
    from ..library import use_backend

    try:
        with use_backend(args.backend):
            pass
    except RuntimeError as error:  # asked for by name, so its absence is an error and no remark
        raise ValueError(f"--backend {args.backend}: {error}") from error
    own = f"{OURS}-{args.backend}"
    others = [name for name in names if not name.startswith(f"{OURS}-")]
    return [own, *others]


def _modes(args: argparse.Namespace) -> list[str]:
    from ..bench.cases import MODES

    modes = args.modes.split(",")
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--modes: {mode!r} is none of {', '.join(MODES)}")
    return modes


def _table(console: Console, case: TokenCase, session: Session, mode: str) -> None:
    """One mode of one size, the floor in its title."""
    floor = session.find("copy", mode)
    if floor is None:  # nobody could be timed
        return
    speed = floor.bytes / floor.p50 / 1e6
    title = (
        f"{case.kernel} {case.x} {str(case.dtype).removeprefix('torch.')}, {mode}, {session.rounds[mode]} rounds; "
        f"floor {floor.p50:.3f} ms: {floor.bytes / 1e6:.2f} MB at the copy's {speed:.1f} GB/s"
    )
    header = (
        "provider",
        "computes",
        "p50 ms",
        "p20",
        "p80",
        "x floor",
        "vs eager",
        "vs compile",
        "peak MiB",
        "error/bound",
    )
    rows = []
    for name, outputs in session.outputs.items():
        record, memory = session.find(name, mode), session.find(name, mode, "memory")
        assert record is not None and memory is not None and record.floor_ratio is not None
        gains = [
            "-" if base is None else f"{base.p50 / record.p50:.2f}x"
            for base in (session.find("eager", mode), session.find("compile", mode))
        ]
        rows.append(
            (
                name, outputs, *(f"{value:.3f}" for value in (record.p50, record.p20, record.p80)),
                f"{record.floor_ratio:.2f}", *gains, f"{memory.p50:.2f}", f"{session.errors[name]:.2f}",
            )
        )  # fmt: skip
    console.table(title, header, rows, left=2)
    fresh = {name: round(faults) for (name, of), faults in session.page_faults.items() if of == mode and faults >= 1}
    if fresh:
        console.text(f"fresh pages a call: {', '.join(f'{name} {count}' for name, count in fresh.items())}")
    hit = {name: share for (name, of), share in session.preempted.items() if of == mode and share > BUSY}
    if hit:
        shares = ", ".join(f"{name} {share:.0%}" for name, share in hit.items())
        console.text(f"busy machine, calls that other processes interrupted: {shares}; --clock cpu leaves them out")


def _report_missing(console: Console, sessions: list[tuple[TokenCase, Session]]) -> None:
    said: set[str] = set()
    for case, session in sessions:
        for name, why in session.wrong.items():
            console.remark(f"WRONG and not timed, {case.x}: {name}: {why.removeprefix(f'{name}: ')}")
        for name, why in session.absent.items():
            if name not in said:
                said.add(name)
                console.remark(f"absent: {name}: {why}")


def write_csv(path: Path, records: list[Record]) -> None:
    """The records in the columns of Liger's benchmark data."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(CSV_COLUMNS)
        writer.writerows([getattr(record, column) for column in CSV_COLUMNS] for record in records)


def _plotter() -> Callable[[Path, list[Record]], None]:
    """The function that draws; asked for before anything is measured, so that a missing package costs no wait."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("--plot needs the package 'matplotlib': pip install 'gac-kernels[train]'") from error
    matplotlib.use("Agg")
    return write_plot


def write_plot(path: Path, records: list[Record]) -> None:
    """Times on a logarithmic axis, one panel a mode: bars for one size, lines over the tokens of several."""
    from matplotlib import pyplot

    records = [record for record in records if record.metric == "speed"]
    modes, sizes = list(dict.fromkeys(r.mode for r in records)), list(dict.fromkeys(r.x for r in records))
    figure, axes = pyplot.subplots(1, max(1, len(modes)), figsize=(5 * max(1, len(modes)), 4.2), squeeze=False)
    for panel, mode in zip(axes[0], modes, strict=False):
        for name in dict.fromkeys(r.provider for r in records):
            mine = [r for r in records if (r.provider, r.mode) == (name, mode)]
            middle = [r.p50 for r in mine]
            spread = [[r.p50 - r.p20 for r in mine], [r.p80 - r.p50 for r in mine]]
            if len(sizes) == 1:
                panel.bar([name] * len(mine), middle, yerr=spread, capsize=3)
            else:
                panel.errorbar([r.x for r in mine], middle, yerr=spread, marker="o", capsize=3, label=name)
        panel.set(yscale="log", title=mode, ylabel="ms", xlabel="" if len(sizes) == 1 else "sequences x tokens")
        panel.tick_params(axis="x", rotation=60)
        if len(sizes) > 1:
            panel.legend(fontsize="small")
    if records:
        figure.suptitle(f"{records[0].kernel} {', '.join(sizes)} on {records[0].device}", fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
