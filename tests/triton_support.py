"""Compares the Triton kernels with the reference: in Triton's interpreter or, where there is a GPU, compiled."""

from __future__ import annotations

import os
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import triton_watch
from support import Case
from torch import Tensor

import gac_kernels as gk
from gac_kernels import signals

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("without a GPU these tests need TRITON_INTERPRET=1 before triton is imported, see conftest.py")

if DEVICE == "cpu":
    triton_watch.patch_languages_once_a_launch()
    triton_watch.patch_rounding_to_bfloat16()
interpreted_only = pytest.mark.skipif(DEVICE != "cpu", reason="looks into Triton's interpreter")


# Comparing -------------------------------------------------------------------------------------------------------
def within(name: str, got: Tensor, want: Tensor, *, ulps: float = 4, floor: float | Tensor = 1e-6) -> None:
    """float32: within ``ulps`` units in the last place of ``want`` (float64) plus ``floor``; float64: 1e-11 of both."""
    got, want = got.detach().cpu(), want.detach().double().reshape(got.shape)
    if got.dtype == torch.float64:
        bound = 1e-11 * (1 + want.abs())
    else:
        near = want.float()
        bound = ulps * (torch.nextafter(near.abs(), torch.tensor(torch.inf)) - near.abs()).double() + floor
    wrong = ~((got.double() - want).abs() <= bound) & ~(got.isnan() & want.isnan()) & (got.double() != want)
    if wrong.any():
        at = tuple(torch.nonzero(wrong)[0].tolist())
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} off; at {at} {got[at]!r}, expected {want[at]!r}"
        )


def check_signals(got: Tensor, want: Tensor) -> None:
    """Columns of :class:`gk.Signals` rows, each from terms within 4 ulp. A square has twice the relative error of its
    root; a sum of terms of both signs has the error of its terms; the norm ``n = 1 - 2 p + sum p^2`` that of 1."""
    want = want.reshape(got.shape)
    own2 = torch.where(want[:, signals.EXPERT] > 0, want[:, signals.CS2], want[:, signals.CR2])
    squares = signals.DISAGREEMENT, signals.CS2, signals.CR2, signals.CSCR, signals.OWN_NORM, signals.DIFF_NORM
    sizes = {  # of the terms, where it is not that of their sum
        signals.CR: (want[:, signals.TOKENS] * want[:, signals.CR2]).sqrt(),
        signals.CSCR: (want[:, signals.CS2] * want[:, signals.CR2]).sqrt(),
        signals.OWN_NORM: own2 / 4,
        signals.DIFF_NORM: want[:, signals.DISAGREEMENT] / 4,
    }
    for column in range(got.shape[1]):
        ulps = 8 if column in squares else 4
        floor = 1e-6 + ulps * 2.0**-23 * sizes.get(column, torch.zeros_like(own2))
        within(f"rows, {signals.SIGNAL_COLUMNS[column]}", got[:, column], want[:, column], ulps=ulps, floor=floor)


def convert(batch: gk.TokenBatch, dtype: torch.dtype | None, device: str) -> gk.TokenBatch:
    """A copy on ``device``, its floating point tensors in ``dtype``."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device, dtype if dtype is not None and value.is_floating_point() else None)

    return replace(batch, **{f.name: one(getattr(batch, f.name)) for f in fields(batch)})


def check(
    case: Case, objective: gk.HybridObjective, mu: float = 0.3, layout: str = "padded", *, denominators=None, floor=1e-6
) -> gk.HybridLoss:
    """Everything that one call on Triton returns against the float64 reference on the same rounded inputs."""
    if layout == "packed" and objective.norm_length is None:
        objective = replace(objective, norm_length=float(case.T))
    batch, extra = getattr(case, layout)()
    mu = float(torch.tensor(mu, dtype=case.dtype))  # 1 - mu, for mu near 1, makes much of its rounding
    given = None if denominators is None else gk.Denominators(*denominators)

    def run(batch, dtype, device, loss):
        inputs = {k: None if v is None else v.detach().to(device, dtype).requires_grad_() for k, v in extra.items()}
        entropy = inputs["entropy"]
        out = loss(
            inputs["logprobs"], convert(batch, dtype, device), objective, mu, entropy=entropy,
            sum_sq=inputs["sum_sq"], denominators=given,
        )  # fmt: skip
        grads = torch.autograd.grad(out.loss, [inputs["logprobs"]] + ([] if entropy is None else [entropy]))
        return out, grads

    want, want_grads = run(batch, torch.float64, "cpu", gk_reference)
    with gk.use_backend("triton"):
        out, grads = run(batch, case.dtype, DEVICE, gk.hybrid_loss)
    for name in ("loss", "policy_loss", "supervised_loss", "kl", "entropy"):
        within(name, getattr(out, name), getattr(want, name))
    check_signals(out.signals.rows, want.signals.rows)
    assert out.metrics.keys() == want.metrics.keys()
    for name, value in out.metrics.items():
        within(name, value, want.metrics[name])
    for name, grad, want_grad in zip(("slope", "entropy slope"), grads, want_grads, strict=False):
        within(name, grad, want_grad, floor=floor)
        assert not grad.cpu()[~batch.mask].any(), f"a dead place has a {name}"
    shown = torch.where(batch.mask, extra["logprobs"], 0.0)
    torch.testing.assert_close(out.logprobs.cpu(), shown, rtol=0, atol=0, equal_nan=True)
    return out


def gk_reference(*args: Any, **kwargs: Any) -> gk.HybridLoss:
    with gk.use_backend("reference"):
        return gk.hybrid_loss(*args, **kwargs)


def operator(name: str, case: Case, objective: gk.HybridObjective, layout: str = "padded", **changes: Any) -> tuple:
    """The operator itself, past the checks of TokenBatch; ``changes`` replace arguments of the schema by name."""
    from gac_kernels import schemas

    batch, extra = getattr(case, layout)()
    given = {
        "logprobs": extra["logprobs"], "mask": batch.mask, "cu_seqlens": batch.cu_seqlens,
        "seq_len": batch.max_length or 0, "is_expert": batch.is_expert, "advantages": batch.advantages,
        "token_advantages": case.adv.ndim == 2, "old_logprobs": batch.old_logprobs, "ref_logprobs": batch.ref_logprobs,
        "rollout_weights": batch.rollout_weights, "entropy": extra["entropy"], "sum_sq": extra["sum_sq"],
        "supervised": None, "groups": batch.groups, "mu": torch.tensor(0.3, dtype=case.dtype),
        "policy_denominator": None, "supervised_denominator": None,
    }  # fmt: skip
    keep = ("cu_seqlens", "is_expert", "groups", "mu", "policy_denominator", "supervised_denominator")
    args = [
        value.to(DEVICE) if isinstance(value, Tensor) and name in keep
        else value.reshape(-1).to(DEVICE) if isinstance(value, Tensor)
        else value
        for name, value in (given | changes).items()
    ]  # fmt: skip
    return getattr(torch.ops.gac_kernels, name)(*args, *schemas.encode(objective, float(case.T)))
