"""triton_grpo_loss against Liger's kernels, on a CPU in Triton's interpreter, and against the formulas written out."""

from __future__ import annotations

import pytest
import torch
from liger_support import (
    CASES,
    EPS,
    B,
    T,
    V,
    close,
    data,
    function_options,
    installed,
    logp_from_hidden,
    logp_of,
    near,
    written_out,
)

from gac_kernels.integrations.liger import triton_grpo_loss

SIMPLE = CASES["defaults"]


def from_logits(function, made, case, reduce, inplace, device="cpu"):
    """The results and the gradient of the logits; with one upstream weight a token where nothing is reduced."""
    made = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in made.items()}
    old, ref = near(logp_of(made["logits"][:, :-1].double(), made["ids"], case["temperature"]), made, case)
    leaf = made["logits"].clone().requires_grad_()
    logits = leaf * 1.0
    results = function(
        logits, old, ref if case["beta"] else None, made["ids"], made["advantages"], made["mask"], reduce=reduce,
        inplace=inplace, vllm_is_ratio=made["weights"], num_items_in_batch=case["items"], **function_options(case),
    )  # fmt: skip
    loss = results[0]
    loss.backward(upstream(loss))
    return results, leaf.grad, logits


def upstream(loss):
    return torch.ones_like(loss) if loss.ndim == 0 else torch.linspace(0.2, 2.0, B * T).view(B, T).to(loss)


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_from_logits_is_the_formula(name, reduce, inplace):
    case = CASES[name]
    made = data(case, torch.float32)
    results, gradient, logits = from_logits(triton_grpo_loss, made, case, reduce, inplace)
    assert torch.equal(logits.detach(), gradient) if inplace else torch.equal(logits.detach(), made["logits"])
    leaf = made["logits"].double().requires_grad_()
    logp = logp_of(leaf[:, :-1], made["ids"], case["temperature"])
    old, ref = near(logp, made, case)
    loss, kl, clipped, reduced, metrics = written_out(logp, old, ref, made, case)
    wanted = reduced if reduce else loss
    wanted.backward(upstream(wanted))
    close(results[0].detach(), wanted.detach())
    close(gradient, leaf.grad)
    assert not gradient[:, -1].any()
    if reduce:
        assert isinstance(results[1], list) and len(results[1]) == len(metrics)
        for ours, right in zip(results[1], metrics, strict=True):
            close(ours, right)
    else:
        assert torch.equal(results[2].double(), clipped) and results[2].dtype == torch.float32
        assert results[1] is None if case["beta"] == 0 else close(results[1], kl) is None


@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_from_logits_is_ligers_own(name, reduce):
    """Liger's kernels, on a CPU in Triton's interpreter."""
    case = CASES[name]
    theirs = installed("liger_kernel.transformers.grpo_loss:triton_grpo_loss")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = data(case, torch.float32, seed=1)
    ours = from_logits(triton_grpo_loss, made, case, reduce, inplace=True, device=device)
    other = from_logits(theirs, made, case, reduce, inplace=True, device=device)
    assert type(ours[0]) is type(other[0]) and type(ours[0][1]) is type(other[0][1])
    flat = [
        [loss, *rest] if isinstance(rest, list) else [loss, rest, *more] for (loss, rest, *more), *_ in (ours, other)
    ]
    for mine, liger_s in zip(*flat, strict=True):
        assert (mine is None) == (liger_s is None)
        if mine is not None:
            assert mine.dtype == liger_s.dtype
            close(mine.detach(), liger_s.detach(), 64 * EPS)
    # Two gradients of 0.8.5's kernels are not those of its loss, as the formulas show. Token-level luspo, reduced: its
    # (B, 1) upstream gradient is walked with two strides of 1, past its end. A delta under the upper clip: where it
    # leaves the minimum to the second ratio, that one is taken for clipped though it is not.
    strided = reduce and case["kind"] == "luspo" and case["level"] == "token"
    if not strided and (case["delta"] is None or case["delta"] >= 1 + case["high"]):
        close(ours[1], other[1], 64 * EPS)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_16_bit_logits(dtype):
    made = data(SIMPLE, dtype)
    results, gradient, _ = from_logits(triton_grpo_loss, made, SIMPLE, True, True)
    leaf = made["logits"].double().requires_grad_()
    logp = logp_of(leaf[:, :-1], made["ids"], SIMPLE["temperature"])
    *_, wanted, _ = written_out(logp, *near(logp, made, SIMPLE), made, SIMPLE)
    wanted.backward()
    close(results[0].detach(), wanted.detach())
    assert gradient.dtype == dtype
    close(gradient, leaf.grad, torch.finfo(dtype).eps)


