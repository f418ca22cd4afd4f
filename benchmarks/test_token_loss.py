"""The token-level loss in pytest-benchmark: one group a mode, one test a provider; a wrong provider is never timed.

``gac-kernels bench`` times the same contestants in interleaved rounds, and quoted ratios come from there; here they run
one after the other, which suits ``--benchmark-compare`` of two commits.
"""

from __future__ import annotations

import pytest
from contestants import time_contestant

from gac_kernels.bench.case import MODES
from gac_kernels.bench.cases import TokenCase
from gac_kernels.bench.providers import PROVIDERS

CASE = TokenCase(64, 2048)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROVIDERS[CASE.kernel])
def test_token_loss(benchmark, name, mode):
    time_contestant(benchmark, CASE, name, mode, rounds=30)
