"""What nvcc made of csrc/cuda, read without a GPU: registers, stack, the width of loads, no float atomics.

Reads the module that GAC_CUDA_MODULE names (``.ci/cuda``), else the package's own if it was built.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULE = os.environ.get("GAC_CUDA_MODULE") or next((str(p) for p in (ROOT / "gac_kernels").glob("_CUDA*.so")), None)
pytestmark = pytest.mark.skipif(MODULE is None, reason="gac_kernels._CUDA was not built")


def _cuobjdump() -> str:
    folder = Path(os.environ["CUDA_HOME"]) / "bin" if "CUDA_HOME" in os.environ else None
    found = shutil.which("cuobjdump", path=str(folder) if folder else None)
    if found is None:  # the triton wheel brings one
        import triton

        found = str(Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return found


def _dump(option: str) -> str:
    return subprocess.run([_cuobjdump(), option, MODULE], capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> REG, STACK, LOCAL, ..."""
    found, arch = {}, ""
    lines = iter(_dump("-res-usage").splitlines())
    for line in lines:
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match.group(1)
        elif match := re.match(r"\s*Function (\S+):", line):
            numbers = re.findall(r"(\w+):(\d+)", next(lines))
            found[arch, match.group(1)] = {name: int(value) for name, value in numbers}
    return found


@pytest.fixture(scope="module")
def code() -> dict[tuple[str, str], list[str]]:
    """(architecture, kernel) -> its instructions with their modifiers."""
    found: dict[tuple[str, str], list[str]] = {}
    arch, into = "", []
    for line in _dump("-sass").splitlines():
        if match := re.match(r"arch = (sm_\w+)", line.strip()):
            arch = match.group(1)
        elif match := re.match(r"\s*Function : (\S+)", line):
            into = found.setdefault((arch, match.group(1)), [])
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            into.append(match.group(1))
    return found


def test_every_architecture_has_every_kernel(usage):
    kernels = {arch: {name for a, name in usage if a == arch} for arch, _ in usage}
    asked = os.environ.get("GAC_KERNELS_CUDA_ARCHITECTURES", "80 90a").split()  # as setup.py reads it
    assert {f"sm_{name}" for name in asked} <= set(kernels)
    assert len({frozenset(names) for names in kernels.values()}) == 1
    names = " ".join(next(iter(kernels.values())))
    for part in ("row_kernel", "scale_kernel", "token_loss_kernel", "advantages", "controller", "gradients"):
        assert part in names, part
    assert ".target sm_" in _dump("-ptx") or "sm_100" not in kernels  # for architectures to come


def test_nothing_lies_on_the_stack(usage):
    bad = {key: value for key, value in usage.items() if value["STACK"] > 0 or value["LOCAL"] > 0}
    assert not bad


def test_three_row_blocks_share_a_multiprocessor(usage):
    """80 registers at 256 threads; soft caps may have 128, float64 all there are."""
    for (arch, name), value in usage.items():
        if "row_kernel" in name:
            most = 255 if "WholeElementsIdE" in name else 128 if "ELb1E" in name else 80
            assert value["REG"] <= most, (arch, name)


def test_no_float_is_added_by_an_atomic(code):
    """Their order is the order in which blocks happen to come."""
    for key, instructions in code.items():
        bad = [i for i in instructions if re.match(r"(RED|ATOM|ATOMG|ATOMS)\b.*\.(F16|F32|F64|BF16)", i)]
        assert not bad, (key, bad)
        assert not [i for i in instructions if i.split(".")[0] in ("LDL", "STL")], key


def test_rows_move_by_16_bytes(code):
    seen = 0
    for (arch, name), instructions in code.items():
        if "row_kernel" not in name:
            continue
        seen += 1
        text = " ".join(instructions)
        fused = "RowTaskE2" in name
        assert re.search(r"LDG\.E\.\S*128", text), (arch, name)
        assert "LDGSTS.E.BYPASS.128" in text or not fused, (arch, name)
        assert re.search(r"STG\.E\.\S*128", text) or "RowTaskE0" in name, (arch, name)
        if fused and "WholeElementsIdE" not in name:
            assert "MUFU.EX2" in text
    assert seen == 24 * len({arch for arch, _ in code})  # 4 element types, 3 tasks, capped or not


def test_clusters_meet_in_shared_memory(code):
    """From sm_90 on the row kernels wait for their cluster; before, there are none."""
    for (arch, name), instructions in code.items():
        if "row_kernel" in name:
            assert any(i.startswith("UCGABAR") for i in instructions) == (arch != "sm_80"), (arch, name)
