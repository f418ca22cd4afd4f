"""The compiled module on every instruction set this CPU has, and the binary itself."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from token_loss_arguments import ulps

import gac_kernels as gk

pytestmark = pytest.mark.skipif(
    not gk.backends()["cpu"].startswith("cpu:"), reason="this install has no compiled module"
)

ISA_NAMES = ("avx512", "avx2", "portable")
ISA_PROGRAM = """
import json
import token_loss_arguments as t
from support import POLICIES
from gac_kernels import _C
for policy in POLICIES:
    for dtype in (t.torch.float32, t.torch.float64):
        objective = t.gk.HybridObjective(policy, kl_coef=0.05, entropy_coef=0.01)
        for kwargs in (dict(), dict(optional=(t.OLD,)), dict(spread=12.0, token_advantages=True)):
            t.check(t.arguments(objective, dtype=dtype, **kwargs))
print(json.dumps([_C.instruction_set(), t.ulps()]))
"""


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path} | environment, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip


def instruction_set() -> str:
    from gac_kernels import _C

    return _C.instruction_set()


@pytest.mark.parametrize("isa", ISA_NAMES)
def test_every_instruction_set(isa):
    """Those this CPU has are as accurate as the best; one it lacks is refused at import, not replaced."""
    result = run_python(ISA_PROGRAM, GAC_KERNELS_ISA=isa)
    if "GAC_KERNELS_ISA" not in os.environ and ISA_NAMES.index(isa) < ISA_NAMES.index(instruction_set()):
        assert result.returncode != 0
        assert "ImportError: GAC_KERNELS_ISA must be" in result.stderr
        return
    assert result.returncode == 0, result.stderr
    name, ulp = json.loads(result.stdout.splitlines()[-1])
    assert name == isa
    assert {key: u for key, u in ulp.items() if u > 4} == {}


def test_an_unknown_instruction_set_is_refused():
    result = run_python("import gac_kernels", GAC_KERNELS_ISA="sse9")
    assert result.returncode != 0
    assert "ImportError: GAC_KERNELS_ISA must be one of portable, avx2, avx512" in result.stderr
    assert "'sse9'" in result.stderr


def test_polynomials_to_a_few_ulp():
    assert {name: u for name, u in ulps().items() if u > 4} == {}


# The binary -----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(shutil.which("nm") is None or platform.system() != "Linux", reason="needs nm and an ELF binary")
def test_the_binary_asks_torch_for_stable_symbols_only():
    from gac_kernels import _C

    listing = subprocess.run(["nm", "-D", "--undefined-only", _C.__file__], capture_output=True, text=True, check=True)
    undefined = [line.split()[-1] for line in listing.stdout.splitlines()]
    ours = [s for s in undefined if "@" not in s]  # symbols with a version come from libc, libm, libgcc and libstdc++
    # std:: has none where the torch that was linked against exports a copy of it, as libtorch_cpu of 2.11 does.
    allowed = re.compile(r"(aoti_torch_|torch_|Py[A-Z]|_Py|__cxa_|_ITM_|__gmon_|__asan_|__ubsan_|__sanitizer)")
    libstdcxx = re.compile(r"_ZNK?St(?!.*(2at|3c10|5torch))")  # nor std:: of what is torch's
    assert [s for s in ours if not allowed.match(s) and not libstdcxx.match(s)] == []
    assert any(s.startswith("aoti_torch_") for s in ours)
