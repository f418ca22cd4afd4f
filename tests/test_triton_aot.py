"""The Triton kernels' machine code, made without a GPU by the compiler and read with the tools inside the triton wheel.

A representative set by default, every variant with GAC_TEST_AOT=full (some minutes).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import chain, product
from pathlib import Path

import pytest

FULL = os.environ.get("GAC_TEST_AOT") == "full"
SOME = [
    {"policy": "SAPO('sigmoid')", "arch": 90, "dtype": "float32", "packed": False},
    {"policy": "SAPO('erf')", "arch": 90, "dtype": "float64", "packed": True},
    {"policy": "SAPO('arctan')", "arch": 80, "dtype": "float32", "packed": False},
    {"policy": "SAPO('softsign')", "arch": 100, "dtype": "float64", "packed": False},
    {"policy": "GRPO()", "arch": 100, "dtype": "float32", "packed": False},
    {"policy": "CISPO()", "arch": 80, "dtype": "float64", "packed": True, "token_advantages": True},
    {"policy": "GSPO()", "arch": 80, "dtype": "float32", "packed": False},
    {"policy": "DFPO()", "arch": 90, "dtype": "float32", "packed": True},
]
ROWS = [
    *({"rows": "fused_rows_", "arch": arch, "dtype": "bfloat16"} for arch in (80, 90, 100)),
    *({"rows": "fused_rows_", "arch": 90, "dtype": dtype} for dtype in ("float32", "float16", "float64")),
    {"rows": "fused_rows_", "arch": 90, "dtype": "bfloat16", "V": 1000},
    {"rows": "fused_rows_", "arch": 90, "dtype": "bfloat16", "gift": True, "entropy_coef": 0.1, "softcap": 5.0},
    {"rows": "row_statistics", "arch": 90, "dtype": "bfloat16"},
    {"rows": "row_gradient", "arch": 100, "dtype": "bfloat16", "entropy_coef": 0.1},
    {"rows": "scale_", "arch": 90, "dtype": "bfloat16"},
    {"rows": "token_weights", "arch": 90},
]
POLICIES = (*(case["policy"] for case in SOME), "DFPO('adv_orthogonal', 'product')")
TARGETS = (
    {"arch": 80}, {"arch": 100}, {"arch": 90}, {"arch": 90, "packed": True, "token_advantages": True},
    {"arch": 90, "full": False},
)  # fmt: skip
ALL = [{"policy": p, "dtype": d, **target} for p, d, target in product(POLICIES, ("float32", "float64"), TARGETS)]
AMD = [{"policy": policy, "arch": "gfx942", "dtype": d} for policy in POLICIES for d in ("float32", "float64")]
VARIANTS, AMD = ([*ALL, *ROWS], AMD) if FULL else ([*SOME, *ROWS], [])
# Numbers that change from step to step, from the first of each list on. 1, 16 and 2^31 are what triton specialises on.
SIZES = [{"S": S, "T": T} for S, T in ((8, 64), (1, 64), (16, 1), (300, 16), (7, 77), (32, 2**27))]
FLOATS = [
    {"policy": "SAPO('sigmoid', 2.0, 3.0)", "kl_coef": 0.5, "entropy_coef": 0.125},
    {"policy": "SAPO('sigmoid', 0.1, 12.0)", "kl_coef": 1.0, "entropy_coef": 1.0},
]
REPEATED = [
    [{**size, "policy": p, "packed": q} for size in SIZES] for p, q in (("SAPO('sigmoid')", False), ("DFPO()", True))
]
REPEATED[0] += FLOATS
# Rows, of which two fit into a level-1 cache and longer ones: more than 2^31 logits, rows that begin anywhere, one row,
# another scale.
MEDIUM = [(8, 64, 4096), (16, 2**16, 50257), (7, 2**20, 2049), (1, 1, 2**16)]
LONG = [(1, 1, 151936), (300, 16, 2**20), (3, 2**14, 151937)]
for lengths in (MEDIUM, LONG):
    REPEATED.append([{"rows": "fused_rows_", "dtype": "bfloat16", "S": S, "T": T, "V": V} for S, T, V in lengths])
REPEATED[2].append({"rows": "fused_rows_", "dtype": "bfloat16", "scale": 0.5, "policy": "SAPO('sigmoid', 3.0, 4.0)"})


@pytest.fixture(scope="module")
def kernels() -> list[list[dict]]:
    """What tests/triton_aot.py says about every case, in one process of its own: see there."""
    cases = [*VARIANTS, *chain(*REPEATED), *AMD]
    script = Path(__file__).with_name("triton_aot.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    # Contraction is on where the launcher says nothing: the default until Triton 3.10.
    environment |= {"PYTHONPATH": str(script.parents[1]), "TRITON_DEFAULT_FP_FUSION": "1"}
    run = subprocess.run([sys.executable, script, json.dumps(cases)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def name(case: dict) -> str:
    return "-".join(str(v).replace(" ", "") for v in case.values())


@pytest.mark.parametrize("index", range(len(VARIANTS)), ids=[name(case) for case in VARIANTS])
class TestMachineCode:
    def fresh(self, kernels, index):
        """Kernels first compiled for this case; others are looked at where they first occur."""
        return [kernel for kernel in kernels[index] if "instructions" in kernel]

    def test_nothing_spills(self, kernels, index):
        for kernel in self.fresh(kernels, index):
            found = kernel["kernel"], kernel["REG"], kernel["STACK"], kernel["LOCAL"]
            assert kernel["STACK"] == kernel["LOCAL"] == 0, found
            assert not any(op.startswith(("STL", "LDL")) for op in kernel["instructions"]), found

    def test_no_atomics(self, kernels, index):
        for kernel in self.fresh(kernels, index):
            assert not any(op.startswith(("RED.", "ATOM")) for op in kernel["instructions"]), kernel["kernel"]

    def test_tokens_travel_in_sixteen_bytes(self, kernels, index):
        """Every token tensor has a 16-byte path, also in a packed batch: it is taken where a sequence begins on one."""
        case, token = VARIANTS[index], next((k for k in self.fresh(kernels, index) if k["kernel"] == "token"), None)
        if token is None:
            pytest.skip("this kernel is that of an earlier case")
        full = case.get("full", True)
        loads = 1 + 5 * full + case.get("token_advantages", False)  # logprobs; old, ref, rollout, entropy, sum_sq
        assert token["instructions"].get("LDG.E.128", 0) >= loads
        assert token["instructions"].get("STG.E.128", 0) >= 2 + full

    def test_logits_travel_in_sixteen_bytes(self, kernels, index):
        """Both looks at a row, and the gradient."""
        row = next((k for k in self.fresh(kernels, index) if k["kernel"] == "row_kernel"), None)
        if row is None:
            pytest.skip("not a row kernel, or that of an earlier case")
        fused, written = "fused" in VARIANTS[index]["rows"], VARIANTS[index]["rows"] != "row_statistics"
        assert row["instructions"].get("LDG.E.128", 0) >= 1 + fused
        assert row["instructions"].get("STG.E.128", 0) >= written

    def test_contraction_is_pinned(self, kernels, index):
        assert not any(kernel["fusion"] for kernel in self.fresh(kernels, index))


@pytest.mark.parametrize("group", range(len(REPEATED)), ids=["padded", "packed", "rows", "long-rows"])
def test_a_new_length_or_number_compiles_nothing(kernels, group):
    first = len(VARIANTS) + sum(map(len, REPEATED[:group]))
    runs = kernels[first : first + len(REPEATED[group])]
    identities = [[(kernel["kernel"], kernel["identity"]) for kernel in run] for run in runs]
    assert len(identities[0]) == (3, 4, 1, 1)[group]
    assert all(run == identities[0] for run in identities[1:])


def test_the_counter_counts(kernels):
    """Another objective is another token kernel."""
    first = len(VARIANTS)
    one, other = ({k["kernel"]: k["identity"] for k in kernels[i]} for i in (first, first + len(REPEATED[0])))
    assert one["token"] != other["token"]


@pytest.mark.skipif(not FULL, reason="compiled with GAC_TEST_AOT=full")
@pytest.mark.parametrize("case", AMD or [{}], ids=name)
def test_amd(kernels, case):
    """Compiled for the other vendor too: no vector register spilled, no scratch memory."""
    for kernel in kernels[len(kernels) - len(AMD) + AMD.index(case)]:
        if "text" in kernel:
            used = dict(re.findall(r"\.(vgpr_spill_count|private_segment_fixed_size):\s+(\d+)", kernel["text"]))
            assert used == {"vgpr_spill_count": "0", "private_segment_fixed_size": "0"}, kernel["kernel"]
