"""The hybrid loss from hidden states against the float64 oracle: objectives, dtypes, chunks, heads, layouts, edges."""

from __future__ import annotations

import math

import pytest
import torch
from hidden_support import HEAD, HiddenCase
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from logit_support import DTYPES, TRANSFORMS
from support import POLICIES, policy_name

import gac_kernels as gk
from gac_kernels import linear, products, reference

pytestmark = pytest.mark.usefixtures("backend")
OBJECTIVE = gk.HybridObjective(kl_coef=0.1)
GATE = gk.Gate("mine", lambda u, tau: u / (1 + u.abs()), lambda u, tau: (1 + u.abs()).pow(-2))
CUSTOM = gk.HybridObjective(gk.SAPO(GATE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("policy", POLICIES, ids=policy_name)
def test_objectives(policy, packed, dtype):
    objective = gk.HybridObjective(policy, kl_coef=0.1, entropy_coef=0.05, kl_ratio_weighted=packed)
    HiddenCase(dtype=dtype, packed=packed).check(objective, chunk_tokens=4)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_and_transforms(dtype, transform):
    made = TRANSFORMS[transform]
    case = HiddenCase(dtype=dtype, transform=made, V=131)
    for chunk in (None, 3):
        case.check(OBJECTIVE, transform=made, chunk_tokens=chunk)
        case.check(gk.HybridObjective(entropy_coef=0.1), transform=made, chunk_tokens=chunk)


@pytest.mark.parametrize("native", [False, True], ids=["float32 products", "native products"])
def test_products_of_sixteen_bits(native, monkeypatch):
    """With native products logits and their gradient are rounded to 16 bits, as those of every eager head."""
    monkeypatch.setattr(products, "_multiplies_halves", lambda: native)
    case = HiddenCase(dtype=torch.bfloat16, poison=False)
    want, want_gradients = case.oracle(OBJECTIVE)
    eager, eager_gradients = case.oracle(OBJECTIVE, dtype=torch.bfloat16)
    for chunk in (None, 4):
        got, gradients = case.ours(OBJECTIVE, chunk_tokens=chunk)
        far = (eager.logprobs.double() - want.logprobs).abs().max() if native else 4e-6
        assert float((got.logprobs.double() - want.logprobs).abs().max()) <= float(far) + 1e-6
        for name in HEAD:
            error = (gradients[name].double() - want_gradients[name]).abs().max()
            largest = want_gradients[name].abs().max()
            eager_error = (eager_gradients[name].double() - want_gradients[name]).abs().max()
            assert error <= max(2 * eager_error if native else 0, 2.0**-8 * largest)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO()], ids=policy_name)
def test_gift_from_the_base_models_hidden_states(policy, dtype, packed):
    case = HiddenCase(dtype=dtype, base=True, V=75, packed=packed)
    objective = gk.HybridObjective(policy, gk.GIFT(3.0, 0.1), entropy_coef=0.1)
    for chunk in (None, 4):
        case.check(objective, transform=TRANSFORMS["all"], chunk_tokens=chunk)


def test_gift_from_base_logits():
    case = HiddenCase(base=True, dtype=torch.float64)
    objective = gk.HybridObjective(supervised=gk.GIFT(3.0))
    want, want_gradients = case.ours(objective, chunk_tokens=3)
    base = case.base["base_hidden"] @ case.base["base_weight"].t() + case.base["base_bias"]
    base[~case.batch.mask] = math.nan
    case.batch = gk.TokenBatch(**{**vars(case.batch), "base_logits": base})
    case.base = None
    got, gradients = case.ours(objective, chunk_tokens=3)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-12, atol=0)
    for name in HEAD:
        torch.testing.assert_close(gradients[name], want_gradients[name], rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",), ("hidden", "weight"), ()], ids="+".join)
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.DFPO()], ids=policy_name)
def test_frozen_parts(policy, wanted, monkeypatch):
    """What is frozen gets no gradient, and no product is made for it."""
    case, objective = HiddenCase(dtype=torch.float64), gk.HybridObjective(policy)
    weights = []
    add = products.Gradients._add_product
    monkeypatch.setattr(products.Gradients, "_add_product", lambda self, *args: (weights.append(1), add(self, *args)))
    case.check(objective, wanted=wanted, chunk_tokens=6)
    assert bool(weights) == ("weight" in wanted)