def test_in_place_has_one_backward_and_takes_no_overlap():
    made = data(SIMPLE, torch.float32)
    old, ref = near(logp_of(made["logits"][:, :-1], made["ids"], 0.9), made, SIMPLE)
    given = old, ref, made["ids"], made["advantages"]
    logits = made["logits"].clone().requires_grad_()
    loss, _ = triton_grpo_loss(logits * 1.0, *given, reduce=True)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace=False"):
        loss.backward()
    squared = logits * 1.0
    square = squared.square().sum()
    loss = triton_grpo_loss(squared, *given, reduce=True)[0] + square
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with pytest.raises(ValueError, match=r"logits must not overlap themselves.*inplace=True"):
        triton_grpo_loss(made["logits"][:1].expand(B, -1, -1), *given)


def test_traces_as_one_graph():
    """Under torch.compile, which plans memory itself, in place makes no difference."""
    made = data(SIMPLE, torch.float32)
    eager = from_logits(triton_grpo_loss, made, SIMPLE, True, False)
    compiled = torch.compile(triton_grpo_loss, backend="aot_eager", fullgraph=True)
    (loss, metrics), gradient, logits = from_logits(compiled, made, SIMPLE, True, True)
    close(loss.detach(), eager[0][0].detach())
    close(gradient, eager[1])
    assert len(metrics) == 2 and torch.equal(logits.detach(), made["logits"])


def test_strided_logits_and_no_mask():
    made = data(SIMPLE, torch.float32)
    old, ref = near(logp_of(made["logits"][:, :-1], made["ids"], 0.9), made, SIMPLE)
    given = old, ref, made["ids"], made["advantages"]
    strided = torch.zeros(T + 1, B, 2 * V)[..., :V].transpose(0, 1).copy_(made["logits"])
    ones = torch.ones(B, T, dtype=torch.bool)
    ours = triton_grpo_loss(strided, *given, ones, reduce=True)[0]
    assert torch.equal(ours, triton_grpo_loss(made["logits"], *given, reduce=True)[0])


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"logits": None}, TypeError, "logits must be a torch.Tensor, got NoneType"),
        ({"advantages": None}, TypeError, "advantages must be a torch.Tensor, got NoneType"),
        (
            {"logits": torch.zeros(B, T, V)},
            ValueError,
            r"logits must have shape \(4, 7, V\), one row more.*\(4, 6, 37\)",
        ),
        ({"completion_ids": torch.zeros(B, dtype=torch.long)}, ValueError, r"completion_ids must have shape \(B, T\)"),
        ({"old_logp": torch.zeros(B, T + 1)}, ValueError, r"old_logp must have shape \(4, 6\), got \(4, 7\)"),
        ({"ref_logp": torch.zeros(B, T + 1)}, ValueError, r"ref_logp must have shape \(4, 6\), got \(4, 7\)"),
        ({"ref_logp": None}, ValueError, "ref_logp must be given where beta is not 0"),
        (
            {"completion_mask": torch.ones(B, T - 1)},
            ValueError,
            r"completion_mask must have shape \(4, 6\), got \(4, 5\)",
        ),
        ({"vllm_is_ratio": torch.ones(B, 3)}, ValueError, r"vllm_is_ratio must have shape .*got \(4, 3\)"),
    ],
)
def test_arguments_of_the_function_that_do_not_fit_are_named(changed, error, message):
    made = data(SIMPLE, torch.float32)
    old, ref = near(logp_from_hidden(made, 0.9), made, SIMPLE)
    given = {
        "logits": made["logits"], "old_logp": old, "ref_logp": ref, "completion_ids": made["ids"],
        "advantages": made["advantages"],
    }  # fmt: skip
    with pytest.raises(error, match=message):
        triton_grpo_loss(**given | changed)
