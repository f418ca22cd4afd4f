"""csrc/cuda built for the CPU, a host thread for each CUDA thread: the operators ``*_cuda`` then take CPU tensors.

Built once for these sources and this torch into ``build/``; ``load()`` makes ``gk.use_backend("cuda")`` work in the
process. GAC_EMULATE_THREADS, _CLUSTER, _SHARED and _CAPABILITY describe the emulated machine; they are read once.
GAC_EMULATE_SANITIZER ("address", "thread") builds with that sanitizer, whose library the process must have preloaded;
GAC_EMULATE_PLANT names a fault of ``PLANTS`` to build in, which the sanitizer must find. ``.ci/cuda`` uses both.
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
FLAGS = ["-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-pthread", "-DGAC_EMULATE"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
SANITIZERS = {
    "": [],
    "address": ["-fsanitize=address,undefined", "-fno-sanitize=vptr", "-fno-omit-frame-pointer", "-g1"],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-g1"],
}
# Fault -> file under csrc/cuda, what stands there once, and what takes its place.
PLANTS = {
    "off-by-one": ("row_memory.cuh", "return vector * Width + Width <= columns;", "return vector * Width < columns;"),
    "missing-barrier": (
        "row_moments.cuh", "    barrier();  // the first warp adds up what all have left\n", "",
    ),
}  # fmt: skip
SANITIZER, PLANT = os.environ.get("GAC_EMULATE_SANITIZER", ""), os.environ.get("GAC_EMULATE_PLANT", "")
TORCH = Path(torch.__file__).parent


def _digest() -> str:
    digest = hashlib.sha256(" ".join([COMPILER, *FLAGS, torch.__version__, SANITIZER, PLANT]).encode())
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


def _planted(work: Path) -> Path:
    """The sources, or a copy with the planted fault."""
    if not PLANT:
        return ROOT / "csrc"
    name, good, bad = PLANTS[PLANT]
    shutil.copytree(ROOT / "csrc", work / "csrc")
    path = work / "csrc" / "cuda" / name
    text = path.read_text()
    assert text.count(good) == 1, f"{name} has {text.count(good)} of what the fault {PLANT!r} replaces"
    path.write_text(text.replace(good, bad))
    return work / "csrc"


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
            folder_of_sources = _planted(work) / "cuda"
            sanitizer = SANITIZERS[SANITIZER]
            objects = compile_units(sorted(folder_of_sources.glob("*.cu")), work, sanitizer)
            objects += compile_units(sorted(folder_of_sources.glob("*.cpp")), work, torch_flags)
            link = [COMPILER, "-shared", "-pthread", *sanitizer, *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
            subprocess.run([*link, "-o", str(work / "module.so")], check=True)
            (work / "module.so").replace(module)
            shutil.rmtree(work)
    return module


def load() -> None:
    """Make ``use_backend("cuda")`` run the emulated kernels; skips the test where there is no C++ compiler."""
    if shutil.which(COMPILER) is None or not (TORCH / "include/torch/csrc/stable/library.h").is_file():
        pytest.skip("no C++ compiler, or torch without headers")
    torch.ops.load_library(str(build()))
