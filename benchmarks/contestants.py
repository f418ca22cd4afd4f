"""A contestant of ``gac_kernels.bench`` in pytest-benchmark: checked first, skipped with the reason if it is absent."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from gac_kernels.bench.case import Case
from gac_kernels.bench.provider import Provider, Unavailable, verify
from gac_kernels.bench.providers import PROVIDERS
from gac_kernels.bench.session import contestant


@cache
def checked(case: Case, name: str) -> Provider | str:
    """The provider after its result was held against float64, or why it is not there."""
    try:
        provider = PROVIDERS[case.kernel][name](case)
    except Unavailable as reason:
        return str(reason)
    verify(provider, case)
    return provider


def time_contestant(benchmark: Any, case: Case, name: str, mode: str, *, rounds: int) -> None:
    provider = checked(case, name)
    if isinstance(provider, str):
        pytest.skip(provider)
    one = contestant(provider, case, mode)
    benchmark.group = f"{case.kernel} {case.x} {mode}"
    benchmark.extra_info.update(outputs=provider.outputs, version=provider.version, bytes=case.bytes(mode))
    with provider.context():
        benchmark.pedantic(one.run, setup=lambda: ((one.prepare(),), {}), rounds=rounds, warmup_rounds=1)
