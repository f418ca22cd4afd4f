"""The hybrid loss from logits against the float64 oracle: objectives, dtypes, transforms, layouts, strides, edges."""

from __future__ import annotations

import math

import pytest
import torch
from logit_support import DTYPES, TRANSFORMS, LogitCase, check, check_gradient, computed, make, run, with_infinities
from support import POLICIES, policy_name

import gac_kernels as gk

pytestmark = pytest.mark.usefixtures("backend")
OBJECTIVE = gk.HybridObjective(kl_coef=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_objectives(policy, packed, dtype):
    objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.05, kl_ratio_weighted=packed)
    check(make(dtype=dtype, packed=packed), objective)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_transforms(dtype, transform, inplace):
    made = TRANSFORMS[transform]
    case = make(dtype=dtype, transform=made, V=131)
    check(case, OBJECTIVE, transform=made, inplace=inplace)
    check(case, gk.HybridObjective(entropy_coef=0.1), transform=made, inplace=inplace)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gift", [gk.GIFT(), gk.GIFT(0.0), gk.GIFT(3.0, 0.1), gk.GIFT(1.0, 1.0)], ids=str)
def test_gift(gift, dtype, inplace):
    case = make(dtype=dtype, base=True, V=75)
    check(case, gk.HybridObjective(supervised=gift), inplace=inplace)
    check(case, gk.HybridObjective(gk.GSPO(), gift, entropy_coef=0.1), transform=TRANSFORMS["all"], inplace=inplace)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_temperature_per_sequence(packed):
    heat = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        check(make(dtype=dtype, packed=packed), OBJECTIVE, transform=gk.LogitTransform(heat.to(dtype), 5.0))
    for wrong in (heat[:3], heat[:, None]):
        with pytest.raises(ValueError, match="temperature must"):
            run(gk.hybrid_loss_from_logits, make(packed=packed), OBJECTIVE, 0.3, gk.LogitTransform(wrong))


@pytest.mark.parametrize("V", [1, 2, 15, 16, 17, 33, 64, 127, 300, 1025, 4099, 20011])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_vocabulary_sizes(V, dtype):
    """Around vectors, blocks and tiles; a padded column must not count. Peaked rows show what flat ones hide."""
    lengths, expert = (3, 2), (False, True)
    check(make(lengths, expert, V=V, dtype=dtype), OBJECTIVE)
    peaked = make(lengths, expert, V=V, dtype=dtype, scale=30.0)
    check(peaked, OBJECTIVE, inplace=True)
    peaked.logits.copy_(peaked.logits - 200.0)
    check(peaked, OBJECTIVE)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("layout", ["shifted", "padded rows", "swapped", "columns", "expanded"])
def test_strides(layout, inplace):
    case = make(seed=3, poison=False)
    S, T, V = case.logits.shape
    if layout == "shifted":
        view = torch.full((S, T + 1, V), math.nan)[:, :-1]
    elif layout == "padded rows":
        view = torch.full((S, T, V + 5), math.nan)[..., 2 : 2 + V]
    elif layout == "swapped":
        view = torch.full((T, S, V), math.nan).transpose(0, 1)
    elif layout == "columns":
        view = torch.full((V, S, T), math.nan).permute(1, 2, 0)
    else:
        view = case.logits[:, :1].expand(S, T, V)
    if layout != "expanded":
        view.copy_(case.logits)
    want, want_gradient = LogitCase(view.contiguous(), case.batch).oracle(OBJECTIVE, 0.3)
    leaf = view.detach().requires_grad_()
    leaf = computed(leaf) if inplace else leaf
    if inplace and layout in ("columns", "expanded"):
        with pytest.raises(ValueError, match="logits must"):
            gk.hybrid_loss_from_logits(leaf, case.batch, OBJECTIVE, 0.3, inplace=True)
        return
    out = gk.hybrid_loss_from_logits(leaf, case.batch, OBJECTIVE, 0.3, inplace=inplace)
    (gradient,) = torch.autograd.grad(out.loss, leaf)
    torch.testing.assert_close(out.loss.detach().double(), want.loss.detach(), rtol=1e-5, atol=1e-6)
    check_gradient(gradient, want_gradient)
    assert not inplace or gradient.data_ptr() == leaf.data_ptr()


