"""Liger's names against Liger's own code where it is installed, and always against the formulas written out."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import torch
from liger_support import (
    CASES,
    B,
    H,
    T,
    V,
    class_options,
    close,
    data,
    function_options,
    installed,
    logp_from_hidden,
    logp_of,
    near,
    written_out,
)

from gac_kernels.integrations import liger
from gac_kernels.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

SIMPLE = CASES["defaults"]


def fused(kind, made, case, dtype, **options):
    """Loss, metrics and gradients of a class with Liger's signature."""
    leaves = [made[name].to(dtype).clone().requires_grad_() for name in ("hidden", "weight", "bias")]
    old, ref = near(logp_from_hidden(made, case["temperature"]), made, case)
    module = kind(**class_options(case) | options)
    loss, metrics = module(
        leaves[0], leaves[1], made["ids"], made["mask"], made["advantages"], leaves[2],
        ref if case["beta"] else None, old, vllm_is_ratio=made["weights"], num_items_in_batch=case["items"],
    )  # fmt: skip
    loss.backward()
    return loss.detach(), metrics, [leaf.grad for leaf in leaves]


def fused_formula(made, case):
    leaves = [made[name].double().requires_grad_() for name in ("hidden", "weight", "bias")]
    old, ref = near(logp_from_hidden(made, case["temperature"]), made, case)
    logp = logp_from_hidden(made, case["temperature"], leaves=leaves)
    *_, loss, metrics = written_out(logp, old, ref, made, case, padding=case["kind"] == "luspo")
    loss.backward()
    return loss.detach(), metrics, [leaf.grad for leaf in leaves]


# from hidden states -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", CASES)
def test_fused_is_the_formula(name):
    case = CASES[name]
    made = data(case, torch.float32)
    loss, metrics, gradients = fused(LigerFusedLinearGRPOLoss, made, case, torch.float32)
    wanted, wanted_metrics, wanted_gradients = fused_formula(made, case)
    assert loss.dtype == torch.float32 and isinstance(metrics, tuple) and len(metrics) == len(wanted_metrics)
    close(loss, wanted)
    for ours, theirs in zip((*metrics, *gradients), (*wanted_metrics, *wanted_gradients), strict=True):
        assert not ours.requires_grad
        close(ours, theirs)


