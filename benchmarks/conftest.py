"""The conditions of the benchmarks: they must stand before torch is loaded, and are those of ``gac-kernels bench``."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from gac_kernels.bench.measure import conditions, keep_heap_warm

_HEAP = keep_heap_warm()


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_report_header() -> str:
    return conditions("cpu", _HEAP)
