"""Say what this install runs on: versions, devices, which backend serves which op and why, which trainers are installed
with the hooks we use, and whether each backend computes the right numbers. Fails if a self-test does.
"""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import asdict
from typing import Any

from .console import Console

HELP = "versions, devices, backends and a numeric self-test of each"
PACKAGES = ("torch", "triton", "numpy", "transformers")
# Operator -> the public functions behind which it stands; of those that end in _, which write in place, see the others.
OPS = {
    "token_loss": "hybrid_loss, signals_from_logprobs, and the losses below",
    "token_weights": "the losses below",
    "fused_rows": "hybrid_loss_from_logits, hybrid_loss_from_hidden",
    "row_statistics": "token_logprobs, GSPO and DFPO from logits",
    "row_gradient": "token_logprobs, GSPO and DFPO from logits",
    "scale_": "backward of the losses",
    "group_advantages": "group_advantages",
    "controller_step": "GuidedAdaptiveController.step",
    "gradient_moments": "validate",
    "accumulate_moments_": "validate",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser  # nothing of its own


def run(args: argparse.Namespace, console: Console) -> int:
    from .. import __version__, backends, library
    from ..integrations.checks import check_all, version_of
    from .selftest import SelfTest, self_tests

    versions: dict[str, str | None] = {"python": platform.python_version(), "gac_kernels": __version__}
    versions |= {name: version_of(name) for name in PACKAGES}
    integrations = check_all()
    devices = _devices()
    serving = {device: _split(text) for device, text in backends().items()}

    console.table("versions", ("package", "version"), [(k, v or "not installed") for k, v in versions.items()], left=2)
    console.table("devices", ("device", "what"), [(name, text) for name, text in _device_lines(devices)], left=2)
    reasons = [(device, backend, why) for device, (backend, why) in serving.items()]
    console.table("which backend serves the losses, and why", ("device", "backend", "why"), reasons, left=3)
    operators: dict[str, dict[str, str]] = {op: {} for op in OPS}
    for op, device, backend in library.table():
        if op in OPS:
            operators[op][device] = backend
    rows = [(op, found["cpu"], found["cuda"], OPS[op]) for op, found in operators.items()]
    console.table("which backend serves which op", ("op", "cpu", "cuda", "behind"), rows, left=4)
    found = [(name, c.version or "-", c.status, c.why) for name, c in integrations.items()]
    console.table("integrations", ("package", "version", "hooks", "why"), found, left=4)

    with console.progress("self-test"):
        tests: list[SelfTest] = self_tests(args.seed)
    ok = all(test.status != "failed" for test in tests)
    lines = [
        (
            t.backend,
            t.device,
            t.status,
            t.cases or "-",
            "-" if t.worst is None else f"{t.worst:.2f}",
            f"{t.seconds:.1f}",
            t.why,
        )
        for t in tests
    ]
    header = ("backend", "device", "self-test", "cases", "error/bound", "seconds", "why")
    console.table("self-test against the float64 reference", header, lines, left=3)
    for test in tests:
        if test.status == "failed":
            console.remark(f"self-test of backend {test.backend!r} on {test.device} FAILED: {test.why}")
    told: dict[str, Any] = {
        device: {
            "backend": backend,
            "why": why,
            "operators": {op: found[device] for op, found in operators.items() if device in found},
            "self_test": {t.backend: asdict(t) for t in tests if t.device == device},
        }
        for device, (backend, why) in serving.items()
    }
    hosts = {name: c._asdict() for name, c in integrations.items()}
    console.result({"versions": versions, "devices": devices, "backends": told, "integrations": hosts, "ok": ok})
    console.text()
    console.text("ok" if ok else "NOT ok")
    return 0 if ok else 1


def _split(text: str) -> tuple[str, str]:
    backend, _, why = text.partition(":")
    return backend.strip(), why.strip()


def _devices() -> dict[str, Any]:
    import torch

    from ..bench.measure import device_name

    cpu = {
        "name": device_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
    }
    gpus = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gpus.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "multiprocessors": properties.multi_processor_count,
            }
        )
    return {"cpu": cpu, "cuda": gpus}


def _device_lines(devices: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = devices["cpu"]
    lines = [("cpu", f"{cpu['name']}, {cpu['instruction_set']}, {cpu['cores']} cores, {cpu['threads']} threads")]
    for index, gpu in enumerate(devices["cuda"]):
        text = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {gpu['memory_gib']} GiB"
        lines.append((f"cuda:{index}", f"{text}, {gpu['multiprocessors']} multiprocessors"))
    return lines if devices["cuda"] else [*lines, ("cuda", "none visible")]
