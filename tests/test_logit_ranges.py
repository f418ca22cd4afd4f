"""Probabilities stay probabilities, whatever the logits, the temperature and the soft cap are, on every backend: no
log-prob above 0, no entropy or squared norm below, and the float64 value within the bound."""

from __future__ import annotations

import pytest
import torch

import gac_kernels as gk
from gac_kernels import library, reference, signals

MOST = torch.finfo(torch.float32).max


@pytest.fixture(params=["reference", "cpu", "triton", "cuda"])
def any_backend(request):
    """The compiled kernels, Triton's in its interpreter and CUDA's on host threads."""
    if request.param == "cuda":
        import cuda_emulation

        cuda_emulation.load()
    if request.param == "triton" and (not library.has_triton or torch.cuda.is_available()):
        pytest.skip("tensors on a CPU need Triton and its interpreter")
    if request.param == "cpu" and not gk.backends()["cpu"].startswith("cpu:"):
        pytest.skip("this install has no compiled module")
    with gk.use_backend(request.param):
        yield request.param


def rows_for(backend: str, rows: int) -> int:
    """Few where an interpreter runs or a host thread stands for each of a GPU's."""
    return 4 if backend in ("triton", "cuda") else rows


def formula(logits, targets, transform):
    """Log-prob, entropy, sum p^2, the log-prob's gradient, and dz / draw where it is largest, in float64; differences
    first, so that nothing overflows."""
    x = logits.double()
    heat = transform.temperature
    heat = heat.double()[:, None] if isinstance(heat, torch.Tensor) else heat
    k, slope = transform.scale / heat, torch.ones_like(x)
    if transform.softcap is not None:
        a = x * (transform.scale / transform.softcap)
        x, k, slope = torch.tanh(a), transform.softcap / heat, 1.0 / torch.cosh(a).square()
    z = (x - x.amax(-1, keepdim=True)) * k
    logp = z - z.logsumexp(-1, keepdim=True)
    p = logp.exp()
    entropy = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    one = torch.zeros_like(p).scatter_(-1, targets[:, None], 1.0)
    chosen = logp.gather(-1, targets[:, None])[:, 0]
    others = torch.where(one > 0, -torch.expm1(chosen)[:, None], -p)
    factor = torch.as_tensor(transform.scale / heat, dtype=torch.float64)
    if logits.dtype != torch.float64:
        chosen = chosen.float().double()  # -inf where float32 has nothing larger
    return chosen, entropy, p.square().sum(-1), others * factor * slope, factor


def check(logits, targets, transform):
    """Values by the bound, what they can be exactly, and a gradient that is finite."""
    leaf = logits.clone().requires_grad_()
    out = gk.token_logprobs(leaf, targets, transform=transform)
    out.logprobs.sum().backward()
    logp, entropy, sum_sq, gradient, factor = formula(logits, targets, transform)
    wide = logits.dtype == torch.float64
    rtol, atol = (1e-12, 1e-12) if wide else (4 * 2.0**-23, 1e-6)
    torch.testing.assert_close(out.logprobs.double(), logp, rtol=rtol, atol=atol)
    torch.testing.assert_close(out.entropy.double(), entropy, rtol=rtol, atol=4 * atol)
    torch.testing.assert_close(out.sum_sq.double(), sum_sq, rtol=rtol, atol=atol)
    assert (out.logprobs <= 0).all() and (out.entropy >= 0).all()
    assert (out.sum_sq >= 0).all() and (out.sum_sq <= 1).all()
    bound = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9, torch.float64: 1e-11}.get(logits.dtype, 4e-6)
    got = leaf.grad.double()
    assert got.isfinite().all()
    assert ((got - gradient).abs() <= bound * factor + 2.0**-24 * (logits.dtype == torch.float16)).all()
    return out


