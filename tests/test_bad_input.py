"""Every public function and class refuses what does not fit, by an error that names the argument and what came."""

from __future__ import annotations

import inspect

import pytest
import torch
from bad_input import KINDS, Row
from bad_input_losses import LOSS_ROWS
from bad_input_settings import SETTING_ROWS

import gac_kernels as gk

ROWS = [*LOSS_ROWS, *SETTING_ROWS]
# What the package returns, and what takes no argument.
TAKES_NOTHING = {"HybridLoss", "REINFORCE", "Token", "TokenLogprobs", "backends"}


def test_every_public_name_is_in_the_table():
    assert {row.name for row in ROWS} == set(gk.__all__) - TAKES_NOTHING
    assert not inspect.signature(gk.backends).parameters
    assert {row.kind for row in ROWS} == set(KINDS)


def test_every_loss_meets_every_kind_of_wrong_tensor():
    losses = {name for name in gk.__all__ if "loss" in name.lower() or "logprobs" in name.lower()} - TAKES_NOTHING
    for name in sorted(losses):
        met = {row.kind for row in ROWS if row.name == name}
        assert {"type", "dtype", "shape", "device"} <= met, name


def check(row: Row) -> None:
    with pytest.raises(row.error) as raised:
        row.call()
    # A subclass is another matter: torch's own OutOfMemoryError is a RuntimeError, json's a ValueError.
    assert type(raised.value) is row.error
    text = str(raised.value)
    assert row.argument in text and row.came in text, text


@pytest.mark.parametrize(
    "row", ROWS, ids=[f"{row.name}-{row.kind}-{row.argument}-{i}".replace(" ", "_") for i, row in enumerate(ROWS)]
)
def test_what_does_not_fit_is_refused_by_name(row):
    check(row)


@pytest.mark.parametrize(
    ("error", "text"), [(ValueError, "got 2.5"), (ValueError, "mu is wrong"), (TypeError, "mu: got 2.5")]
)
def test_the_check_can_fail(error, text):
    """An error of another type, one that does not name the argument, and one that does not say what came."""

    def call():
        raise error(text)

    with pytest.raises((AssertionError, TypeError)):
        check(Row("hybrid_loss", "range", call, ValueError, "mu", "2.5"))
    check(Row("hybrid_loss", "range", call, error, "", ""))


def test_a_refused_call_leaves_its_arguments_alone():
    logits = torch.randn(3, 5, 7, requires_grad=True)
    before = logits.detach().clone()
    targets = torch.full((3, 5), 7)
    batch = gk.TokenBatch.from_padded(targets, torch.ones(3, 5), advantages=torch.ones(3))
    with pytest.raises(ValueError, match=r"batch\.targets"):
        gk.hybrid_loss_from_logits(logits, batch, gk.HybridObjective(), 0.5, inplace=True)
    assert torch.equal(logits, before) and logits.grad is None
