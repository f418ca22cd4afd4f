"""benchmarks/mutate.py: its list fits the code as it stands, and leaves out none of the failures of tests/README.md."""

from __future__ import annotations

import importlib.util

import pytest
from test_map import FAILURES, ROOT, functions

SPEC = importlib.util.spec_from_file_location("mutate", ROOT / "benchmarks" / "mutate.py")
assert SPEC is not None and SPEC.loader is not None
mutate = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(mutate)

NEEDS_TWO_GPUS = {18}


@pytest.mark.parametrize("name", mutate.MUTATIONS)
def test_a_mutation_changes_one_place_and_names_its_tests(name):
    mutation = mutate.MUTATIONS[name]
    assert (ROOT / mutation.file).read_text().count(mutation.good) == 1 and mutation.good != mutation.bad
    assert all(functions(ROOT / name) for name in mutation.tests if name.endswith(".py"))


def test_every_failure_has_a_mutation():
    assert {m.failure for m in mutate.MUTATIONS.values()} - {None} == set(range(1, FAILURES + 1)) - NEEDS_TWO_GPUS