def test_infinities():
    """One -inf logit, all but one, a first tile of them, a -inf target: what float64 gives, gradients finite."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        case = with_infinities(6, dtype)
        for objective in (gk.HybridObjective(), gk.HybridObjective(gk.GRPO(), gk.NLL("none"), entropy_coef=0.1)):
            want, _ = case.double().oracle(objective, 0.3)
            got, gradient = run(gk.hybrid_loss_from_logits, case, objective, 0.3)
            acc = torch.promote_types(dtype, torch.float32)
            bound = {"rtol": 1e-5, "atol": 1e-5} if acc == torch.float32 else {"rtol": 1e-11, "atol": 1e-11}
            torch.testing.assert_close(got.logprobs.double(), want.logprobs, **bound)
            torch.testing.assert_close(got.token_entropy.double(), want.token_entropy, **bound)
            assert got.logprobs[0, 3] == -math.inf and torch.isfinite(gradient).all()
            torch.testing.assert_close(got.loss.detach().double(), want.loss.detach(), **bound)


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO(), gk.DFPO()], ids=policy_name)
def test_nothing_to_learn_from(policy, inplace):
    """Fully masked, one branch only, no rows at all: a graph-connected 0 and zero gradients over poisoned logits."""
    objective = gk.HybridObjective(policy)
    for lengths, expert in (((0, 0), (False, True)), ((4,), (True,)), ((3, 2), (False, False)), ((), ())):
        case = make(lengths, expert)
        out, gradient = run(gk.hybrid_loss_from_logits, case, objective, 0.3, inplace=inplace)
        assert torch.isfinite(out.loss) and torch.isfinite(gradient).all()
        assert gradient[~case.batch.mask].eq(0).all()
        if not case.batch.mask.any():
            assert out.loss == 0


def test_denominators_make_micro_batches_add_up():
    whole = make((5, 7, 9, 3), seed=9, poison=False)
    objective = gk.HybridObjective(kl_coef=0.1, aggregation="token-mean")
    mask, expert = whole.batch.mask, whole.batch.is_expert
    counts = gk.Denominators(policy=float(mask[~expert].sum()), supervised=float(mask[expert].sum()))
    want, want_gradient = whole.oracle(objective, 0.3)
    total, gradients = 0.0, []
    for part in (slice(0, 1), slice(1, 4)):
        names = ("targets", "mask", "is_expert", "advantages", "old_logprobs", "ref_logprobs", "rollout_weights")
        kept = {name: getattr(whole.batch, name)[part] for name in names}
        batch = gk.TokenBatch(cu_seqlens=None, **kept)
        out, gradient = run(
            gk.hybrid_loss_from_logits, LogitCase(whole.logits[part], batch), objective, 0.3, denominators=counts
        )
        total += out.loss.detach().double()
        gradients.append(gradient)
    torch.testing.assert_close(total, want.loss.detach(), rtol=1e-5, atol=1e-6)
    check_gradient(torch.cat(gradients), want_gradient)


def test_a_gate_in_python(backend):
    gate = gk.Gate("mine", lambda u, tau: u / (1 + u.abs()), lambda u, tau: (1 + u.abs()).pow(-2))
    case = make(dtype=torch.float64)
    if backend != "reference":
        with pytest.raises(ValueError, match="does not support the custom gate"):
            run(gk.hybrid_loss_from_logits, case, gk.HybridObjective(gk.SAPO(gate)), 0.3)
        return
    want, want_gradient = case.oracle(gk.HybridObjective(gk.SAPO(gate)), 0.3)
    got, gradient = run(gk.hybrid_loss_from_logits, case, gk.HybridObjective(gk.SAPO(gate)), 0.3, inplace=True)
    torch.testing.assert_close(got.loss, want.loss)
    check_gradient(gradient, want_gradient)
