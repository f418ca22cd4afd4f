"""No argument takes a tensor that is not dense memory of its own, and every one says so by its name."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import torch.distributed as dist
from bad_input import S, T, V, padded
from bad_input_layouts import ARGUMENTS, DFPO, GIFT, LAYOUTS, Plain, of_hidden, of_logits, of_logprobs

import gac_kernels as gk

ROWS = [pytest.param(*row, id=f"{row[0]}-{row[1]}") for row in ARGUMENTS]


def refuse(layout: str, argument: str, value: torch.Tensor, call) -> None:
    with pytest.raises((TypeError, ValueError)) as raised:
        call(**{argument: value})
    assert type(raised.value) in (TypeError, ValueError), (layout, raised.value)
    assert argument in str(raised.value), (layout, str(raised.value))


@pytest.mark.parametrize(("name", "argument", "value", "call"), ROWS)
def test_what_is_not_plain_memory_is_refused_by_name(name, argument, value, call):
    call(**{argument: value})
    call(**{argument: value.as_subclass(Plain)})
    call(**{argument: torch.nn.Parameter(value, requires_grad=False)})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for layout, make in LAYOUTS.items():
            refuse(layout, argument, make(value), call)
    # A call whose tensors are all meta gives meta; one among others is on the wrong device. Where it is the only one,
    # or what the others are compared with, there is nothing to refuse it for.
    if argument not in ("targets_ST", "targets_N", "targets", "hidden", "rewards_S", "temperature", "rows", "logits"):
        refuse("meta", argument, value.to("meta"), call)


@pytest.fixture(scope="module")
def mesh():
    from torch.distributed.tensor import init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("name", "argument", "value", "call"), ROWS)
def test_a_dtensor_is_refused_by_name(name, argument, value, call, mesh):
    from torch.distributed.tensor import Replicate, distribute_tensor

    refuse("DTensor", argument, distribute_tensor(value, mesh, [Replicate()]), call)


def test_every_tensor_argument_is_tried():
    """What is annotated as a tensor is in the table, or is one value of it (`batch`)."""
    tried = {(name, argument) for name, argument, *_ in ARGUMENTS} | {
        ("hybrid_loss_from_hidden", argument) for name, argument, *_ in ARGUMENTS if name == "base"
    }
    functions = {
        "from_padded": gk.TokenBatch.from_padded, "from_packed": gk.TokenBatch.from_packed,
        **{name: getattr(gk, name) for name in gk.__all__ if inspect.isfunction(getattr(gk, name))},

    }  # fmt: skip
    functions.pop("with_slope")  # works on tensors of any kind, as torch's own functions do
    for name, function in functions.items():
        for parameter in inspect.signature(function).parameters.values():
            if "Tensor" in str(parameter.annotation):
                assert (name, parameter.name) in tried, (name, parameter.name)


# Strides --------------------------------------------------------------------------------------------------------------
def column(value: torch.Tensor) -> torch.Tensor:
    return torch.stack((value, value), -1)[..., 0]


@pytest.mark.parametrize("objective", [gk.HybridObjective(), DFPO, gk.HybridObjective(gk.GSPO(), kl_coef=0.1)])
def test_small_inputs_may_be_strided(every_backend, objective):
    g = torch.Generator().manual_seed(0)
    given = {
        "is_expert_S": torch.tensor([False, True, False]), "advantages": torch.randn(S, generator=g),
        "groups": torch.tensor([0, 1, 0]), "rollout_weights": torch.rand(S, T, generator=g) + 0.5,
        "old_logprobs": -torch.rand(S, T, generator=g), "ref_logprobs": -torch.rand(S, T, generator=g),
    }  # fmt: skip
    logits = torch.randn(S, T, V, generator=g)
    strided = {name: column(value) for name, value in given.items()}
    assert not any(value.is_contiguous() for value in strided.values())
    transform = gk.LogitTransform(column(torch.tensor([0.5, 1.0, 2.0])))
    for wide in (False, True):
        batches = [padded(**given), padded(**strided)]
        if wide:  # past what from_padded makes of it
            batches[1] = gk.TokenBatch(**{f: column(v) if v is not None else v for f, v in vars(batches[0]).items()})
        for make in (
            lambda b: of_logprobs(logprobs=column(-torch.ones(S, T)), batch=b, objective=objective).signals.rows,
            lambda b: of_logits(logits=logits, batch=b, objective=objective, transform=transform).signals.rows,
        ):
            want, got = (make(batch) for batch in batches)
            assert torch.equal(want, got)


def test_offsets_rewards_and_signals_may_be_strided():
    offsets = torch.tensor([0, 4, 9, 15])
    given = {"targets_N": torch.zeros(15, dtype=torch.long), "advantages": torch.ones(1).expand(S)}
    for cu_seqlens in (offsets, column(offsets), column(offsets).int()):
        batch = gk.TokenBatch.from_packed(given["targets_N"], cu_seqlens, advantages=given["advantages"])
        got = of_logprobs(logprobs=-torch.ones(15), batch=batch).signals.rows[:, 1]
        assert got.tolist() == [4.0, 5.0, 6.0]
    rewards = torch.tensor([1.0, 2.0, 3.0, 1.0])
    want = gk.group_advantages(rewards, 2)
    assert torch.equal(gk.group_advantages(column(rewards), column(torch.tensor([0, 0, 1, 1]))), want)
    controllers = [gk.GuidedAdaptiveController(gk.ControllerConfig(alpha=gk.KLTarget())) for _ in range(2)]
    rows = torch.rand(S, 12) + 1
    for controller, same in zip(controllers, (rows, column(rows)), strict=True):
        controller.observe(gk.Signals(same))
        controller.step(kl=torch.ones(3, 2)[1, 1] / 50)
    assert torch.equal(controllers[0].mu, controllers[1].mu)


# GIFT's base ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_bases_dtype_is_free(every_backend, dtype, base_dtype):
    """Another float dtype than the logits' is read as it is: the same as the formula in float64 on the same numbers."""
    g = torch.Generator().manual_seed(1)
    logits, base = torch.randn(S, T, V, generator=g).to(dtype), torch.randn(S, T, V, generator=g).to(base_dtype)
    expert = torch.ones(S, dtype=torch.bool)
    batch = padded(is_expert_S=expert, base_logits=base)
    z, z0 = logits.double(), base.double()
    y = torch.nn.functional.one_hot(torch.zeros(S, T, dtype=torch.long), V)
    q = torch.softmax(torch.log_softmax(z0, -1) + 20.0 * y, -1)
    want = (torch.logsumexp(z, -1) - (q * z).sum(-1)).mean()
    got = of_logits(logits=logits, batch=batch, objective=GIFT, mu=1.0).loss
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=1e-6)


def test_a_base_that_does_not_fit_is_named():
    head = {"base_weight": torch.zeros(V, 4), "objective": GIFT}
    for hidden, text in (
        (torch.zeros(S, T, 4, dtype=torch.long), "base_hidden must have dtype"),
        (torch.zeros(S, T, 4, device="meta"), "base_hidden must be on cpu"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            of_hidden(base_hidden=hidden, **head)