@pytest.mark.parametrize("chunk_size", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_fused_is_ligers_own(name, chunk_size):
    case = CASES[name]
    theirs = installed("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    made = data(case, torch.float32, seed=1)
    loss, metrics, gradients = fused(LigerFusedLinearGRPOLoss, made, case, torch.float32, chunk_size=chunk_size)
    wanted, wanted_metrics, wanted_gradients = fused(theirs, made, case, torch.float32, chunk_size=chunk_size)
    assert type(metrics) is type(wanted_metrics) and len(metrics) == len(wanted_metrics)
    close(loss, wanted)
    for ours, other in zip((*metrics, *gradients), (*wanted_metrics, *wanted_gradients), strict=True):
        close(ours, other)


@pytest.mark.parametrize("name", CASES)
def test_fused_in_bfloat16_is_as_near_the_formula_as_ligers(name):
    case = CASES[name]
    theirs = installed("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    made = data(case, torch.bfloat16, seed=2)
    loss, _, gradients = fused(LigerFusedLinearGRPOLoss, made, case, torch.bfloat16)
    other, _, other_gradients = fused(theirs, made, case, torch.bfloat16)
    wanted, _, wanted_gradients = fused_formula(made, case)
    one_rounding = torch.finfo(torch.bfloat16).eps / 2
    for ours, liger_s, right in zip(
        (loss, *gradients), (other, *other_gradients), (wanted, *wanted_gradients), strict=True
    ):
        assert ours.dtype == liger_s.dtype
        error, liger_error = ((value.double() - right).abs().max() for value in (ours, liger_s))
        assert error <= liger_error + one_rounding * right.abs().max()


def arguments(made, case, **changed):
    """Of forward, by name."""
    old, ref = near(logp_from_hidden(made, case["temperature"]), made, case)
    return {
        "_input": made["hidden"], "lin_weight": made["weight"], "selected_token_ids": made["ids"],
        "attention_mask": made["mask"], "advantages": made["advantages"], "bias": made["bias"],
        "ref_per_token_logps": ref, "old_per_token_logps": old, **changed,
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["dapo", "luspo"])
def test_reference_model_in_place_of_its_logprobs(kind):
    case = SIMPLE | {"kind": kind, "temperature": 1.7}
    made, other = data(case, torch.float32), data(case, torch.float32, seed=5)
    ref = logp_of(other["hidden"] @ other["weight"].T + other["bias"], made["ids"], 1.7)
    module = LigerFusedLinearGRPOLoss(**class_options(case))
    given = module(**arguments(made, case, ref_per_token_logps=ref))
    head = {"ref_input": other["hidden"], "ref_weight": other["weight"], "ref_bias": other["bias"]}
    computed = module(**arguments(made, case, ref_per_token_logps=None, **head))
    close(computed[0], given[0])
    close(computed[1][0], given[1][0])
    with pytest.warns(UserWarning, match="ref_per_token_logps and ref_input are both given"):
        both = module(**arguments(made, case, ref_per_token_logps=ref, **head))
    assert torch.equal(both[0], given[0])


@pytest.mark.parametrize("kind", ["dapo", "vespo"])
def test_without_a_reference_model_the_kl_is_zero(kind):
    case = SIMPLE | {"kind": kind}
    made = data(case, torch.float32)
    with_beta = LigerFusedLinearGRPOLoss(**class_options(case) | {"use_ref_model": False})(**arguments(made, case))
    without = LigerFusedLinearGRPOLoss(**class_options(case) | {"beta": 0.0, "use_ref_model": False})(
        **arguments(made, case)
    )
    assert torch.equal(with_beta[0], without[0])
    assert float(with_beta[1][0]) == 0.0 and torch.equal(with_beta[1][1], without[1][0])


@pytest.mark.parametrize("kind", ["grpo", "vespo"])
def test_a_head_of_another_dtype_frozen_and_without_bias(kind):
    case = SIMPLE | {"kind": kind}
    made = data(case, torch.float32)
    hidden = made["hidden"].bfloat16().requires_grad_()
    weight = made["weight"].requires_grad_(False)
    loss, _ = LigerFusedLinearGRPOLoss(**class_options(case))(
        **arguments(made, case, _input=hidden, lin_weight=weight, bias=None)
    )
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and hidden.grad.abs().max() > 0 and weight.grad is None


def test_upstream_scale_and_no_gradient():
    made = data(SIMPLE, torch.float32)
    module = LigerFusedLinearGRPOLoss(**class_options(SIMPLE))
    gradients = []
    for factor in (1.0, 3.0):
        hidden = made["hidden"].clone().requires_grad_()
        loss, _ = module(**arguments(made, SIMPLE, _input=hidden))
        (factor * loss).backward()
        gradients.append(hidden.grad)
    close(gradients[1], 3 * gradients[0])
    with torch.no_grad():
        assert torch.equal(module(**arguments(made, SIMPLE))[0], loss.detach())


# both -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["defaults", "sequence", "vespo", "sapo"])
def test_poison_at_masked_places_reaches_nothing(name):
    case = CASES[name]
    made = data(case, torch.float32)
    dead = ~made["mask"].bool()
    old, ref = near(logp_from_hidden(made, case["temperature"]), made, case)
    results = []
    for poison in (0.0, float("nan"), float("inf")):
        hidden = made["hidden"].masked_fill(dead[..., None], poison).requires_grad_()
        poisoned = [value.masked_fill(dead, poison) for value in (ref, old)]
        names = dict(zip(("ref_per_token_logps", "old_per_token_logps"), poisoned, strict=True))
        ids = made["ids"].masked_fill(dead, 10**6)
        module = LigerFusedLinearGRPOLoss(**class_options(case))
        loss, metrics = module(**arguments(made, case, _input=hidden, selected_token_ids=ids, **names))
        logits = made["logits"].clone()
        logits[:, :-1][dead] = poison
        logits[:, -1] = poison  # which predicts nothing
        leaf = logits.requires_grad_()
        other, other_metrics = triton_grpo_loss(
            leaf * 1.0, poisoned[1], poisoned[0], ids, made["advantages"], made["mask"], reduce=True, inplace=False,
            **function_options(case),
        )  # fmt: skip
        (loss + other).backward()
        results.append([loss, *metrics, hidden.grad, other, *other_metrics, leaf.grad])
    for plain, nan, inf in zip(*results, strict=True):
        assert plain.isfinite().all() and torch.equal(plain, nan) and torch.equal(plain, inf)


def test_log_ratios_are_clamped_where_liger_overflows():
    made = data(SIMPLE, torch.float32)
    logp = logp_of(made["logits"][:, :-1], made["ids"], 0.9)
    old = logp - 100.0  # a ratio of e^100
    loss, _, clipped = triton_grpo_loss(made["logits"], old, logp, made["ids"], made["advantages"], temperature=0.9)
    assert loss.isfinite().all() and clipped[0].all()
    close(loss[1], torch.full((T,), 0.7 * torch.tensor(20.0).exp().item()))


def test_an_empty_sequence_counts_as_ligers_does():
    case = CASES["grpo"] | {"weights": None}
    made = data(case, torch.float32)
    made["mask"][1] = 0
    loss, _, gradients = fused(LigerFusedLinearGRPOLoss, made, case, torch.float32)
    other, _, other_gradients = fused(
        installed("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss"), made, case, torch.float32
    )
    close(loss, other)
    assert not gradients[0][1].any()
    close(gradients[0], other_gradients[0])


@pytest.mark.parametrize("ours", [LigerFusedLinearGRPOLoss, LigerFusedLinearGRPOLoss.forward, triton_grpo_loss])
def test_signatures(ours):
    module = "transformers.grpo_loss" if ours is triton_grpo_loss else "chunked_loss.grpo_loss"
    theirs = installed(f"liger_kernel.{module}:{ours.__qualname__.split('.')[0]}")
    if ours is LigerFusedLinearGRPOLoss.forward:
        theirs = theirs.forward
    mine, other = (
        [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()] for f in (ours, theirs)
    )
    assert mine == other


def test_liger_is_not_imported():
    code = "import sys, gac_kernels.integrations.liger; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {name.split(".")[0] for name in run.stdout.split()} & {"liger_kernel", "triton", "transformers"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "gspo"}, r"loss_type must be one of grpo, .*vespo; got 'gspo'"),
        (
            {"importance_sampling_level": "group"},
            r"importance_sampling_level must be 'token' or 'sequence', got 'group'",
        ),
        *(
            ({"importance_sampling_level": "sequence", "loss_type": kind}, rf"importance_sampling_level.*'{kind}'")
            for kind in ("cispo", "sapo", "vespo")
        ),
        *(({"delta": 1.5, "loss_type": kind}, r"delta must .*got 1.5 with") for kind in ("cispo", "sapo", "vespo")),
        ({"delta": -1.0}, r"delta must be positive.*got -1.0"),
        ({"delta": 0.0}, r"delta must be positive.*got 0.0"),
        ({"sapo_temperature_pos": 0.0, "loss_type": "sapo"}, r"sapo_temperature_pos must be positive, got 0.0"),
        ({"sapo_temperature_neg": -2.0, "loss_type": "sapo"}, r"sapo_temperature_neg must be positive, got -2.0"),
        ({"temperature": 0.0}, r"temperature must be .*got 0.0"),
    ],
)
def test_options_that_cannot_be_raise(options, message):
    made = data(SIMPLE, torch.float32)
    old, ref = near(logp_from_hidden(made, 0.9), made, SIMPLE)
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)(**arguments(made, SIMPLE))
    with pytest.raises(ValueError, match=message):
        triton_grpo_loss(made["logits"], old, ref, made["ids"], made["advantages"], **options)


