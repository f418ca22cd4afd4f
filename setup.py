"""Builds gac_kernels._C, the CPU kernels, and gac_kernels._CUDA: LibTorch stable ABI, limited Python API, one wheel for
many of both.

torch is found on disk, not imported, so that an isolated build needs no copy of its own. Where torch's headers or a
C++ compiler are missing the package installs without the extension and computes on the CPU with its eager reference;
``gac_kernels.backends()`` tells. Environment:

* ``GAC_KERNELS_REQUIRE_EXT=1``: fail rather than install without the extension;
* ``GAC_KERNELS_SKIP_EXT=1``: do not try to build the CPU kernels;
* ``GAC_KERNELS_SANITIZE=1``: build with the address and undefined-behaviour sanitizers (for tests);
* ``GAC_KERNELS_CUDA=1``: build the CUDA kernels, also beside a torch for the CPU (no GPU is needed), or fail; ``0``: do
  not. By default they are built where nvcc is found and torch is one for CUDA;
* ``GAC_KERNELS_CUDA_ARCHITECTURES="90a"``: for these alone, without PTX; by default 80, 90a, 100 and PTX.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has no limited API yet

COMMON_FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# One unit an instruction set, chosen at run time. Never -march=native: the wheel may run elsewhere.
AVX512, AVX2 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], ["-mavx2", "-mfma", "-mf16c"]
UNIT_FLAGS = {
    f"{unit}_{isa}.cpp": flags
    for unit in ("token_loss", "rows", "gradient_moments")
    for isa, flags in (("avx512", AVX512), ("avx2", AVX2))
}
# fmad: what the kernels do not write as one stays two roundings, as on the CPU. A spilled register is an error.
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "--threads=2", "-Werror", "all-warnings",
              "-Xptxas", "-warn-spills,-Werror", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"]  # fmt: skip
# Without the checks that AddressSanitizer makes too, and with its own as calls: less than half the time to compile.
SANITIZERS = [
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize=vptr,null,object-size,pointer-overflow",
]
SANITIZER_FLAGS = ["-O1", "-fno-omit-frame-pointer", "-g1", "--param=asan-instrumentation-with-call-threshold=0"]


def enabled(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def say(*lines: str) -> None:
    bar = "*" * 100
    print(bar, *(f"* {line}" for line in lines), bar, sep="\n", file=sys.stderr, flush=True)


def without_extension(why: str) -> None:
    if enabled("GAC_KERNELS_REQUIRE_EXT"):
        raise SystemExit(f"gac_kernels: the compiled module cannot be built: {why} (GAC_KERNELS_REQUIRE_EXT is set)")
    say(
        f"gac_kernels is installed WITHOUT its compiled CPU kernels: {why}.",
        "It works, but losses on the CPU run in eager PyTorch, many times slower. To get the kernels, install",
        "torch >= 2.10 and a C++17 compiler (g++ or clang++) first; then, with GAC_KERNELS_REQUIRE_EXT=1 set,",
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps .",
    )


def find_torch() -> Path | None:
    """The directory of the torch package that the build's interpreter would see, in an isolated build too."""
    spec = importlib.util.find_spec("torch")
    candidates = list(spec.submodule_search_locations or []) if spec else []
    for prefix in dict.fromkeys((sys.prefix, sys.base_prefix)):
        variables = {"base": prefix, "platbase": prefix}
        candidates += [f"{sysconfig.get_path(name, vars=variables)}/torch" for name in ("purelib", "platlib")]
    found = (Path(c) for c in candidates if (Path(c) / "include/torch/csrc/stable/library.h").is_file())
    return next(found, None)