@pytest.mark.parametrize("supervised", [gk.NLL(), gk.GIFT(3.0)], ids=["nll", "gift"])
@pytest.mark.parametrize("policy", [gk.SAPO(), gk.DFPO()], ids=policy_name)
def test_all_rows_where_the_host_may_not_wait(policy, supervised, monkeypatch):
    """As while a CUDA graph is captured: dead rows are in the products, and what they hold, nan, is not."""
    monkeypatch.setattr(linear, "_host_may_wait", lambda kind: False)
    case = HiddenCase(dtype=torch.float64, base=isinstance(supervised, gk.GIFT))
    assert case.hidden[~case.batch.mask].isnan().all()
    case.check(gk.HybridObjective(policy, supervised, entropy_coef=0.1), chunk_tokens=4)


def test_masked_rows_never_enter_the_products(monkeypatch):
    case, rows = HiddenCase(packed=True), []
    logits = products.Head.logits
    monkeypatch.setattr(products.Head, "logits", lambda self, x: (rows.append(len(x)), logits(self, x))[1])
    case.ours(OBJECTIVE, chunk_tokens=4)
    assert sum(rows) == int(case.batch.mask.sum()) and max(rows) <= 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weight_gradient_does_not_depend_on_the_number_of_chunks(dtype):
    """Sums over chunks are kept in float32: 16 chunks and 1024 agree to its accuracy, seen before the last rounding."""
    case = HiddenCase((1024,), (False,), dtype=dtype, poison=False, holes=False, V=53)
    acc = torch.float32
    seen = {}
    for chunks in (16, 1024):
        made = []
        results = products.Gradients.results

        def record(self, hidden, made=made, results=results):
            made.append(torch.cat(self.parts))
            return results(self, hidden)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(products.Gradients, "results", record)
            case.ours(OBJECTIVE, chunk_tokens=1024 // chunks)
        assert made[0].dtype == acc
        seen[chunks] = made[0]
    largest = seen[16].abs().max()
    assert float((seen[16] - seen[1024]).abs().max() / largest) < 4e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_are_bitwise_equal(dtype):
    case = HiddenCase(dtype=dtype, V=300)
    first, first_gradients = case.ours(OBJECTIVE, chunk_tokens=5)
    for _ in range(20):
        out, gradients = case.ours(OBJECTIVE, chunk_tokens=5)
        assert torch.equal(out.loss, first.loss) and torch.equal(out.logprobs, first.logprobs)
        assert all(torch.equal(gradients[name], first_gradients[name]) for name in HEAD)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=4), st.integers(1, 40), st.integers(1, 9),
    st.sampled_from([None, 1, 2, 3, 7, 100]), st.booleans(), st.integers(0, 9),
)  # fmt: skip
def test_shapes(lengths, V, H, chunk, packed, seed):
    expert = [i % 2 == 1 for i in range(len(lengths))]
    case = HiddenCase(lengths, expert, V=V, H=H, packed=packed, seed=seed, dtype=torch.float64)
    for policy in (gk.SAPO(), gk.GSPO(), gk.DFPO()):
        case.check(gk.HybridObjective(policy, kl_coef=0.1), chunk_tokens=chunk)


def test_a_batch_without_tokens_gives_a_connected_zero():
    case = HiddenCase((3, 2), (False, True), dtype=torch.float64)
    case.batch = gk.TokenBatch(**{**vars(case.batch), "mask": torch.zeros_like(case.batch.mask)})
    for objective in (OBJECTIVE, gk.HybridObjective(gk.GSPO()), gk.HybridObjective(gk.DFPO())):
        out, gradients = case.ours(objective, chunk_tokens=2)
        assert float(out.loss.detach()) == 0 and not out.logprobs.any() and not out.signals.hidden.any()
        assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_a_gate_in_python():
    with gk.use_backend("reference"):
        HiddenCase(dtype=torch.float64).check(CUSTOM, chunk_tokens=4)
    with gk.use_backend("cpu"), pytest.raises(ValueError, match="custom gate"):
        HiddenCase().ours(CUSTOM)