@pytest.mark.parametrize(
    ("options", "changed", "message"),
    [
        ({"loss_type": "dr_grpo"}, {}, r"max_completion_length must be given with loss_type 'dr_grpo'"),
        ({"chunk_size": 0}, {}, r"chunk_size must be a positive int, got 0"),
        ({}, {"ref_per_token_logps": None}, r"ref_per_token_logps or ref_input must be given"),
        (
            {},
            {"ref_per_token_logps": None, "ref_input": torch.zeros(B, T, H)},
            r"ref_weight must be given with ref_input",
        ),
        ({}, {"_input": torch.zeros(B * T, H)}, r"_input must have shape \(4, 6, H\), got \(24, 16\)"),
        ({}, {"_input": torch.zeros(B, T + 1, H)}, r"_input must have shape \(4, 6, H\), got \(4, 7, 16\)"),
        ({}, {"selected_token_ids": torch.zeros(B, dtype=torch.long)}, r"selected_token_ids must have shape \(B, T\)"),
        ({}, {"attention_mask": torch.ones(B, T + 1)}, r"attention_mask must have shape \(4, 6\), got \(4, 7\)"),
        ({}, {"old_per_token_logps": torch.zeros(B, 1)}, r"old_per_token_logps must have shape \(4, 6\), got \(4, 1\)"),
        ({}, {"ref_per_token_logps": torch.zeros(B)}, r"ref_per_token_logps must have shape \(4, 6\), got \(4,\)"),
        ({}, {"advantages": torch.zeros(B, T)}, r"advantages must have shape \(4,\), .*got \(4, 6\)"),
        ({}, {"vllm_is_ratio": torch.ones(T)}, r"vllm_is_ratio must have shape \(4,\), .*got \(6,\)"),
        ({}, {"vllm_is_ratio": torch.ones(B, 2)}, r"vllm_is_ratio must have shape .*got \(4, 2\)"),
        ({}, {"vllm_is_ratio": torch.ones(B, T, 1)}, r"vllm_is_ratio must have shape .*got \(4, 6, 1\)"),
        ({}, {"lin_weight": torch.zeros(V, H + 1)}, r"weight must have shape \(V, 16\), got \(37, 17\)"),
    ],
)
def test_fused_arguments_that_do_not_fit_are_named(options, changed, message):
    made = data(SIMPLE, torch.float32)
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)(**arguments(made, SIMPLE, **changed))


