"""The token-level loss in pytest-benchmark: one group a mode, one test a provider; a wrong provider is never timed.

``gac-kernels bench`` times the same contestants in interleaved rounds, and quoted ratios come from there; here they run
one after the other, which suits ``--benchmark-compare`` of two commits.
"""

from __future__ import annotations

from functools import cache

import pytest

from gac_kernels.bench.cases import MODES, TokenCase
from gac_kernels.bench.providers import PROVIDERS, Provider, Unavailable, verify
from gac_kernels.bench.session import contestant

CASE = TokenCase(64, 2048)


@cache
def checked(name: str) -> Provider | str:
    """The provider after its result was held against float64, or why it is not there."""
    try:
        provider = PROVIDERS[name](CASE)
    except Unavailable as reason:
        return str(reason)
    verify(provider, CASE)
    return provider


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PROVIDERS)
def test_token_loss(benchmark, name, mode):
    provider = checked(name)
    if isinstance(provider, str):
        pytest.skip(provider)
    one = contestant(provider, CASE, mode)
    benchmark.group = f"{CASE.kernel} {CASE.x} {mode}"
    benchmark.extra_info.update(outputs=provider.outputs, version=provider.version, bytes=CASE.bytes(mode))
    with provider.context():
        benchmark.pedantic(one.run, setup=lambda: ((one.prepare(),), {}), rounds=30, warmup_rounds=3)
