"""Compiles what the launcher launches, for GPUs that are not there, and reports on the machine code as JSON.

    python tests/triton_aot.py '[{"arch": 90, "policy": "GSPO()", "dtype": "float32"}, ...]'

Runs as a process of its own: the tests beside it have put triton into interpreter mode. Tensors are meta tensors, the
driver a stand-in that knows a target and cannot launch; the specialisation of arguments is triton's own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import gac_kernels as gk
from gac_kernels import schemas
from gac_kernels._triton.rows import fused_rows_, row_gradient, row_statistics
from gac_kernels._triton.scale import scale_
from gac_kernels._triton.token_loss import LAUNCH, token_loss
from gac_kernels._triton.token_weights import token_weights

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", re.MULTILINE)


class Driver:
    """A driver without a device. Each target counts as a device of its own: kernels are cached by device."""

    targets: ClassVar[list[GPUTarget]] = []

    def __init__(self, target: GPUTarget) -> None:
        if target not in self.targets:
            self.targets.append(target)
        index = self.targets.index(target)
        self.get_current_target = lambda: target
        self.get_current_device = lambda: index
        self.get_current_stream = lambda device=None: 0


compiled: list[tuple[str, Any]] = []  # the kernels of a call, in order; the same object if it was compiled before


def compile_instead_of_launching() -> None:
    launch = triton.JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        compiled.append((self.fn.__name__, launch(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.JITFunction.run = run


def call(
    policy: str = "SAPO()", dtype: str = "float32", *, S: int = 8, T: int = 64, packed: bool = False, full: bool = True,
    token_advantages: bool = False, **objective: Any,
) -> None:  # fmt: skip
    """One call of the operator; ``full``: with every optional input."""
    kind, N = getattr(torch, dtype), S * T
    made = gk.HybridObjective(eval(policy, vars(gk)), **objective)

    def meta(count: int | tuple[()], dtype: torch.dtype = kind) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, device="meta")

    optional = [meta(N) if full else None for _ in range(5)]
    cu_seqlens = meta(S + 1, torch.int64) if packed else None
    advantages = meta(N if token_advantages else S)
    token_loss(
        meta(N), meta(N, torch.bool), cu_seqlens, 0 if packed else T, meta(S, torch.bool), advantages, token_advantages,
        *optional, None, meta(S, torch.int64), meta(()), None, None, *schemas.encode(made, 100.0),
    )  # fmt: skip


def call_rows(
    rows: str, policy: str = "SAPO()", dtype: str = "float32", *, S: int = 8, T: int = 64, V: int = 4096,
    full: bool = True, gift: bool = False, entropy_coef: float = 0.0, softcap: float = 0.0, scale: float = 1.0,
) -> None:  # fmt: skip
    """One call of a row operator, ``rows``, or of `token_weights` or `scale_`."""
    kind, N = getattr(torch, dtype), S * T
    acc = torch.promote_types(kind, torch.float32)

    def meta(*shape: int, dtype: torch.dtype = acc) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits = meta(S, T + 1, V, dtype=kind)[:, :-1]
    if rows == "scale_":
        return scale_(logits, meta())
    if rows == "token_weights":
        weights = (1, 0, 100.0)
        args = meta(N, dtype=torch.bool), None, T, meta(S, dtype=torch.bool), meta(S), False, meta(), None, None
        return token_weights(*args, *weights)
    base = meta(S, T, V, dtype=kind) if gift else None
    leading = logits, meta(N, dtype=torch.int64), meta(N, dtype=torch.uint8), meta(N) if full else None, base
    static = scale, softcap, 1.0, 20.0, 0.0
    if rows == "row_statistics":
        row_statistics(*leading, *static)
    elif rows.startswith("row_gradient"):
        bonus = meta(N) if entropy_coef else None
        row_gradient(*leading, meta(N, 4 if gift else 2), meta(N), meta(N), bonus, *static)
    else:
        made = gk.HybridObjective(eval(policy, vars(gk)), kl_coef=0.1, entropy_coef=entropy_coef)
        optional = [meta(N) if full else None for _ in range(3)]
        fused_rows_(*leading, meta(N), meta(N), *optional, *static, *schemas.encode_term(made))


def machine_code(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()

        def dump(option: str) -> str:
            return subprocess.run([CUOBJDUMP, option, file.name], capture_output=True, text=True, check=True).stdout

        usage, sass = dump("-res-usage"), dump("-sass")
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return {**used, "instructions": Counter(INSTRUCTION.findall(sass)), "fusion": kernel.metadata.enable_fp_fusion}


def main(cases: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """For each case its kernels. ``identity`` says which of them are one compiled kernel."""
    compile_instead_of_launching()
    seen: list[Any] = []
    reports = []
    for case in cases:
        arguments = dict(case)
        arch = arguments.pop("arch", 90)
        amd = isinstance(arch, str)
        driver.set_active(Driver(GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", arch, 32)))
        LAUNCH.pop("maxnreg", None) if amd else LAUNCH.setdefault("maxnreg", 255)  # an option of one vendor
        compiled.clear()
        (call_rows if "rows" in arguments else call)(**arguments)
        kernels = []
        for name, kernel in compiled:
            fresh = not any(kernel is other for other in seen)
            seen += [kernel] if fresh else []
            identity = next(i for i, other in enumerate(seen) if other is kernel)
            code = (
                {} if not fresh else machine_code(kernel) if "cubin" in kernel.asm else {"text": kernel.asm["amdgcn"]}
            )
            kernels.append({"kernel": name, "identity": identity, **code})
        reports.append(kernels)
    return reports


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        print(json.dumps(main(json.loads(sys.argv[1]))))