LARGE = {
    "the program's": ([1e10, 0.0, -5e9], 0.7),
    "a small temperature": ([50.0, 60.0, -3.0], 1e-8),
    "neighbours": ([1e30, 9e29, 0.0], 1.3),
    "near 2^32": ([3e9, 0.0, 1.0], 0.7),
    "5e6 at 1e-3": ([5e6, 1e6, 0.0], 1e-3),
    "tops that are equal": ([1e9, 1e9, 1e9 - 64.0], 0.7),
    "one unit apart": ([16777217.0 * 64, 16777216.0 * 64, 0.0], 300.0),
    "all negative": ([-1e10, -2e10, -3e10], 0.3),
    "the largest there are": ([MOST, MOST, -MOST], 1.3),
    "the smallest there are": ([-MOST, -MOST, -MOST], 0.7),
    "beyond the largest": ([MOST, -MOST, 0.0], 0.1),
    "the smallest temperature": ([3.0, 2.0, 2.5], 1e-37),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_logits(any_backend, name):
    """A product that is large and exact less one that is rounded is any number; a difference times a factor is not."""
    values, temperature = LARGE[name]
    width = 3 if any_backend in ("triton", "cuda") and "largest" not in name else 700  # of several threads' columns
    logits = torch.tensor([values + [-MOST if min(values) == -MOST else 2 * min(values) - 1.0] * (width - 3)] * 3)
    targets = torch.tensor([0, 1, 2])
    check(logits, targets, gk.LogitTransform(temperature))
    check(logits, targets, gk.LogitTransform(temperature=torch.full((3,), temperature)))
    if max(map(abs, values)) < 1e38:
        check(logits.double(), targets, gk.LogitTransform(temperature))
        check(logits.bfloat16(), targets, gk.LogitTransform(temperature))


def test_large_logits_with_a_factor(any_backend):
    """scale * logit is beyond the dtype, and beyond float32."""
    logits = torch.tensor([[3e38, 2.9e38, -1e38]] * 2)
    check(logits, torch.tensor([0, 1]), gk.LogitTransform(1.3, scale=7.0))
    check(torch.tensor([[6e4, 5.9e4, -6e4]] * 2, dtype=torch.float16), torch.tensor([0, 1]), gk.LogitTransform(0.3))


@pytest.mark.parametrize("inplace", [False, True], ids=["new", "inplace"])
def test_large_logits_in_the_losses(any_backend, inplace):
    """Fused rows and those that look twice; every gradient is finite, and that of float64."""
    for policy in (gk.SAPO(), gk.GSPO()):
        for values, temperature in (([1e10, 0.0, -5e9], 0.7), ([1e30, 9e29, 0.0], 1.3), ([5e6, 5e6 - 1, 0.0], 1e-3)):
            logits = torch.tensor([[values, values]])
            batch = gk.TokenBatch.from_padded(
                torch.tensor([[1, 0]]), torch.ones(1, 2, dtype=torch.bool), advantages=torch.ones(1)
            )
            leaf = logits.clone().requires_grad_()
            objective, transform = gk.HybridObjective(policy, entropy_coef=0.1), gk.LogitTransform(temperature)
            out = gk.hybrid_loss_from_logits(leaf * 1, batch, objective, 0.0, transform=transform, inplace=inplace)
            out.loss.backward()
            logp, entropy, *_ = formula(logits[0], torch.tensor([1, 0]), transform)
            torch.testing.assert_close(out.logprobs[0].double(), logp, rtol=4 * 2.0**-23, atol=1e-6)
            torch.testing.assert_close(out.token_entropy[0].double(), entropy, rtol=4 * 2.0**-23, atol=1e-6)
            assert out.loss.isfinite() and leaf.grad.isfinite().all()


def test_rows_of_hidden_states_with_large_logits():
    hidden = torch.tensor([[[1e5, 0.0], [0.0, 1e5], [1e5, 1e5]]])
    weight = torch.tensor([[1e5, 0.0], [0.0, 3e5], [-7e4, 1e5], [1.0, 1.0]])
    targets = torch.tensor([[1, 2, 1]])
    for chunk in (1, 3):
        leaf = hidden.clone().requires_grad_()
        transform = gk.LogitTransform(0.7)
        out = gk.token_logprobs_from_hidden(leaf, weight, targets, transform=transform, chunk_tokens=chunk)
        out.logprobs.sum().backward()
        logp, *_ = formula(hidden[0] @ weight.T, targets[0], transform)
        torch.testing.assert_close(out.logprobs[0].double(), logp, rtol=4 * 2.0**-23, atol=1e-6)
        assert leaf.grad.isfinite().all()


@pytest.mark.parametrize("V", [1, 40, 1000])
def test_confident_rows(any_backend, V):
    """Log-probs of 0 less a rounding: at any temperature not above it."""
    g = torch.Generator().manual_seed(V)
    rows = rows_for(any_backend, 24)
    for sharp, temperature in ((1.0, 0.7), (30.0, 0.7), (12.0, 0.6), (30.0, 0.3))[24 - rows and 2 :]:
        logits = sharp * torch.randn(rows, V, generator=g)
        check(logits, logits.argmax(-1), gk.LogitTransform(temperature))
        check(logits, logits.argmax(-1), gk.LogitTransform(temperature, softcap=30.0))


@pytest.mark.parametrize("cap", [1.0, 30.0, 50.0])
def test_a_soft_cap_keeps_the_bound(any_backend, cap):
    """Gemma's cap at temperatures of 1 and below, logits far below it, around it, far beyond, and infinite.

    A difference of two tanh in float32 has an error of 1e-7 cap / temperature.
    """
    g = torch.Generator().manual_seed(int(cap))
    rows = rows_for(any_backend, 24)
    for size, temperature in ((3.0, 0.1), (0.2, 1.0), (1.0, 0.7), (1.0, 0.25))[24 - rows and 2 :]:
        logits = size * cap * torch.randn(rows, 257, generator=g)
        targets = torch.randint(257, (rows,), generator=g)
        targets[: rows // 4] = logits[: rows // 4].argmax(-1)
        check(logits, targets, gk.LogitTransform(temperature, cap))
    check(logits.double(), targets, gk.LogitTransform(0.7, cap))
    check(logits.bfloat16(), targets, gk.LogitTransform(0.7, cap, 1.3))
    logits[:, 3], logits[:, 7], logits[:, 9], logits[0] = torch.inf, -torch.inf, MOST, -torch.inf
    out = gk.token_logprobs(logits, targets, transform=gk.LogitTransform(0.7, cap))
    capped = cap * torch.tanh(logits.double() / cap) / 0.7
    want = torch.log_softmax(capped, -1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(out.logprobs.double(), want, rtol=4 * 2.0**-23, atol=1e-6)


class TestShards:
    """What ranks make of their shards' statistics."""

    transform = reference.RowTransform(1.0, 0.0, 0.7)

    def merged(self, logits, targets, cuts, transform, softcap=0.0):
        """``VocabularyShard.merge`` of shards that lie in one process."""
        from gac_kernels import shards

        parts = []
        for begin, end in zip((0, *cuts), (*cuts, logits.shape[-1]), strict=True):
            local = torch.where((targets >= begin) & (targets < end), targets - begin, -(2**31))
            kind = torch.ones(len(targets), dtype=torch.uint8)
            static = transform.scale, softcap, transform.heat, 0.0, 0.0
            own = library.call(
                "row_statistics", logits[None, :, begin:end].contiguous(), local, kind, None, None, *static
            )
            parts.append((own[3][:, 0], own[3][:, 1], own[1], own[2], own[0], (local >= 0).to(own[0].dtype)))
        shard = shards.VocabularyShard(None, 0, logits.shape[-1], logits.shape[-1])
        gathered = torch.stack([torch.stack(part) for part in parts])
        original, shards.all_gather = shards.all_gather, lambda value, group: gathered
        try:
            return shard.merge(
                targets, (parts[0][4], parts[0][2], parts[0][3], torch.stack(parts[0][:2], 1)), transform
            )
        finally:
            shards.all_gather = original

    @pytest.mark.parametrize("softcap", [0.0, 30.0])
    def test_confident_and_large(self, softcap):
        g = torch.Generator().manual_seed(1)
        for sharp, heat in ((30.0, 0.7), (5.0, 0.6), (1e10, 0.7), (1e30, 1.3)):
            logits = sharp * torch.randn(60, 90, generator=g)
            targets = logits.argmax(-1)
            targets[::3] = torch.randint(90, (20,), generator=g)
            transform = reference.RowTransform(1.0, softcap, heat)
            logp, entropy, sum_sq, normalizer = self.merged(logits, targets, (7, 50), transform, softcap)
            want = formula(logits, targets, gk.LogitTransform(heat, softcap or None))
            torch.testing.assert_close(logp.double(), want[0], rtol=4 * 2.0**-23, atol=1e-6)
            torch.testing.assert_close(entropy.double(), want[1], rtol=4 * 2.0**-23, atol=4e-6)
            torch.testing.assert_close(sum_sq.double(), want[2], rtol=4 * 2.0**-23, atol=1e-6)
            assert (logp <= 0).all() and (entropy >= 0).all() and (sum_sq >= 0).all() and (sum_sq <= 1).all()
            assert (normalizer[:, 1] >= 0).all() and torch.equal(normalizer[:, 0], logits.amax(-1))


def batch_of(rows, V, sharp, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = sharp * torch.randn(2, rows, V, generator=g)
    targets = logits.argmax(-1)
    targets[:, ::5] = torch.randint(V, targets[:, ::5].shape, generator=g)
    batch = gk.TokenBatch.from_padded(
        targets, torch.ones(2, rows), is_expert_S=torch.tensor([False, True]), advantages=torch.tensor([1.0, 0.0])
    )
    return logits, batch


@pytest.mark.parametrize("sharp", [0.5, 4.0, 8.0, 30.0])
def test_squared_norms_of_gradients(any_backend, sharp):
    """||1_y - p||^2 from p and sum p^2, of confident tokens too: 1 - 2 p + sum p^2 rounds to -1e-7 there. A sequence a
    token; within 4 ulp of 1, within a factor of 2, and never below 0."""
    V, rows = 50, rows_for(any_backend, 40)
    logits, batch = batch_of(rows, V, sharp)
    logp_NV = torch.log_softmax(logits.double().view(-1, V), -1)
    targets = batch.targets.reshape(-1)
    single = gk.TokenBatch.from_padded(targets[:, None], torch.ones(2 * rows, 1), advantages=torch.ones(2 * rows))
    one = torch.zeros_like(logp_NV).scatter_(-1, targets[:, None], 1.0)
    chosen = logp_NV.gather(-1, targets[:, None])
    want = torch.where(one > 0, torch.expm1(chosen), logp_NV.exp()).square().sum(-1)
    out = gk.hybrid_loss_from_logits(logits.view(-1, 1, V), single, gk.HybridObjective(gk.CISPO()), 0.0)
    norms, slopes = out.signals.rows[:, signals.OWN_NORM].double(), out.signals.rows[:, signals.CR2].double()
    assert (norms >= 0).all() and (out.signals.rows[:, signals.DIFF_NORM] >= 0).all()
    got = norms / slopes
    assert ((got - want).abs() <= 4 * 2.0**-23 * (1.0 + want)).all()
    known = want > 1e-10  # below, the log-prob itself is within rounding of 0
    assert (got[known] <= 2.01 * want[known]).all()


def test_squared_norms_of_what_cannot_be(any_backend):
    """Log-probs above 0, as hosts round them, and sums that no distribution has: not below 0. What is not finite stays
    so, for whoever counts it."""
    logprobs = torch.tensor([[1e-7], [0.0], [-1e-9], [3e-3], [-0.5], [-0.5], [-0.1], [-0.1], [-torch.inf]])
    sum_sq = torch.tensor([[1.0], [1.0 - 1e-7], [0.9], [1.0], [0.0], [5.0], [torch.inf], [torch.nan], [0.5]])
    batch = gk.TokenBatch.from_padded(torch.zeros(9, 1, dtype=torch.long), torch.ones(9, 1), advantages=torch.ones(9))
    rows = gk.signals_from_logprobs(logprobs, batch, gk.HybridObjective(gk.CISPO()), sum_sq=sum_sq).rows
    norms = rows[:, signals.OWN_NORM]
    assert (norms[:6] >= 0).all() and norms[8] >= 0
    assert norms[:6].isfinite().all() and not norms[6].isfinite() and norms[7].isnan()
    p = torch.tensor(-0.5).exp()
    torch.testing.assert_close(norms[4], (1 - p) ** 2)
    torch.testing.assert_close(norms[5], 2 * (1 - p) ** 2)
