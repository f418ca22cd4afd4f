"""The end of ``gpu.sh``: one JSON file of everything it found, and a table. Exits non-zero if a step failed."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import triton

BENCHES = ("bench", "logits-bf16", "logits-small", "logits-fp32", "hidden-bf16")
OBJECTS = ("doctor", *BENCHES, "overhead-qwen2")  # steps that print JSON


def last_object(path: Path) -> dict[str, Any] | None:
    """The object that ``--json`` left on the last line of a step's output; None for a step that did not get so far."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines or not lines[-1].startswith("{"):
        return None
    return json.loads(lines[-1])


def sources() -> str:
    """A digest of the code under test, which is also there where no git is."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for folder, pattern in (("gac_kernels", "*.py"), ("csrc", "*.*")):
        for path in sorted((root / folder).rglob(pattern)):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def main(logs: Path, results: Path) -> int:
    steps = [line.split() for line in (logs / "steps").read_text().splitlines()]
    ran, failed = {name for name, *_ in steps}, [name for name, status, _ in steps if status != "0"]
    device = torch.cuda.get_device_name()
    commit = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    found = {
        "device": device,
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() if commit and commit.returncode == 0 else None,
        "sources": sources(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "steps": {name: {"status": int(status), "seconds": int(seconds)} for name, status, seconds in steps},
        **{name: last_object(logs / f"{name}.out") for name in OBJECTS},
    }
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if earlier.get("sources") == found["sources"]:  # and this run may have left steps out
        found["steps"] = earlier["steps"] | found["steps"]
        found |= {name: earlier.get(name) for name in OBJECTS if found[name] is None and name not in ran}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    print(f"\n{device}, torch {torch.__version__}, triton {triton.__version__}, CUDA {torch.version.cuda}\n")
    for record in (record for name in BENCHES for record in (found[name] or {}).get("records", [])):
        if record["metric"] == "speed":
            print(
                f"{record['kernel']:<11} {record['x']:>21} {record['mode']:<8} {record['provider']:<14} "
                f"{record['p50']:9.4f} ms  {record['floor_ratio']:7.2f} x floor"
            )
    if (overhead := found["overhead-qwen2"]) is not None:
        share, step = overhead["controller_share"], overhead["step_seconds"]
        print(f"overhead-qwen2: controller {share:.3%} of a step of {step * 1e3:.1f} ms")
    print(f"\n{'step':<16}{'status':>8}{'seconds':>9}")
    for name, status, seconds in steps:
        print(f"{name:<16}{'ok' if status == '0' else 'FAILED ' + status:>8}{seconds:>9}")
    print(f"\nwritten: {path}")
    print(f"gpu.sh: FAILED: {', '.join(failed)}" if failed else "gpu.sh: ok")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
