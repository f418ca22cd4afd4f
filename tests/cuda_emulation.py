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
    # Without the checks of UBSan that AddressSanitizer makes too, and with its own as calls: quicker to compile.
    "address": [
        "-fsanitize=address,undefined", "-fno-sanitize=vptr,null,object-size,pointer-overflow",
        "--param=asan-instrumentation-with-call-threshold=0", "-fno-omit-frame-pointer", "-g1", "-O0",
    ],
    "thread": ["-fsanitize=thread", "-fno-omit-frame-pointer", "-g1"],
}  # fmt: skip
# Fault -> file under csrc/cuda, what stands there once, what takes its place, and the units that must be compiled anew:
# all that make the same function of it, or the linker may take a sound one.
PLANTS = {
    "off-by-one": (
        "row_memory.cuh", "return vector * Width + Width <= columns;", "return vector * Width < columns;",
        ("rows_short.cu",),
    ),
    "missing-barrier": (
        "rows.cuh", "        barrier();         // the facts are there\n", "", ("rows_short.cu",),
    ),
}  # fmt: skip
SANITIZER, PLANT = os.environ.get("GAC_EMULATE_SANITIZER", ""), os.environ.get("GAC_EMULATE_PLANT", "")
TORCH = Path(torch.__file__).parent


def _digest() -> str:
    digest = hashlib.sha256(" ".join([COMPILER, *FLAGS, *SANITIZERS[SANITIZER], torch.__version__]).encode())
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(units: list[Path], into: Path) -> None:
    """An object of each unit, compiled side by side."""
    torch_flags = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem", str(TORCH / "include")]

    def one(unit: Path) -> None:
        own = SANITIZERS[SANITIZER] if unit.suffix == ".cu" else torch_flags  # kernels are what the sanitizers watch
        command = [COMPILER, *FLAGS, *own, "-x", "c++", "-c", str(unit), "-o", str(into / f"{unit.name}.o")]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, units))


def _link(folder: Path) -> Path:
    objects = map(str, sorted(folder.glob("*.o")))
    command = [COMPILER, "-shared", "-pthread", *SANITIZERS[SANITIZER], *objects, f"-L{TORCH / 'lib'}", "-ltorch_cpu"]
    subprocess.run([*command, "-o", str(folder / "linking.so")], check=True)
    return (folder / "linking.so").replace(folder / "module.so")


def _planted(whole: Path) -> Path:
    """The module with the planted fault: the units that hold it compiled anew from changed sources."""
    name, good, bad, units = PLANTS[PLANT]
    folder = whole / PLANT
    shutil.copytree(ROOT / "csrc", folder / "csrc", dirs_exist_ok=True)
    path = folder / "csrc" / "cuda" / name
    text = path.read_text()
    assert text.count(good) == 1, f"{name} has {text.count(good)} of what the fault {PLANT!r} replaces"
    path.write_text(text.replace(good, bad))
    for sound in whole.glob("*.o"):
        shutil.copy(sound, folder)
    _compile([folder / "csrc" / "cuda" / unit for unit in units], folder)
    return _link(folder)


def build() -> Path:
    """The module, built if these sources were not."""
    folder = ROOT / "build" / f"emulated-{_digest()}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes of one test run come here at once
        if not (folder / "module.so").exists():
            here = ROOT / "csrc" / "cuda"
            _compile(sorted([*here.glob("*.cu"), *here.glob("*.cpp")]), folder)
            _link(folder)
        return _planted(folder) if PLANT else folder / "module.so"


def load() -> None:
    """Make ``use_backend("cuda")`` run the emulated kernels; skips the test where there is no C++ compiler."""
    if shutil.which(COMPILER) is None or not (TORCH / "include/torch/csrc/stable/library.h").is_file():
        pytest.skip("no C++ compiler, or torch without headers")
    torch.ops.load_library(str(build()))
