"""The benchmark from hidden states: who takes part is right, what is wrong is seen, and the floor is the products."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import gac_kernels as gk
from gac_kernels.bench.case import Outputs
from gac_kernels.bench.cases import HiddenCase
from gac_kernels.bench.check import WrongResult
from gac_kernels.bench.eager import hidden_loss
from gac_kernels.bench.provider import verify
from gac_kernels.bench.providers import PROVIDERS
from gac_kernels.bench.session import run_case

HERE = HiddenCase.kernel


@pytest.mark.parametrize("ragged", [False, True], ids=["full", "ragged"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_ours_and_eager_are_right(dtype, ragged):
    if gk.backends()["cpu"].startswith("reference"):
        pytest.skip("this install has no compiled module")
    found = run_case(HiddenCase(32, 500, dtype, ragged=ragged), ["gac-cpu", "gac-reference", "eager"], modes=())
    assert not found.wrong and not found.absent


@pytest.mark.parametrize("name", ["liger", "trl", "verl", "compile"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peers_have_the_same_numbers(name, dtype):
    found = run_case(HiddenCase(32, 500, dtype), [name], modes=())
    assert not found.wrong
    if name in found.absent:
        pytest.skip(found.absent[name])


class _Distorted(torch.autograd.Function):
    """The identity, whose gradient has a spot."""

    @staticmethod
    def forward(ctx, value, distort):
        ctx.distort = distort
        return value.view_as(value)

    @staticmethod
    def backward(ctx, gradient):
        return ctx.distort(gradient.clone()), None


def _spot(place):
    def distort(gradient):
        gradient.view(-1)[place] += 0.02 * gradient.abs().max()
        return gradient

    return distort


SPOILT = {
    "hidden gradient": ("hidden", _spot(5)),
    "hidden gradient scaled": ("hidden", lambda g: 1.01 * g),
    "weight gradient scaled": ("weight", lambda g: 1.01 * g),
    "weight gradient nan": ("weight", lambda g: g * torch.nan),
    "weight gradient of one target": ("weight", lambda g: g * (torch.arange(len(g)) != 0)[:, None]),
}


@pytest.mark.parametrize("what", SPOILT)
def test_checker_sees(what):
    case = HiddenCase(32, 300)
    case.batch.targets[0, 0] = 0
    of, distort = SPOILT[what]

    def forward(leaf):
        b, inputs = case.batch, {"hidden": leaf, "weight": case._weight}
        inputs[of] = _Distorted.apply(inputs[of], distort)
        rest = b.targets, b.mask, b.is_expert, b.advantages, b.old_logprobs, case.mu
        return Outputs(hidden_loss(*inputs.values(), *rest, everything=False)[0])

    spoilt = replace(PROVIDERS[HERE]["eager-loss"](case), forward=forward)
    with pytest.raises(WrongResult, match=f"gradient of {of} is"):
        verify(spoilt, case)


def test_the_floor_is_the_products():
    found = run_case(HiddenCase(32, 300), ["eager"], budget_seconds=0)
    products, eager = found.find("products", "full"), found.find("eager", "full")
    assert products.floor_ratio == 1.0 and eager.floor_ratio == eager.p50 / products.p50
    assert found.rounds["full"] == HiddenCase.min_rounds
