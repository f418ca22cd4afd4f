"""The measuring function.

Contestants take turns in a new order each round, so that what else the machine does, and what it does to the caches,
meets all of them alike; figures are medians with their 20th and 80th percentiles.

CPU: the clock around one call, a fixed number of threads, the garbage collector off, the heap kept warm (see
:func:`keep_heap_warm`). Set ``OMP_WAIT_POLICY=passive`` before Python starts: with spinning OpenMP threads a busy
machine makes eager PyTorch slower by a factor of a hundred. Where other processes take the processor away in the middle
of a call (``Timing.preempted`` says how often), the wall clock times them too; the ``cpu`` clock, for one thread, does
not. CUDA: events around one call, the L2 cache written over before it.
"""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

WARMUP_ROUNDS = 3
CLOCKS = {"wall": time.perf_counter, "cpu": time.thread_time}


@dataclass(frozen=True)
class Contestant:
    """Something to time: ``run(prepare())``, of which only ``run`` counts, inside ``context``, which does not count."""

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


class _Sample(NamedTuple):
    seconds: float
    faults: int = 0
    switches: int = 0


@dataclass(frozen=True)
class Timing:
    """Seconds of each round, in the order of the rounds; round i of two contestants of one measurement are a pair.

    page_faults: median number of fresh pages a call touched: 0 on a warm heap, else allocation is part of the time.
    preempted: share of the calls during which the kernel took the processor away.
    """

    seconds: tuple[float, ...]
    page_faults: float = 0.0
    preempted: float = 0.0

    @property
    def p20(self) -> float:
        return quantile(self.seconds, 0.2)

    @property
    def p50(self) -> float:
        return quantile(self.seconds, 0.5)

    @property
    def p80(self) -> float:
        return quantile(self.seconds, 0.8)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the two nearest order statistics."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def measure(
    contestants: Sequence[Contestant],
    *,
    device: str = "cpu",
    clock: str = "wall",
    budget_seconds: float = 5.0,
    min_rounds: int = 11,
    max_rounds: int = 1000,
    warmup_rounds: int = WARMUP_ROUNDS,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> dict[str, Timing]:
    """Time the contestants against each other.

    Args:
        contestants: with distinct names.
        device: where they run.
        clock: on a CPU ``"wall"``, or ``"cpu"``: the time that the calling thread was running.
        budget_seconds: rounds go on until this has passed, within ``min_rounds`` and ``max_rounds``.
        warmup_rounds: rounds before the first that counts.
        seed: of the order within the rounds.
        progress: called with the share done.

    Returns:
        By name, in the given order; all with the same number of rounds.
    """
    stopwatch = _cuda_stopwatch(device) if torch.device(device).type == "cuda" else _cpu_stopwatch(CLOCKS[clock])
    order, shuffle = list(contestants), random.Random(seed).shuffle
    samples: dict[str, list[_Sample]] = {c.name: [] for c in contestants}
    with _no_garbage_collection():
        for _ in range(warmup_rounds):
            for contestant in order:
                stopwatch(contestant)
        began = time.perf_counter()
        for done in range(max_rounds):
            elapsed = time.perf_counter() - began
            if done >= min_rounds and elapsed >= budget_seconds:
                break
            if progress is not None:
                spent = elapsed / budget_seconds if budget_seconds else 1.0
                progress(max(done / max_rounds, min(done / min_rounds, spent)))
            shuffle(order)
            for contestant in order:
                samples[contestant.name].append(stopwatch(contestant))
    return {
        name: Timing(
            tuple(sample.seconds for sample in taken),
            statistics.median(sample.faults for sample in taken),
            statistics.fmean(sample.switches > 0 for sample in taken),
        )
        for name, taken in samples.items()
    }


def _cpu_stopwatch(clock: Callable[[], float]) -> Callable[[Contestant], _Sample]:
    def stopwatch(contestant: Contestant) -> _Sample:
        with contestant.context():
            state = contestant.prepare()
            before = resource.getrusage(resource.RUSAGE_SELF)
            began = clock()
            result = contestant.run(state)
            seconds = clock() - began
            after = resource.getrusage(resource.RUSAGE_SELF)
            del result, state
        return _Sample(seconds, after.ru_minflt - before.ru_minflt, after.ru_nivcsw - before.ru_nivcsw)

    return stopwatch


