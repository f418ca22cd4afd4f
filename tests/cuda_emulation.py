"""csrc/cuda built for the CPU, a host thread for each CUDA thread: the operators ``*_cuda`` then take tensors on the CPU.

Built once for these sources and this torch into ``build/``; ``load()`` makes ``gk.use_backend("cuda")`` work in the
process. GAC_EMULATE_THREADS, _CLUSTER, _SHARED and _CAPABILITY describe the emulated machine; they are read once.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import gac_kernels  # noqa: F401 - defines the operators

ROOT = Path(__file__).parents[1]
COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-DGAC_EMULATE", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-pthread"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g1"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-g1"],
}
TORCH = Path(torch.__file__).parent


def sources(pattern: str) -> list[Path]:
    return sorted((ROOT / "csrc" / "cuda").glob(pattern))


def _digest() -> str:
    digest = hashlib.sha256(" ".join([COMPILER, *FLAGS, torch.__version__]).encode())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_units(units: list[Path], into: Path, flags: list[str]) -> list[str]:
    """Objects of the units, compiled side by side."""

    def one(unit: Path) -> str:
        target = into / f"{unit.name}.o"
        command = [COMPILER, *FLAGS, *flags, "-x", "c++", "-c", str(unit), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"
        return str(target)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, units))


def build() -> Path:
    """The module, built if these sources were not."""
    folder = ROOT / "build"
    folder.mkdir(exist_ok=True)
    module = folder / f"emulated-{_digest()}.so"
    with (folder / "emulated.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run come here at once
        if not module.exists():
            work = folder / f"emulated-{os.getpid()}"
            work.mkdir()
            torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]
            objects = compile_units(sources("*.cu"), work, [])
            objects += compile_units(sources("*.cpp"), work, torch_flags)
            link = [COMPILER, "-shared", "-pthread", *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-o", str(work / "module.so")]
            subprocess.run(link, check=True)
            (work / "module.so").replace(module)
            shutil.rmtree(work)
    return module


def load() -> None:
    """Make ``use_backend("cuda")`` run the emulated kernels; skips the test where there is no C++ compiler."""
    if shutil.which(COMPILER) is None or not (TORCH / "include/torch/csrc/stable/library.h").is_file():
        pytest.skip("no C++ compiler, or torch without headers")
    torch.ops.load_library(str(build()))