def stage_of_error(kind, options, made):
    """Where a class raises, and the beginning of what it says."""
    stage = "construction"
    try:
        built = kind(compiled=False, use_ref_model=False, **options)
        stage = "call"
        built(**arguments(made, SIMPLE, ref_per_token_logps=None))
    except ValueError as error:
        return stage, str(error).split(". ")[0].rstrip(".")
    return None


@pytest.mark.parametrize(
    ("options", "stage"),
    [
        *(
            ({"importance_sampling_level": "sequence", "loss_type": kind}, "call")
            for kind in ("cispo", "sapo", "vespo")
        ),
        ({"importance_sampling_level": "group"}, "call"),
        ({"loss_type": "gspo"}, "call"),
        ({"loss_type": "sapo", "sapo_temperature_pos": 0.0}, "construction"),
        ({"loss_type": "dapo", "sapo_temperature_neg": -1.0}, "construction"),
        ({"delta": 0.0}, "construction"),
        ({"loss_type": "sapo", "sapo_temperature_neg": 2.0}, None),
    ],
)
def test_what_liger_refuses_is_refused_where_and_as_liger_does(options, stage):
    made = data(SIMPLE, torch.float32)
    theirs = installed("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    ours = stage_of_error(LigerFusedLinearGRPOLoss, options, made)
    assert ours == stage_of_error(theirs, options, made)
    assert (None if ours is None else ours[0]) == stage


@pytest.mark.parametrize("kind", ["dapo", "sapo", "cispo", "luspo", "vespo"])
@pytest.mark.parametrize("name", ["old_per_token_logps", "vllm_is_ratio"])
def test_what_a_sampler_could_not_score_is_named(kind, name):
    """At a token that counts; at a masked place it changes nothing, but with luspo, which reads those as well."""
    made = data(SIMPLE, torch.float32)
    live = made["mask"].bool()
    loss = LigerFusedLinearGRPOLoss(loss_type=kind, use_ref_model=False)
    given = {"old_per_token_logps": -3 - torch.rand(B, T), "vllm_is_ratio": 1 + torch.rand(B, T)}
    if kind != "luspo":  # vespo counts masked weights, as Liger does: 1 is no weight
        given["vllm_is_ratio"][~live] = 1.0
        spoiled = {**given, name: given[name].masked_fill(~live, float("nan"))}
        values = [loss(**arguments(made, SIMPLE, ref_per_token_logps=None, **one))[0] for one in (given, spoiled)]
        assert torch.equal(*values)
    for value in (float("nan"), float("inf"), float("-inf")):
        spoiled = {**given, name: given[name].masked_fill(live & live.roll(1, 0), value)}
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            loss(**arguments(made, SIMPLE, ref_per_token_logps=None, **spoiled))


def test_attributes_set_later_are_checked_in_the_call():
    made = data(SIMPLE, torch.float32)
    loss = LigerFusedLinearGRPOLoss(loss_type="sapo")
    loss.importance_sampling_level = "sequence"
    with pytest.raises(ValueError, match="Sequence-level importance sampling is not supported for loss_type='sapo'"):
        loss(**arguments(made, SIMPLE))


def ranks(rank, file):
    """Ranks with unequal shares: dapo's normaliser is the mean count of tokens over ranks."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    try:
        for items in (None, 40):
            case = CASES["defaults"] | {"items": items}
            made = data(case, torch.float32, seed=rank)
            made["mask"][0, : 1 + rank] = 0
            counts = [0, 0]
            dist.all_gather_object(counts, int(made["mask"].sum()))
            loss, _, _ = fused(LigerFusedLinearGRPOLoss, made, case, torch.float32)
            wanted, _, _ = fused_formula(made, case | {"items": (sum(counts) if items is None else items) / 2})
            close(loss, wanted)
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path):
    torch.multiprocessing.spawn(ranks, (tmp_path / "store",), nprocs=2)


def test_check_of_an_installed_liger():
    installed("liger_kernel.chunked_loss:LigerFusedLinearGRPOLoss")
    assert liger.check().status == "ok", liger.check()
