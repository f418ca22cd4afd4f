"""Every test runs on memory that is poisoned when fresh, so that nothing passes by reading zeros it did not write."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads make runs several times slower beside other work
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# The same examples in every run, so that a change is judged by its own faults. Others: --hypothesis-profile=random.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.register_profile("random", derandomize=False, print_blob=True)
hypothesis.settings.load_profile("repeatable")

if not torch.cuda.is_available():
    # Read when triton is first imported: its kernels' tests run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` and its kin come filled with NaN (integers: their largest value)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = before[1]


def _forced(backend):
    import gac_kernels as gk

    if backend == "cpu" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    with gk.use_backend(backend):
        yield backend


@pytest.fixture(params=["reference", "cpu"])
def backend(request):
    yield from _forced(request.param)


@pytest.fixture(params=["reference", "cpu", "triton"])
def every_backend(request):
    """Triton in its interpreter where there is no GPU; on one the tests marked gpu have it."""
    from gac_kernels.library import has_triton

    if request.param == "triton" and (not has_triton or torch.cuda.is_available()):
        pytest.skip("tensors on a CPU need Triton and its interpreter")
    yield from _forced(request.param)
