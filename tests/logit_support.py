"""Batches of logits for tests, the float64 oracle of their loss, and the bounds an implementation must meet."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

import gac_kernels as gk
from gac_kernels import reference

POISON = (float("nan"), float("inf"), -float("inf"))
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TRANSFORMS = {
    "plain": gk.LogitTransform(),
    "temperature": gk.LogitTransform(0.7),
    "softcap": gk.LogitTransform(softcap=4.0),
    "all": gk.LogitTransform(1.3, softcap=6.0, scale=0.5),
}

ROW_POLICIES = [
    *(gk.SAPO(gate) for gate in ("sigmoid", "erf", "arctan", "softsign")), gk.GRPO(delta=1.5), gk.CISPO(), gk.GSPO(),
]  # fmt: skip


@dataclass
class LogitCase:
    """``logits`` (S, T, V) or packed (N, V) and their batch; dead rows hold poison."""

    logits: Tensor
    batch: gk.TokenBatch
    base: Tensor | None = None

    def double(self) -> LogitCase:
        """The same values, rounded as they are, in float64."""
        wide = {
            name: value.double()
            for name, value in vars(self.batch).items()
            if isinstance(value, Tensor) and value.is_floating_point()
        }
        return LogitCase(self.logits.double(), replace(self.batch, **wide), self.base)

    def oracle(self, objective, mu, transform=None, denominators=None):
        """The loss by the reference in float64 and the logits' gradient by autograd."""
        wide = self.double()
        return run(reference.hybrid_loss_from_logits, wide, objective, mu, transform, denominators=denominators)

    def eager(self, objective, mu, transform=None):
        """The same in the logits' own dtype: what PyTorch makes of it."""
        return run(reference.hybrid_loss_from_logits, self, objective, mu, transform)


def run(function, case: LogitCase, objective, mu, transform=None, **options):
    leaf = case.logits.clone().requires_grad_()
    logits = leaf * 1.0 if options.get("inplace") else leaf
    out = function(logits, case.batch, objective, mu, transform=transform or gk.LogitTransform(), **options)
    out.loss.backward()
    return out, leaf.grad


class _Computed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, leaf):
        return leaf.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def computed(leaf):
    """Logits in the leaf's memory and strides that are neither a leaf nor a view of one to autograd."""
    return _Computed.apply(leaf)


def make(
    lengths=(5, 0, 9, 3), expert=(False, True, False, True), *, V=37, dtype=torch.float32, seed=0, scale=3.0,
    spread=0.3, packed=False, base=False, kl=True, rollout=True, old=True, transform=None, poison=True, holes=True,
    logits=None,
) -> LogitCase:  # fmt: skip
    """Random rows whose old and reference log-probs lie near their own."""
    g = torch.Generator().manual_seed(seed)
    S, T = len(lengths), max([*lengths, 1])

    def rand(*shape):
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    if logits is None:
        logits = (scale * torch.randn(S, T, V, generator=g, dtype=torch.float64)).to(dtype)
    targets = torch.randint(0, V, (S, T), generator=g)
    inside = torch.arange(T)[None] < torch.tensor(lengths, dtype=torch.long)[:, None]
    mask = inside & (rand(S, T) > 0.15) if holes else inside
    logp = reference.token_logprobs(logits.double(), targets, None, transform).logprobs
    acc = torch.promote_types(dtype, torch.float32)
    near = {
        "old_logprobs": logp + spread * (rand(S, T) * 2 - 1) if old else None,
        "ref_logprobs": logp + spread * (rand(S, T) * 2 - 1) if kl else None,
        "rollout_weights": 0.5 + rand(S, T) if rollout else None,
    }
    near = {name: None if value is None else value.to(acc) for name, value in near.items()}
    base_logits = (scale * torch.randn(S, T, V, generator=g, dtype=torch.float64)).to(dtype) if base else None
    advantages = torch.randn(S, generator=g, dtype=torch.float64).to(acc)
    if poison:
        for k, value in enumerate((logits, base_logits, *near.values())):
            if value is not None:
                value[~mask] = POISON[k % 3]
        targets[~mask] = 10**9
    groups = torch.tensor([(7 * i) % 3 - 1 for i in range(S)], dtype=torch.long)
    common = {
        "is_expert_S": torch.tensor(list(expert), dtype=torch.bool), "advantages": advantages, "groups": groups,
    }  # fmt: skip
    if not packed:
        batch = gk.TokenBatch.from_padded(targets, mask, base_logits=base_logits, **near, **common)
        return LogitCase(logits, batch, base_logits)
    near = {name: None if value is None else value[inside] for name, value in near.items()}
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    base_logits = None if base_logits is None else base_logits[inside]
    batch = gk.TokenBatch.from_packed(
        targets[inside], cu_seqlens, mask_N=mask[inside], base_logits=base_logits, **near, **common
    )
    return LogitCase(logits[inside], batch, base_logits)