def _cuda_stopwatch(device: str) -> Callable[[Contestant], _Sample]:
    """Events on the current stream. Writing over the L2 cache first also gives the host a head start, so that a short
    kernel is not timed as its launch; a run of many launches still is."""
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def stopwatch(contestant: Contestant) -> _Sample:
        with contestant.context():
            state = contestant.prepare()
            torch.cuda.synchronize(device)
            flush.zero_()
            start.record()
            result = contestant.run(state)
            end.record()
            end.synchronize()
            del result, state
        return _Sample(start.elapsed_time(end) / 1e3)

    return stopwatch


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def peak_bytes(contestant: Contestant, device: str = "cpu") -> int:
    """Most bytes that PyTorch's allocator held at one time during ``run`` beyond those held before it."""
    with contestant.context():
        state = contestant.prepare()
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            result = contestant.run(state)
            torch.cuda.synchronize(device)
            peak = torch.cuda.max_memory_allocated(device) - before
        else:
            activities = [torch.profiler.ProfilerActivity.CPU]
            with (
                _without_profiler_chatter(),
                torch.profiler.profile(activities=activities, profile_memory=True) as profile,
            ):
                result = contestant.run(state)
            peak = _peak_of_events(profile)
        del result, state
    return peak


@contextmanager
def _without_profiler_chatter() -> Iterator[None]:
    """Drop what the profiler's C++ side writes to standard error whenever it starts and stops; let all else through."""
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as captured:
        os.dup2(captured.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            captured.seek(0)
            for line in captured:
                if not any(
                    mark in line for mark in (b"ActivityProfiler", b"unknown size was allocated before the prof")
                ):
                    sys.stderr.write(line.decode(errors="replace"))


def _peak_of_events(profile: torch.profiler.profile) -> int:
    """Highest sum of the allocations and releases that the profiler saw."""
    from torch._C._profiler import _EventType

    pending, events = list(profile.profiler.kineto_results.experimental_event_tree()), []  # type: ignore[union-attr]
    while pending:
        event = pending.pop()
        pending.extend(event.children)
        if event.tag == _EventType.Allocation:
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    held = peak = 0
    for _, size in sorted(events):
        held += size
        peak = max(peak, held)
    return peak


def copy_contestant(
    source: torch.Tensor, target: torch.Tensor, prepare: Callable[[], Any] = lambda: None
) -> Contestant:
    """A copy of ``source`` to ``target``: the speed that the floor is counted in.

    It takes part in the rounds, so that it meets the caches in the state in which the others meet them.
    """
    return Contestant("copy", lambda _: target.copy_(source), prepare)


def keep_heap_warm() -> str:
    """Tell glibc to keep freed memory; returns the allocator's state in words. For the life of the process.

    By default large tensors come from fresh pages, whose first touch makes out-of-place results 4 to 9 times slower and
    differs from run to run. Kept, they are compared at their best, eager PyTorch with its many temporaries above all.
    """
    name, _ = platform.libc_ver()
    if name != "glibc":
        return "heap as the system keeps it"
    libc = ctypes.CDLL(None)
    M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
    if libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1):
        return "heap kept warm"
    return "heap as the system keeps it"


def device_name(device: str = "cpu") -> str:
    """The processor's or the GPU's own name."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as info:
            for line in info:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except FileNotFoundError:  # no Linux
        pass
    return platform.processor() or platform.machine()


def conditions(device: str, heap: str, clock: str = "wall") -> str:
    """What else a reader must know about the figures."""
    if torch.device(device).type == "cuda":
        return (
            f"{device_name(device)}, torch {torch.__version__}, CUDA {torch.version.cuda}, L2 flushed before each call"
        )
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    count = torch.get_num_threads()
    threads = "1 thread" if count == 1 else f"{count} threads"
    return f"{device_name()}, {threads}, OMP_WAIT_POLICY {policy}, {clock} clock, {heap}, torch {torch.__version__}"