class BuildExtension(build_ext):
    """Gives every unit its own flags, compiles units side by side, and can let the installation go on without them."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == "gac_kernels._CUDA":
            ext.extra_objects = compile_cuda(Path(self.build_temp))
        try:
            if not hasattr(self.compiler, "_compile"):
                raise CCompilerError(f"compilers of type {self.compiler.compiler_type} are not supported")
            self._give_units_their_flags()
            super().build_extension(ext)
        except (CCompilerError, OSError) as error:
            without_extension(f"compiling it failed: {error}")

    def _give_units_their_flags(self) -> None:
        compile_one, compile_all = self.compiler._compile, self.compiler.compile

        def compile_unit(obj, src, ext, cc_args, extra_postargs, pp_opts):  # type: ignore[no-untyped-def]
            flags = UNIT_FLAGS.get(Path(src).name, []) if X86 else []
            compile_one(obj, src, ext, cc_args, [*extra_postargs, *flags], pp_opts)

        def compile_side_by_side(sources, *args, **kwargs):  # type: ignore[no-untyped-def]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], *args, **kwargs), sources)
                return [name for names in objects for name in names]

        self.compiler._compile, self.compiler.compile = compile_unit, compile_side_by_side


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=str(Path(home) / "bin") if home else None)


def cuda_architectures(nvcc: str) -> list[str]:
    """Code for Ampere (also 8.6 and 8.9), Hopper and Blackwell, and PTX for what comes after, of those nvcc knows."""
    if asked := os.environ.get("GAC_KERNELS_CUDA_ARCHITECTURES", "").split():
        return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in asked]
    text = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [number for number in ("80", "90", "100") if f"compute_{number}\n" in text]
    names = ["90a" if number == "90" else number for number in known]
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*code, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]


def compile_cuda(folder: Path) -> list[str]:
    """Objects of csrc/cuda/*.cu: nvcc sees no header of torch's or Python's."""
    nvcc = find_nvcc()
    assert nvcc is not None
    folder.mkdir(parents=True, exist_ok=True)

    def compile_unit(source: str) -> str:
        target = str(folder / f"{Path(source).stem}.cu.o")
        subprocess.run([nvcc, *NVCC_FLAGS, *cuda_architectures(nvcc), "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count()) as pool:
        return list(pool.map(compile_unit, sources("csrc/cuda/*.cu")))


def cuda_runtime(nvcc: str) -> str:
    """The folder of libcudart_static.a, which makes the module independent of the CUDA runtime that torch brings."""
    told = subprocess.run([nvcc, "--dryrun", "-c", "nothing.cu"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", told, re.MULTILINE)
    roots = [Path(top.group(1))] if top else []
    found = [path for root in roots for path in (*root.glob("lib*"), *root.glob("targets/*/lib"))]
    return next(str(path) for path in found if (path / "libcudart_static.a").is_file())


def cuda_extension(torch: Path, common: dict) -> list[Extension]:
    asked, nvcc = os.environ.get("GAC_KERNELS_CUDA", ""), find_nvcc()
    if asked == "0" or (not asked and (nvcc is None or not (torch / "lib/libtorch_cuda.so").is_file())):
        return []
    if nvcc is None:
        raise SystemExit("gac_kernels: GAC_KERNELS_CUDA is set, but there is no nvcc in CUDA_HOME or on the PATH")
    return [
        Extension(
            "gac_kernels._CUDA",
            sources=sources("csrc/cuda/*.cpp"),
            depends=["setup.py", *sources("csrc/*.h", "csrc/*/*.h", "csrc/cuda/*.cu", "csrc/cuda/*.cuh")],
            **common | {
                "library_dirs": [*common["library_dirs"], cuda_runtime(nvcc)],
                "libraries": [*common["libraries"], "cudart_static", "dl", "rt", "pthread"],
            },
        )
    ]  # fmt: skip


def extensions() -> list[Extension]:
    torch = find_torch()
    if torch is None:
        return without_extension("the headers of torch >= 2.10 were not found in this environment") or []
    sanitize = [*SANITIZERS, *SANITIZER_FLAGS] if enabled("GAC_KERNELS_SANITIZE") else []
    common = {
        "define_macros": [
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
            *([("Py_LIMITED_API", "0x030a0000")] if LIMITED_API else []),
        ],
        # -isystem: torch's headers are not ours to keep free of warnings
        "extra_compile_args": [*COMMON_FLAGS, *sanitize, "-isystem", str(torch / "include")],
        "extra_link_args": [*sanitize, *(["-Wl,-s"] if sys.platform == "linux" and not sanitize else [])],
        "library_dirs": [str(torch / "lib")],
        "libraries": ["torch_cpu"],
        "language": "c++",
        "py_limited_api": LIMITED_API,
        "optional": not enabled("GAC_KERNELS_REQUIRE_EXT"),
    }
    if enabled("GAC_KERNELS_SKIP_EXT"):
        return without_extension("GAC_KERNELS_SKIP_EXT is set") or cuda_extension(torch, common)
    compiled = Extension(
        "gac_kernels._C",
        sources=sources("csrc/*.cpp", "csrc/cpu/*.cpp"),
        depends=["setup.py", *sources("csrc/*.h", "csrc/*/*.h")],
        **common,
    )
    return [compiled, *cuda_extension(torch, common)]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {},
)
