"""The study of controllers and objectives on the demo task: ``python benchmarks/study.py``. See ``study/cli.py``."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    # Read when torch is loaded: one thread a run, and none that spins while it waits.
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="passive")
    from study.cli import main  # the folder beside this file, which Python prefers to the file

    sys.exit(main())
