"""One benchmark: gather the providers, check every one, time those that are right, and put down records."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .case import Case
from .check import WrongResult
from .measure import Contestant, Timing, device_name, measure, peak_bytes
from .provider import Provider, Unavailable, verify
from .providers import PROVIDERS


@dataclass(frozen=True)
class Record:
    """One figure. The first ten fields are Liger's columns.

    metric: ``"speed"`` in milliseconds, or ``"memory"``, the peak beyond what was held before the call, in MiB.
    bytes: the least that the mode must move. floor_ratio: time over that of the case's floor (a copy of
    as many bytes; from hidden states the matrix products), measured in the same rounds; None for memory.
    """

    kernel: str
    provider: str
    mode: str
    metric: str
    x: str
    p20: float
    p50: float
    p80: float
    device: str
    version: str
    bytes: int
    floor_ratio: float | None


@dataclass
class Session:
    """What a benchmark found.

    Attributes:
        records: figures of the providers that are right, and of the copy.
        errors: largest error of each provider that is right, in units of the bound.
        absent: provider -> why it could not take part. wrong: provider -> how its result differs; it was not timed.
        outputs: provider -> what its time pays for. page_faults: (provider, mode) -> median fresh pages a call.
        preempted: (provider, mode) -> share of the calls that other processes interrupted.
        rounds: mode -> how many rounds the figures come from.
    """

    records: list[Record] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)
    page_faults: dict[tuple[str, str], float] = field(default_factory=dict)
    preempted: dict[tuple[str, str], float] = field(default_factory=dict)
    rounds: dict[str, int] = field(default_factory=dict)

    def find(self, provider: str, mode: str, metric: str = "speed") -> Record | None:
        """The record, if the provider has been measured."""
        for record in self.records:
            if (record.provider, record.mode, record.metric) == (provider, mode, metric):
                return record
        return None

    def json_records(self) -> list[dict[str, object]]:
        return [asdict(record) for record in self.records]


def run_case(
    case: Case,
    names: Sequence[str],
    modes: Sequence[str] | None = None,
    *,
    clock: str = "wall",
    budget_seconds: float = 5.0,
    progress: Callable[[float, str], None] = lambda share, note: None,
) -> Session:
    """Check and time ``names`` of the case's ``providers.PROVIDERS``, side by side.

    Args:
        case: what to compute.
        names: whom to measure. Who cannot take part is in ``absent`` of the result, who is wrong in ``wrong``.
        modes: of ``"forward"``, ``"backward"`` and ``"full"`` (both); None for the case's own choice.
        clock, budget_seconds: see ``measure``; the budget is of each mode.
        progress: called with the share done and what is being done.
    """
    session, providers, modes = Session(), [], case.modes if modes is None else modes
    if "torch._dynamo" in sys.modules:  # what an earlier size compiled counts towards the limit of recompilations
        torch.compiler.reset()
    for done, name in enumerate(names):
        progress(0.3 * done / len(names), f"checking {name}")
        try:
            provider = PROVIDERS[case.kernel][name](case)
            session.errors[name] = verify(provider, case)
        except Unavailable as reason:
            session.absent[name] = str(reason)
        except WrongResult as reason:
            session.wrong[name] = str(reason)
        except torch.OutOfMemoryError as reason:
            session.absent[name] = f"needs more memory than there is: {str(reason).partition('. ')[0]}"
        else:
            session.outputs[name] = provider.outputs
            providers.append(provider)
    for done, mode in enumerate(modes if providers else ()):
        start, width = 0.3 + 0.7 * done / len(modes), 0.7 / len(modes)

        def show(share: float, start: float = start, width: float = width, mode: str = mode) -> None:
            progress(start + width * share, mode)

        _time_mode(session, case, providers, mode, {"clock": clock, "budget_seconds": budget_seconds, "progress": show})
    return session


def _time_mode(
    session: Session,
    case: Case,
    providers: Sequence[Provider],
    mode: str,
    options: dict[str, Any],
) -> None:
    contestants = [contestant(provider, case, mode) for provider in providers]
    least = case.floor(mode)
    timings = measure(
        [*contestants, least], device=case.device, seed=case.seed, warmup_rounds=case.warmup_rounds,
        min_rounds=case.min_rounds, **options,
    )  # fmt: skip
    floor = timings[least.name].p50
    versions = {provider.name: provider.version for provider in providers} | {least.name: torch.__version__}
    for one in (*contestants, least):
        timing = timings[one.name]
        session.page_faults[one.name, mode] = timing.page_faults
        session.preempted[one.name, mode] = timing.preempted
        session.records.append(_record(case, mode, one.name, versions[one.name], timing, floor))
    for one in contestants:
        mib = peak_bytes(one, case.device) / 2**20
        base = _record(case, mode, one.name, versions[one.name], Timing((mib * 1e-3,)), floor)
        session.records.append(Record(**{**asdict(base), "metric": "memory", "floor_ratio": None}))
    session.rounds[mode] = len(timings[least.name].seconds)


def _record(case: Case, mode: str, name: str, version: str, timing: Timing, floor: float) -> Record:
    return Record(
        kernel=case.kernel,
        provider=name,
        mode=mode,
        metric="speed",
        x=case.x,
        p20=timing.p20 * 1e3,
        p50=timing.p50 * 1e3,
        p80=timing.p80 * 1e3,
        device=device_name(case.device),
        version=version,
        bytes=case.bytes(mode),
        floor_ratio=timing.p50 / floor,
    )


def contestant(provider: Provider, case: Case, mode: str) -> Contestant:
    """A provider in a mode. Every call starts from a new leaf, whose values nobody has touched; the graph of
    ``backward`` is built outside its time."""

    def leaf() -> Tensor:
        return provider.prepare(case.leaf())

    def forward(leaf: Tensor) -> object:
        return provider.forward(leaf)

    def graph() -> tuple[Tensor, Tensor]:
        start = leaf()
        return provider.forward(start).loss, start

    def backward(state: tuple[Tensor, Tensor]) -> object:
        return torch.autograd.grad(state[0], (state[1], *case.parameters))

    def full(leaf: Tensor) -> object:
        outputs = provider.forward(leaf)
        return outputs, torch.autograd.grad(outputs.loss, (leaf, *case.parameters))

    run, prepare = {"forward": (forward, leaf), "backward": (backward, graph), "full": (full, leaf)}[mode]
    return Contestant(provider.name, run, prepare, provider.context)  # type: ignore[arg-type]
