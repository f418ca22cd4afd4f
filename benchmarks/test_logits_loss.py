"""The loss from logits in pytest-benchmark: one group a dtype, one test a provider; a wrong provider is never timed.

Small on purpose. Quoted ratios come from the interleaved rounds of ``gac-kernels bench --kernel logits``.
"""

from __future__ import annotations

from functools import cache

import pytest
from contestants import time_contestant

from gac_kernels.bench.case import DTYPES
from gac_kernels.bench.cases import RowCase
from gac_kernels.bench.providers import PROVIDERS

case = cache(lambda dtype: RowCase(64, 32000, DTYPES[dtype]))  # of which only those that are selected take memory


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", PROVIDERS[RowCase.kernel])
def test_logits_loss(benchmark, name, dtype):
    time_contestant(benchmark, case(dtype), name, "full", rounds=10)
