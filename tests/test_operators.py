"""A raw operator gives a result or an error, whatever it is called with: nothing outside of a tensor is touched.

`.ci/sanitize` runs this file on a module built with AddressSanitizer, which sees what does not crash by itself.
"""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_support import MAKE, N, hostile

from gac_kernels import library, schemas

CHANGES = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 8)), min_size=1, max_size=3)


def overload(name: str, backend: str):
    """The operator's form; composites have one, which calls the others' own."""
    return getattr(
        torch.ops.gac_kernels, name if backend == "own" or name in schemas.COMPOSITES else f"{name}_{backend}"
    )


def test_every_operator_is_tried():
    assert set(MAKE) == {*schemas.SCHEMAS, *schemas.COMPOSITES}
    for name, make in MAKE.items():
        overload(name, "own")(*make(random.Random(0)))


def attack(name: str, backend: str, seed: int, changes: list[tuple[int, int]]) -> bool:
    """Whether the operator took the arguments."""
    rng = random.Random(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**31)
        args = MAKE[name](rng)
    for place, kind in {place % len(args): kind for place, kind in changes}.items():
        args[place] = hostile(args[place], kind, rng, shrink=backend == "own" and name not in schemas.COMPOSITES)
    try:
        overload(name, backend)(*args)
    except Exception:  # any error will do; a crash ends the process
        return False
    return True


def of_backend(backend: str) -> list[str]:
    return [name for name in MAKE if backend != "triton" or name in library._TRITON]


@pytest.mark.parametrize("name", of_backend("own"))
@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**31), changes=CHANGES)
def test_own_forms_take_anything(name, seed, changes):
    attack(name, "own", seed, changes)


@pytest.mark.parametrize("name", of_backend("reference"))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), changes=CHANGES)
def test_reference_forms_take_anything(name, seed, changes):
    if name not in schemas.COMPOSITES:
        attack(name, "reference", seed, changes)


@pytest.mark.skipif(
    not library.has_triton or torch.cuda.is_available(), reason="Triton's interpreter takes CPU tensors"
)
@pytest.mark.parametrize("name", of_backend("triton"))
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), changes=CHANGES)
def test_triton_forms_take_anything(name, seed, changes):
    attack(name, "triton", seed, changes)


@pytest.mark.parametrize("trim", [-1e9, -3.0, 0.5, 0.9, 1e18, float("nan")])
def test_places_counted_from_a_number_are_checked(trim):
    args = MAKE["controller_step"](random.Random(0))
    args[6] = trim
    for backend in ("own", "reference"):
        with pytest.raises((RuntimeError, ValueError), match="trim"):
            overload("controller_step", backend)(*args)


@pytest.mark.parametrize("offsets", [[0, N, 0, N], [-7, 4, 2, 2**62], [5, 3, 9, 8], [2**62, 0, 0, 0]])
def test_offsets_that_fall_leave_empty_sequences(offsets):
    """[0, N, 0, N]: everything is the first sequence's. An offset counts as no less than the one before it."""
    args = next(a for a in (MAKE["token_loss"](random.Random(seed)) for seed in range(20)) if a[2] is not None)
    args[2] = torch.tensor(offsets)
    rising = [min(max(offsets[: i + 1]), N) for i in range(len(offsets))]
    rising = [max(offset, 0) for offset in rising]
    wanted = overload("token_loss", "own")(*args[:2], torch.tensor(rising), *args[3:])
    for backend in ("own", "reference"):
        for got, want in zip(overload("token_loss", backend)(*args), wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-6)


def test_memory_that_was_freed_is_told():
    logits, *rest = MAKE["row_statistics"](random.Random(0))
    for size in (0, logits.untyped_storage().nbytes() // 2):
        gone = logits.clone()
        gone.untyped_storage().resize_(size)
        with pytest.raises(RuntimeError, match=r"logits must lie inside its storage, which holds \d+ bytes"):
            overload("row_statistics", "own")(gone, *rest)
