"""Arguments for the row operators themselves, and their float64 oracle: the reference formulas and autograd."""

from __future__ import annotations

import torch
from logit_support import DTYPES, TRANSFORMS, check_rows
from torch import Tensor

import gac_kernels as gk
from gac_kernels import library, reference, schemas
from gac_kernels.reference.logits import transformed

PLAIN = (1.0, 0.0, 1.0, 0.0, 0.0)  # no transform, no GIFT
STATISTICS = ("logprobs", "entropy", "sum_sq")
DEAD, ROLLOUT, DEMONSTRATION = schemas.DEAD, schemas.ROLLOUT, schemas.DEMONSTRATION


def op(name: str, *args):
    """The operator itself, of the backend in force."""
    return library.call(name, *args)


class RowCase:
    """N = A B random rows of V logits, one in four dead (its logits nan), the others rollouts and demonstrations."""

    def __init__(
        self, A=3, B=4, V=37, dtype=torch.float32, *, transform=None, heat=False, gift=None, scale=3.0, seed=0,
        dead=True,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.N, self.V, self.dtype, self.gift = A * B, V, dtype, gift
        self.acc = torch.promote_types(dtype, torch.float32)
        self.transform = transform or gk.LogitTransform()
        self.logits = (scale * torch.randn(A, B, V, generator=g, dtype=torch.float64)).to(dtype)
        self.targets = torch.randint(0, V, (self.N,), generator=g)
        self.kind = torch.tensor([1, 2, 1, 0] if dead else [1, 2, 1, 1], dtype=torch.uint8).repeat(self.N)[: self.N]
        self.live = self.kind != DEAD
        self.logits.view(self.N, V)[~self.live] = float("nan")
        self.targets[~self.live] = -100
        self.temperature = (0.5 + torch.rand(self.N, generator=g)).to(self.acc) if heat else None
        self.slope, self.entropy_slope = (torch.randn(self.N, generator=g, dtype=self.acc) for _ in range(2))
        self.base = None if gift is None else (scale * torch.randn(A, B, V, generator=g)).to(dtype)

    @property
    def rows(self) -> tuple:
        return self.targets, self.kind, self.temperature, self.base

    @property
    def static(self) -> tuple:
        return schemas.encode_rows(self.transform, self.gift, self.V)

    def statistics(self, logits: Tensor | None = None) -> tuple[Tensor, ...]:
        return op("row_statistics", self.logits if logits is None else logits, *self.rows, *self.static)

    def gradient(self, statistics, *, bonus=True, inplace=False, logits: Tensor | None = None) -> Tensor:
        logits = self.logits if logits is None else logits
        given = statistics[3], statistics[1], self.slope, self.entropy_slope if bonus else None
        if not inplace:
            return op("row_gradient", logits, *self.rows, *given, *self.static)
        out = logits.clone()
        assert op("row_gradient_", out, *self.rows, *given, *self.static) is None
        return out

    def oracle(self, *, bonus=True) -> tuple[dict[str, Tensor], Tensor]:
        """Statistics in float64 and, by autograd, the gradient of ``sum slope logp + entropy_slope entropy``, where on
        demonstrations with a base GIFT's loss takes the place of ``-logp``."""
        leaf = self.logits.double().requires_grad_()
        rows_NV = leaf.view(self.N, self.V)
        heat = None if self.temperature is None else self.temperature.double()
        out = reference.token_logprobs(rows_NV, self.targets, self.live, self.transform, heat)
        loss = self.slope.double() * out.logprobs
        want = {name: getattr(out, name).detach() for name in STATISTICS}
        if self.base is not None:
            on = self.kind == DEMONSTRATION
            z_NV = transformed(torch.where(on[:, None], rows_NV, 0.0), self.transform, heat)
            base_NV = torch.where(on[:, None], self.base.double().view(self.N, self.V), 0.0)
            cross = reference.gift_loss(z_NV, base_NV, torch.where(on, self.targets, 0), self.gift)
            want["supervised"] = torch.where(on, cross, 0.0).detach()
            loss = torch.where(on, -self.slope.double() * cross, loss)
        if bonus:
            loss = loss + self.entropy_slope.double() * out.entropy
        gradient = torch.autograd.grad(loss[self.live].sum(), leaf)[0]
        return want, torch.where(self.live.view(*self.logits.shape[:2], 1), gradient, 0.0)

    def check_gradient(self, got: Tensor, want: Tensor, entropy: Tensor | None) -> None:
        """Row by row: 16 bits within one ulp, float32 within 2e-6 (float64 1e-11) of what the slopes could give."""
        assert got.dtype == self.dtype and got.isfinite().all()
        span = self.slope.double().abs()
        if entropy is not None:  # |p (log p + H)| <= 1 + H
            span = span + self.entropy_slope.double().abs() * (1 + entropy)
        heat = self.transform.temperature if self.temperature is None else self.temperature.double()
        floor_N = {torch.float64: 1e-11}.get(self.dtype, 2e-6) * span * self.transform.scale / heat
        ulp, tiny = {torch.bfloat16: (2.0**-7, 0.0), torch.float16: (2.0**-10, 2.0**-24)}.get(self.dtype, (0.0, 1e-30))
        bound = ulp * want.abs() + floor_N.view(*want.shape[:2], 1) + tiny
        beyond = (got.double() - want).abs() - bound
        assert not beyond.numel() or float(beyond.max()) <= 0, f"gradient is off by {float(beyond.max()):.3g} more"

    def check(self) -> None:
        """Statistics, and gradients with and without the entropy's, in place and new, against the oracle."""
        got = self.statistics()
        for bonus in (False, True):
            want, want_gradient = self.oracle(bonus=bonus)
            new, inplace = self.gradient(got, bonus=bonus), self.gradient(got, bonus=bonus, inplace=True)
            assert bits(new) == bits(inplace)
            self.check_gradient(new, want_gradient, want["entropy"] if bonus else None)
            assert float(new.view(self.N, self.V)[~self.live].abs().sum()) == 0
        names = (*STATISTICS, *(("supervised",) if self.base is not None else ()))
        for name, value in zip(names, (*got[:3], got[4]), strict=False):
            check_rows(value, want[name], self.acc)
        assert got[4].numel() == (0 if self.base is None else self.N)
        assert got[3].shape == (self.N, 2 if self.base is None else 4)


def fused_arguments(case: RowCase, objective: gk.HybridObjective, logprobs: Tensor) -> tuple:
    """What the fused operators take after the logits, with log-ratios in (-3, 3) and nan on dead tokens."""
    g = torch.Generator().manual_seed(1)

    def near(spread):
        return logprobs + spread * (torch.rand(case.N, generator=g, dtype=case.acc) - 0.5)

    weight, advantages = case.slope.abs() + 0.1, torch.randn(case.N, generator=g, dtype=case.acc)
    rollout = 0.5 + torch.rand(case.N, generator=g, dtype=case.acc)
    tokens = weight, advantages, near(6.0), near(6.0), rollout
    for value in tokens:
        value[~case.live] = float("nan")
    return *case.rows, *tokens, *case.static, *schemas.encode_term(objective)


def bits(value: Tensor | tuple[Tensor, ...]):
    if isinstance(value, Tensor):
        return value.flatten().contiguous().view(torch.uint8).numpy().tobytes()
    return [bits(each) for each in value]


def check_conversions(dtype: torch.dtype, sample: int = 1) -> None:
    """All finite 16-bit numbers come in as they are (the maximum of a row of one column is its logit), and float32
    slopes go out rounded to the nearest (the gradient of a target of probability 0 is the slope).
    Of every ``sample``-th number."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()][::sample].view(1, -1, 1)
    N = every.numel()
    ones, zeros = torch.ones(N, dtype=torch.uint8), torch.zeros(N, dtype=torch.long)
    top = op("row_statistics", every, zeros, ones, None, None, *PLAIN)[3][:, 0]
    torch.testing.assert_close(top, every.flatten().float(), rtol=0, atol=1e-37)  # denormal float32 is 0
    slope = torch.randn(N) * torch.linspace(-20, 11, N).exp()
    slope[(slope.view(torch.int32) & 0xFFFF) == 0x8000] = 0.0  # bfloat16's ties go away from zero, and torch's to even
    logits = torch.tensor([-float("inf"), 0.0], dtype=dtype).expand(1, N, 2)
    statistics = op("row_statistics", logits, zeros, ones, None, None, *PLAIN)
    given = statistics[3], statistics[1], slope, None
    gradient = op("row_gradient", logits, zeros, ones, None, None, *given, *PLAIN)
    assert torch.equal(gradient[0, :, 0], slope.to(dtype))


def check_everything() -> None:
    """Every element type, transform and path, over widths around the vectors' and the blocks'."""
    for dtype in DTYPES:
        if dtype.itemsize == 2:
            check_conversions(dtype)
        for V in (1, 7, 33, 1024, 4101):
            RowCase(V=V, dtype=dtype).check()
        for transform in TRANSFORMS.values():
            RowCase(V=203, dtype=dtype, transform=transform).check()
        RowCase(V=65, dtype=dtype, heat=True).check()
        RowCase(V=2100, dtype=dtype, gift=gk.GIFT(5.0, 0.1)).check()