def test_denominators_upstream_gradient_and_other_uses_of_the_weight():
    case = HiddenCase(dtype=torch.float64)
    counts = gk.Denominators(policy=17.0, supervised=torch.tensor(5.0, dtype=torch.float64))
    case.check(OBJECTIVE, denominators=counts, scale=-2.5, chunk_tokens=4)
    leaves = case.leaves()
    other = torch.randn(37, 12, dtype=torch.float64)
    out = gk.hybrid_loss_from_hidden(
        leaves["hidden"], leaves["weight"], case.batch, OBJECTIVE, 0.3, bias=leaves["bias"]
    )
    (out.loss + (leaves["weight"] * other).sum()).backward()
    _, alone = case.ours(OBJECTIVE)
    torch.testing.assert_close(leaves["weight"].grad, alone["weight"] + other, rtol=1e-12, atol=1e-14)


def test_strided_hidden_states():
    case = HiddenCase(dtype=torch.float64, poison=False)
    want, gradients = case.ours(OBJECTIVE, chunk_tokens=4)
    S, T, H = case.hidden.shape
    for view in (torch.full((S, T + 1, H), math.nan, dtype=torch.float64)[:, :-1],
                 torch.full((T, S, H), math.nan, dtype=torch.float64).transpose(0, 1)):  # fmt: skip
        view.copy_(case.hidden)
        leaf = view.detach().requires_grad_()
        out = gk.hybrid_loss_from_hidden(leaf, case.weight, case.batch, OBJECTIVE, 0.3, bias=case.bias, chunk_tokens=4)
        out.loss.backward()
        assert torch.equal(out.loss.detach(), want.loss.detach())
        assert torch.equal(leaf.grad, gradients["hidden"])


def test_padded_columns_take_no_part():
    case = HiddenCase(dtype=torch.float64)
    want, gradients = case.ours(OBJECTIVE)
    case.weight = torch.cat((case.weight, torch.full((11, 12), 50.0, dtype=torch.float64)))
    case.bias = torch.cat((case.bias, torch.full((11,), 50.0, dtype=torch.float64)))
    got, padded = case.ours(OBJECTIVE, vocab_size=37)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-13, atol=0)
    torch.testing.assert_close(padded["weight"][:37], gradients["weight"], rtol=1e-12, atol=1e-15)
    assert not padded["weight"][37:].any() and not padded["bias"][37:].any()


def test_temperature_a_sequence():
    heat = torch.tensor([0.5, 1.0, 2.0, 1.5], dtype=torch.float64)
    for packed in (False, True):
        case = HiddenCase(dtype=torch.float64, packed=packed)
        case.check(OBJECTIVE, transform=gk.LogitTransform(heat, 5.0), chunk_tokens=4)


