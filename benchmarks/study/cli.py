"""``python benchmarks/study.py``: run what is missing, collect it in one JSON file, make tables and plots of that.

Without options: the study as committed under docs/study, in under an hour on two cores that have nothing else to do.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

import gac_kernels

from .arms import GROUPS, SMOKE, Size, describe, plan
from .plots import write_plots
from .pool import run_all
from .runs import write_json
from .tables import write_tables


def main(argv: list[str] | None = None) -> int:
    args = _parser().parse_args(argv)
    results = args.docs / "results.json"
    if not args.render:
        size = SMOKE if args.smoke else Size()
        size = replace(size, **{f.name: v for f in fields(size) if (v := getattr(args, f.name, None)) is not None})
        write_json(results, collect(size, tuple(args.only), args.output, args.processes))
    found = json.loads(results.read_text(encoding="utf-8"))
    for path in (write_tables(found, args.docs), *write_plots(found, args.docs)):
        print(path)
    return 0


def collect(size: Size, groups: tuple[str, ...], output: Path, processes: int) -> dict[str, Any]:
    """Run what ``output`` lacks, and everything that tables and plots need as one JSON object."""
    results = run_all(plan(size, groups), output, processes)
    versions = {"gac_kernels": gac_kernels.__version__, "torch": torch.__version__, "python": platform.python_version()}
    return {"size": describe(size), "versions": versions, "machine": _processor(), "runs": results}


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python benchmarks/study.py", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/study"), help="results of finished runs; %(default)s")
    parser.add_argument("--docs", type=Path, default=Path("docs/study"), help="tables, plots, results; %(default)s")
    parser.add_argument("--processes", type=_positive, default=2, help="runs at a time, a thread each; %(default)s")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of arms; all")
    parser.add_argument("--render", action="store_true", help="tables and plots of DOCS/results.json, no training")
    parser.add_argument("--smoke", action="store_true", help="every part in seconds, too short to learn anything")
    for name, what in (("seeds", "of the controllers"), ("objective-seeds", "of the other groups"), ("steps", "a run")):
        parser.add_argument(f"--{name}", type=_positive, help=f"{what}; {getattr(Size, name.replace('-', '_'))}")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected an integer >= 1, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
