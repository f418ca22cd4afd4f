"""A run that is killed right after logging the given step: ``killed_run.py OUTPUT SETTINGS STEP``."""

import json
import os
import signal
import sys

import torch
from small_runs import small

from gac_kernels.train import train
from gac_kernels.train.metrics import MetricsWriter

output, settings, last = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
log = MetricsWriter.log


def log_then_die(self, step, values):
    log(self, step, values)
    if step == last:
        os.kill(os.getpid(), signal.SIGKILL)


MetricsWriter.log = log_then_die
torch.use_deterministic_algorithms(True)  # as in the process that compares
train(small(output, **settings), progress=False)
