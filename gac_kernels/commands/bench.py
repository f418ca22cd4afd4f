"""Time the fused ops against eager PyTorch, torch.compile and the peers that are installed, side by side in one run.

Every contestant is first held against the reference in float64; one that is wrong is not timed, and the command fails.
Contestants take turns in random order; figures are medians. Beside each stands the floor: the bytes that the work must
move at the least, at the speed of a plain copy of as many bytes that takes part in the same rounds.

  kernel     token: the loss of ready log-probs, S sequences x T tokens; logits: of N rows x V logits; hidden: of N
             hidden states of width 896 through a head of V rows, with the gradients of both
  provider   gac-BACKEND: this package (logits: in place; gac-BACKEND-new: the gradient a new tensor); eager: PyTorch by
             hand, for speed, all outputs (loss, log-probs, entropy, signals, metrics); eager-plain: the same as it is
             mostly written; eager-loss: the loss alone; compile, compile-loss: torch.compile of eager and eager-loss;
             liger, verl, trl, cce: their own functions of the same input
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
from typing import TYPE_CHECKING, Any

from .console import Console

if TYPE_CHECKING:
    from ..bench.case import Case
    from ..bench.session import Record, Session

HELP = "time the fused ops against eager PyTorch, torch.compile and peers"
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive"}
KERNELS = ("token", "logits", "hidden")
DEFAULT_KERNELS = KERNELS[:2]  # the matrix products of the third take minutes on a CPU
SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}
BUSY = 0.2  # share of interrupted calls from which a median tells more about the machine than about the call
CSV_COLUMNS = ("kernel", "provider", "mode", "metric", "x", "p20", "p50", "p80", "device", "version")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=KERNELS,
        default=list(DEFAULT_KERNELS),
        help=f"default: {' '.join(DEFAULT_KERNELS)}",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        type=_size,
        metavar="AxB",
        help="of one --kernel: sequences x tokens (default: 64x2048), rows x vocabulary (1024x32000 256x151936), or "
        "hidden states x vocabulary (512x151936 2048x151936)",
    )
    parser.add_argument(
        "--ragged", action="store_true", help="logits and hidden: with masked rows, lengths from T / 2 to T"
    )
    parser.add_argument("--threads", type=_positive, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument(
        "--dtype",
        nargs="+",
        type=lambda name: SHORT.get(name, name),
        choices=("float32", "bfloat16", "float16", "float64"),
        default=["float32"],
        help="of the log-probs or logits; also fp32, bf16, fp16, fp64 (default: float32)",
    )
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument(
        "--backend", metavar="A,B", help="of ours: reference, cpu, triton, cuda; default: all there are"
    )
    parser.add_argument("--providers", metavar="NAME,...", help="default: everyone but gac-reference")
    parser.add_argument("--modes", metavar="MODE,...", help="default: forward,backward,full; of logits: full")
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
        raise argparse.ArgumentTypeError(f"expected two sizes such as 64x2048, got {text!r}")
    return int(match[1]), int(match[2])


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def run(args: argparse.Namespace, console: Console) -> int:
    import torch

    from ..bench.measure import conditions, keep_heap_warm
    from ..bench.session import run_case
    from .devices import pick_device

    device = pick_device(args.device)
    if args.clock == "cpu" and (device != "cpu" or args.threads > 1):
        raise ValueError("--clock cpu: is for --device cpu --threads 1, where one thread does all the work")
    if not 0.0 <= args.seconds < float("inf"):
        raise ValueError(f"--seconds must be finite and at least 0, got {args.seconds}")
    cases, names, modes = _cases(args, device), _names(args, device), _modes(args)
    for path in (args.csv, args.plot):
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {str(path.parent)!r}")
    draw = _plotter() if args.plot is not None else None
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    try:
        console.text(conditions(device, keep_heap_warm() if device == "cpu" else "", args.clock))
        sessions: list[tuple[Case, Session]] = []
        with console.progress("bench") as progress:
            for done, case in enumerate(cases):

                def show(share: float, note: str, done: int = done, x: str = case.x) -> None:
                    progress((done + share) / len(cases), f"{x} {note}")

                options = {"clock": args.clock, "budget_seconds": args.seconds}
                sessions.append((case, run_case(case, names[case.kernel], modes, progress=show, **options)))
                case.release()
    finally:
        torch.set_num_threads(threads)
    for case, session in sessions:
        for mode in modes or case.modes:
            _table(console, case, session, mode)
    _report_missing(console, sessions)
    records = [record for _, session in sessions for record in session.records]
    if args.csv is not None:
        write_csv(args.csv, records)
    if draw is not None:
        draw(args.plot, records)
    console.result({"records": [record for _, session in sessions for record in session.json_records()]})
    return 1 if any(session.wrong for _, session in sessions) else 0


def _cases(args: argparse.Namespace, device: str) -> list[Case]:
    from ..bench.case import DTYPES
    from ..bench.cases import CASES

    if args.shape is not None and len(args.kernel) > 1:
        raise ValueError(f"--shape: means something else for each of {', '.join(args.kernel)}; give one --kernel")
    if args.ragged and args.kernel == ["token"]:
        raise ValueError("--ragged: is for --kernel logits or hidden; the lengths of the other differ anyway")
    cases: list[Case] = []
    for kernel in args.kernel:
        kind: Any = CASES[kernel]
        options = {"ragged": True} if args.ragged and kernel != "token" else {}
        for size in args.shape or kind.default_sizes:
            cases += [kind(*size, DTYPES[dtype], device, args.seed, **options) for dtype in args.dtype]
    return cases


def _names(args: argparse.Namespace, device: str) -> dict[str, list[str]]:
    """Per kernel, whom to measure; our reference, written for clarity, only if named or if there is nothing else."""
    import torch

    from ..bench.cases import CASES
    from ..bench.provider import Unavailable
    from ..bench.providers import OURS, PROVIDERS, check_backend
    from ..library import backends

    there = {kernel: PROVIDERS[kernel] for kernel in (CASES[name].kernel for name in args.kernel)}
    everyone = list(dict.fromkeys(name for providers in there.values() for name in providers))
    served = backends().get(torch.device(device).type, "reference")
    slow = [] if served.startswith("reference") else [f"{OURS}-reference"]
    names = [n for n in everyone if n not in slow] if args.providers is None else args.providers.split(",")
    for name in names:
        if name not in everyone:
            raise ValueError(f"--providers: {name!r} is none of {', '.join(everyone)}")
    if args.backend is not None:
        own = []
        for backend in args.backend.split(","):
            try:
                check_backend(backend, device)
            except (Unavailable, ValueError) as error:  # asked for by name, so its absence is an error and no remark
                raise ValueError(f"--backend {backend}: {error}") from error
            own += [name for name in everyone if name.startswith(f"{OURS}-{backend}")]
        names = own + [name for name in names if not name.startswith(f"{OURS}-")]
    return {kernel: [name for name in providers if name in names] for kernel, providers in there.items()}


def _modes(args: argparse.Namespace) -> list[str] | None:
    from ..bench.case import MODES

    modes = None if args.modes is None else args.modes.split(",")
    for mode in modes or ():
        if mode not in MODES:
            raise ValueError(f"--modes: {mode!r} is none of {', '.join(MODES)}")
    return modes


def _table(console: Console, case: Case, session: Session, mode: str) -> None:
    """One mode of one size, the floor in its title."""
    floor = session.find(case.floor_name, mode)
    if floor is None:  # nobody could be timed
        return
    why = f"{floor.bytes / 1e6:.2f} MB at the copy's {floor.bytes / floor.p50 / 1e6:.1f} GB/s"
    if case.floor_name != "copy":
        why = f"the {case.floor_name} alone"
    title = f"{case.title}, {mode}, {session.rounds[mode]} rounds; floor {floor.p50:.3f} ms: {why}"
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
        "x input",
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
                f"{record.floor_ratio:.2f}", *gains, f"{memory.p50:.2f}", f"{memory.p50 * 2**20 / case.leaf_bytes:.2f}",
                f"{session.errors[name]:.2f}",
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


def _report_missing(console: Console, sessions: list[tuple[Case, Session]]) -> None:
    said: set[tuple[str, str]] = set()
    for case, session in sessions:
        for name, why in session.wrong.items():
            console.remark(f"WRONG and not timed, {case.x}: {name}: {why.removeprefix(f'{name}: ')}")
        for name, why in session.absent.items():
            if (name, why) not in said:
                said.add((name, why))
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
    """Times on a logarithmic axis, one panel a kernel and mode: bars for one size, points for several."""
    from matplotlib import pyplot

    from ..bench.cases import CASES

    units = {case.kernel: case.unit for case in CASES.values()}
    records = [record for record in records if record.metric == "speed"]
    panels = list(dict.fromkeys((r.kernel, r.mode) for r in records))
    colour = {name: f"C{place % 10}" for place, name in enumerate(dict.fromkeys(r.provider for r in records))}
    figure, axes = pyplot.subplots(1, max(1, len(panels)), figsize=(5 * max(1, len(panels)), 4.6), squeeze=False)
    for panel, (kernel, mode) in zip(axes[0], panels, strict=False):
        here = [r for r in records if (r.kernel, r.mode) == (kernel, mode)]
        sizes = list(dict.fromkeys(r.x for r in here))
        for name in dict.fromkeys(r.provider for r in here):
            mine = [r for r in here if r.provider == name]
            middle = [r.p50 for r in mine]
            spread = [[r.p50 - r.p20 for r in mine], [r.p80 - r.p50 for r in mine]]
            if len(sizes) == 1:
                panel.bar([name] * len(mine), middle, yerr=spread, capsize=3, color=colour[name])
            else:
                style = {"marker": "o", "linestyle": "", "capsize": 3, "color": colour[name]}
                panel.errorbar([r.x for r in mine], middle, yerr=spread, label=name, **style)
        title = f"{kernel}, {mode}" + (f", {sizes[0]}" if len(sizes) == 1 else "")
        panel.set(yscale="log", title=title, ylabel="ms", xlabel="" if len(sizes) == 1 else units[kernel])
        panel.tick_params(axis="x", rotation=60)
        if len(sizes) > 1:
            panel.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    if records:
        figure.suptitle(records[0].device, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