def worst(got: Tensor, want: Tensor) -> float:
    """Largest error relative to the largest magnitude. Raises where one is finite and the other is not."""
    got, want = got.double(), want.double()
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.isinf(), want.isinf())
    if not got.numel():
        return 0.0
    got, want = got.nan_to_num(0, 0, 0), want.nan_to_num(0, 0, 0)
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-30))


def check_rows(got: Tensor, want: Tensor, acc: torch.dtype) -> None:
    """Per-row results: 4 ulp and 1e-6 of float32 (float64: 1e-12)."""
    assert got.dtype == acc
    rtol, atol = (4 * 2.0**-23, 1e-6) if acc == torch.float32 else (1e-12, 1e-12)
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol, equal_nan=True)


def check_gradient(got: Tensor, want: Tensor, eager: Tensor | None = None, condition: float = 1.0) -> None:
    """float64: 1e-11 of the largest. float32: 2e-6 of the largest, or no worse than twice what eager PyTorch makes of
    it. 16 bits: one ulp of the value and the same floor. The floor rises with the ``condition`` of the slopes."""
    assert got.shape == want.shape
    assert torch.isfinite(got).all()
    largest = want.abs().max() if want.numel() else torch.zeros(())
    floor = condition * {torch.float64: 1e-11}.get(got.dtype, 2e-6)
    if eager is not None and got.dtype == torch.float32:
        floor = max(floor, 2 * worst(eager, want))
    ulp = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}.get(got.dtype, 0.0)
    # float16 has steps of 2^-24 near zero; no kernel promises denormal numbers
    tiny = 2.0**-24 if got.dtype == torch.float16 else 1e-30
    error = (got.double() - want).abs() - (ulp * want.abs() + floor * largest + tiny)
    assert not error.numel() or float(error.max()) <= 0, f"gradient is off by {float(error.max()):.3g} beyond its bound"


def check(case: LogitCase, objective, mu=0.3, transform=None, **options) -> None:
    """Loss, gradient, per-row results, signals and metrics against the oracle."""
    want, want_gradient = case.oracle(objective, mu, transform, options.get("denominators"))
    _, eager_gradient = case.eager(objective, mu, transform) if case.logits.dtype == torch.float32 else (None, None)
    got, gradient = run(gk.hybrid_loss_from_logits, case, objective, mu, transform, **options)
    acc = torch.promote_types(case.logits.dtype, torch.float32)
    assert gradient.dtype == case.logits.dtype
    check_rows(got.logprobs, want.logprobs, acc)
    check_rows(got.token_entropy, want.token_entropy, acc)
    # A ratio exp(logp - old) amplifies the rounding of a large logp: no arithmetic in this precision can avoid it.
    condition = max(1.0, float(want.logprobs.abs().max())) if want.logprobs.numel() else 1.0
    check_gradient(gradient, want_gradient, eager_gradient, condition)
    bound = condition * (1e-11 if acc == torch.float64 else 2e-6)
    for name in ("loss", "policy_loss", "supervised_loss", "kl", "entropy"):
        value, expected = getattr(got, name), getattr(want, name)
        assert value.dtype == acc and value.shape == ()
        torch.testing.assert_close(value.double(), expected.double(), rtol=bound, atol=bound, equal_nan=True)
    torch.testing.assert_close(got.signals.rows.double(), want.signals.rows, rtol=10 * bound, atol=10 * bound)
    assert got.metrics.keys() == want.metrics.keys()
    for name, value in got.metrics.items():
        torch.testing.assert_close(value.double(), want.metrics[name], rtol=10 * bound, atol=10 * bound)


def with_infinities(T: int, dtype: torch.dtype) -> LogitCase:
    """Rows with one -inf logit, with a first tile of them, with all but one, with a target of -inf, and huge ones."""
    case = make((T, T), (False, True), V=5000, dtype=dtype, holes=False, poison=False, rollout=False)
    case.logits[:, 0, 7] = -torch.inf
    case.logits[:, 1, :4500] = -torch.inf
    case.batch.targets[:, 1] = 4700
    case.logits[:, 2] = -torch.inf
    case.logits[:, 2, 3] = 2.0
    case.batch.targets[:, 2] = 3
    case.batch.targets[:, 3] = 11
    case.logits[:, 3, 11] = -torch.inf
    case.logits[:, 4] = 1e4 * torch.sign(case.logits[:, 4])
    return case