def test_one_backward_and_no_second_derivative():
    case = HiddenCase()
    leaves = case.leaves()

    def loss():
        return gk.hybrid_loss_from_hidden(leaves["hidden"], leaves["weight"], case.batch, OBJECTIVE, 0.3).loss

    value = loss()
    value.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        value.backward()
    for name in ("hidden", "weight"):
        (gradient,) = torch.autograd.grad(loss(), leaves[name], create_graph=True)
        with pytest.raises(RuntimeError, match="second derivative"):
            gradient.sum().backward()
    logprobs = gk.token_logprobs_from_hidden(
        leaves["hidden"], leaves["weight"], case.batch.targets, mask=case.batch.mask
    )
    (gradient,) = torch.autograd.grad(logprobs.logprobs.sum(), leaves["weight"], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("policy", [gk.SAPO(), gk.GSPO()], ids=policy_name)
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_hidden_signals_are_the_sequences_own_gradients(policy, packed):
    """Each sequence's row: the gradient, on a bias of its hidden states, of its own mean loss in its branch."""
    case = HiddenCase(dtype=torch.float64, packed=packed)
    objective = gk.HybridObjective(policy, kl_coef=0.1, aggregation="token-mean")
    for mu in (0.3, 0.8):
        out, _ = case.ours(objective, mu, chunk_tokens=4)
        assert out.signals.hidden.shape == (4, 12)
        for s in range(4):
            bias = torch.zeros(12, dtype=torch.float64, requires_grad=True)
            if packed:
                begin, end = (int(v) for v in case.batch.cu_seqlens[s : s + 2])
                inside = torch.zeros_like(case.batch.mask)
                inside[begin:end] = True
            else:
                inside = torch.zeros_like(case.batch.mask)
                inside[s] = True
            mask = case.batch.mask & inside
            if not mask.any():
                assert not out.signals.hidden[s].any()
                continue
            batch = gk.TokenBatch(**{**vars(case.batch), "mask": mask})
            hidden = torch.where(mask[..., None], case.hidden, 0.0) + bias
            logits = hidden @ case.weight.t() + case.bias
            reference.hybrid_loss_from_logits(logits, batch, objective, float(case.batch.is_expert[s])).loss.backward()
            torch.testing.assert_close(out.signals.hidden[s], bias.grad, rtol=1e-9, atol=1e-13)


def test_without_gradient():
    case = HiddenCase(dtype=torch.float64)
    want, _ = case.ours(OBJECTIVE)
    got, _ = case.ours(OBJECTIVE, wanted=())
    torch.testing.assert_close(got.loss, want.loss.detach(), rtol=1e-13, atol=0)
    assert not got.loss.requires_grad and got.signals.hidden is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logprobs(transform, dtype):
    case, made = HiddenCase(dtype=dtype, kl=False), TRANSFORMS[transform]
    leaves, wide = case.leaves(), case.leaves(torch.float64)
    got = gk.token_logprobs_from_hidden(
        leaves["hidden"], leaves["weight"], case.batch.targets, bias=leaves["bias"], mask=case.batch.mask,
        transform=made, chunk_tokens=4,
    )  # fmt: skip
    live = torch.where(case.batch.mask[..., None], wide["hidden"], 0.0)
    want = reference.token_logprobs(live @ wide["weight"].t() + wide["bias"], case.batch.targets, case.batch.mask, made)
    bound = 1e-12 if dtype == torch.float64 else 6e-6
    for name in ("logprobs", "entropy", "sum_sq"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(want, name), rtol=bound, atol=bound)
    upstream = torch.randn(2, *case.batch.mask.shape, dtype=torch.float64)
    (upstream[0] * got.logprobs + upstream[1] * got.entropy).sum().backward()
    (upstream[0] * want.logprobs + upstream[1] * want.entropy).sum().backward()
    for name in HEAD:
        expected = wide[name].grad
        ulp = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(dtype, 0.0)
        error = (leaves[name].grad.double() - expected).abs() - ulp * expected.abs()
        assert float(error.max()) <= (1e-11 if dtype == torch.float64 else 1e-5) * float(expected.abs().max())


def test_token_logprobs_of_any_leading_shape():
    hidden, weight = torch.randn(2, 3, 4, 8, dtype=torch.float64), torch.randn(21, 8, dtype=torch.float64)
    targets = torch.randint(0, 21, (2, 3, 4))
    targets[1, 2] = -100
    got = gk.token_logprobs_from_hidden(hidden, weight, targets, chunk_tokens=5, outputs=("logprobs",))
    want = gk.token_logprobs(hidden @ weight.t(), targets)
    torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-12, atol=1e-13)
    assert got.entropy is None and got.sum_sq is None and not got.logprobs[1, 2].any()


