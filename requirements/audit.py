"""Hold the locked packages against the known vulnerabilities (pip-audit: PyPI's advisories, then OSV's).

    python requirements/audit.py [--required] requirements/*.lock torch==2.13.0

Fails where a package has one. Where no database can be reached nothing is audited: that is said, and is a failure with
--required. In an environment with requirements/release.lock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

SERVICES = ("pypi", "osv")


def audit(path: Path, service: str) -> tuple[list[dict[str, Any]], str]:
    """The packages that the service knows, with their vulnerabilities, and why there are no more."""
    command = [sys.executable, "-m", "pip_audit", "-r", str(path), "-s", service, "-f", "json", "--disable-pip",
               "--no-deps", "--progress-spinner", "off"]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        entries = json.loads(run.stdout)["dependencies"]
    except ValueError:  # no report: it could not be reached, or did not understand the file
        last = (run.stderr.strip().splitlines() or [f"exit status {run.returncode}"])[-1]
        return [], textwrap.shorten(last, 120)
    skipped = [entry["skip_reason"] for entry in entries if "skip_reason" in entry]
    return [entry for entry in entries if "vulns" in entry], f"{len(skipped)} left out: {skipped[0]}" if skipped else ""


def main() -> int:
    """Audit every argument; the exit status is the verdict."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="a lock, or a pinned requirement")
    parser.add_argument("--required", action="store_true", help="fail where something could not be audited")
    args = parser.parse_args()
    verdict = 0
    for what in args.what:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write(what if "==" in what else Path(what).read_text(encoding="utf-8"))
            file.flush()
            for service in SERVICES:
                known, reason = audit(Path(file.name), service)
                if known:
                    break
        bad = [entry for entry in known if entry["vulns"]]
        for entry in bad:
            print(f"VULNERABLE: {entry['name']} {entry['version']}:", ", ".join(v["id"] for v in entry["vulns"]))
        if known:
            print(f"{what}: {len(known)} packages audited, {len(bad)} vulnerable. {reason}")
        if not known or reason:
            verdict |= args.required
        if not known:
            print(f"NOT AUDITED: {what}: no database of vulnerabilities could be asked ({reason})")
        verdict |= bool(bad)
    return int(verdict)


if __name__ == "__main__":
    raise SystemExit(main())
