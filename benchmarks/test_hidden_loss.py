"""The loss from hidden states in pytest-benchmark: one test a provider; a wrong provider is never timed.

Small on purpose. Quoted ratios come from the interleaved rounds of ``gac-kernels bench --kernel hidden``.
"""

from __future__ import annotations

from functools import cache

import pytest
from contestants import time_contestant

from gac_kernels.bench.case import DTYPES
from gac_kernels.bench.cases import HiddenCase
from gac_kernels.bench.providers import PROVIDERS

case = cache(lambda dtype: HiddenCase(64, 8000, DTYPES[dtype]))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROVIDERS[HiddenCase.kernel])
def test_hidden_loss(benchmark, name, dtype):
    time_contestant(benchmark, case(dtype), name, "full", rounds=5)