WRONG = {
    "hidden": [([[1.0]], TypeError, "hidden must be a torch.Tensor, got list"),
               (torch.ones(4, 9, 12, dtype=torch.int64), TypeError, "hidden must have dtype"),
               (torch.ones(4, 8, 12), ValueError, r"hidden must have shape \(4, 9, H\)"),
               (torch.ones(4, 9, 0), ValueError, "weight must have shape")],
    "weight": [(None, TypeError, "weight must be a torch.Tensor, got NoneType"),
               (torch.ones(37, 11), ValueError, r"weight must have shape \(V, 12\)"),
               (torch.ones(37, 12).double(), TypeError, "weight must have dtype torch.float32 like hidden"),
               (torch.ones(0, 12), ValueError, "weight must have at least one row, got none: a ZeRO-3")],
    "bias": [(torch.ones(36), ValueError, r"bias must have shape \(37,\)"),
             (torch.ones(37).double(), TypeError, "bias must have dtype torch.float32 like hidden")],
    "chunk_tokens": [(0, ValueError, "chunk_tokens must be a positive int"),
                     (2.0, ValueError, "chunk_tokens must be a positive int")],
    "vocab_size": [(38, ValueError, r"vocab_size must be in \[1, 37\]"), (0, ValueError, "vocab_size must be")],
    "mu": [(1.5, ValueError, "mu must be finite and in")],
    "transform": [(0.7, TypeError, "transform must be a LogitTransform")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "error", "text"), [(n, *w) for n, wrong in WRONG.items() for w in wrong],
    ids=[f"{n}{i}" for n, wrong in WRONG.items() for i in range(len(wrong))],
)  # fmt: skip
def test_bad_arguments(name, value, error, text):
    case = HiddenCase(poison=False)
    arguments = {"hidden": case.hidden, "weight": case.weight, "mu": 0.3, "bias": case.bias} | {name: value}
    hidden, weight, mu = arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("mu")
    bias = arguments.pop("bias")
    bias = bias if name == "bias" else None
    with pytest.raises(error, match=text):
        gk.hybrid_loss_from_hidden(hidden, weight, case.batch, OBJECTIVE, mu, bias=bias, **arguments)
    if name != "mu":
        with pytest.raises(error, match=text):
            gk.token_logprobs_from_hidden(hidden, weight, case.batch.targets, bias=bias, **arguments)


def test_bad_targets_and_gift():
    case = HiddenCase(poison=False, holes=False)
    with pytest.raises(ValueError, match=r"batch\.base_logits, or base_hidden and base_weight, must be given"):
        case.ours(gk.HybridObjective(supervised=gk.GIFT()))
    with pytest.raises(ValueError, match="base_weight must be given"):
        case.ours(gk.HybridObjective(supervised=gk.GIFT()), base_hidden=case.hidden)
    with pytest.raises(ValueError, match="base_weight must have 37 rows"):
        case.ours(gk.HybridObjective(supervised=gk.GIFT()), base_hidden=case.hidden, base_weight=case.weight[:30])
    with pytest.raises(ValueError, match="base_hidden must have shape"):
        case.ours(gk.HybridObjective(supervised=gk.GIFT()), base_hidden=case.hidden[:2], base_weight=case.weight)
    case.batch.targets[0, 0] = 37
    with pytest.raises(ValueError, match=r"batch.targets must be in \[0, 37\)"):
        case.ours(OBJECTIVE)


def test_chunks_fit_their_budget():
    for rows, V, dtype in ((1, 1, torch.float32), (512, 151936, torch.float32), (2048, 151936, torch.bfloat16),
                           (5000, 16, torch.float32), (36, 10**8, torch.float32), (100, 10**8, torch.float32),
                           (0, 7, torch.float32)):  # fmt: skip
        chunk = products.chunk_rows(rows, V, dtype, torch.device("cpu"))
        assert 1 <= chunk <= max(1, rows)
        assert chunk * V * 4 <= products.CHUNK_BYTES["cpu"] or chunk <= 16
        largest = max(16, products.CHUNK_BYTES["cpu"] // (V * 4) // 16 * 16)
        assert -(-rows // chunk) == -(-rows // largest)  # as few as there can be
