"""Batches for tests: random but reproducible, padded and packed, with dead places that hold poison."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from naive import Token

import gac_kernels as gk

POISON = (float("nan"), float("inf"), -float("inf"))

POLICIES = [
    *(gk.SAPO(g) for g in ("sigmoid", "erf", "arctan", "softsign")),
    gk.SAPO("sigmoid", 10.0, 12.0),
    gk.SAPO("erf", 10.0, 12.0),
    gk.GRPO(),
    gk.GRPO(0.2, 0.28),
    gk.GRPO(0.2, 0.2, delta=1.5),
    gk.CISPO(),
    gk.GSPO(0.05, 0.05),
    *(gk.DFPO(t, r) for t, r in itertools.product(("min_replace", "adv_orthogonal"), ("geometric_mean", "product"))),
]


def policy_name(policy) -> str:
    return str(policy).replace(" ", "")


class Case:
    """One random batch, as lists for the naive oracle and as tensors for the package."""

    def __init__(
        self, lengths, expert, *, seed=0, total_length=None, old=True, ref=True, rollout=True, entropy=True,
        sum_sq=True, token_advantages=False, holes=True, spread=0.3, groups=None, dtype=torch.float64, poison=True,
    ):  # fmt: skip
        g = torch.Generator().manual_seed(seed)
        self.lengths, self.expert, self.dtype = list(lengths), list(expert), dtype
        self.unchecked: dict[str, torch.Tensor] = {}  # fields of the batch that only an accelerator could hold
        self.S, self.T = len(self.lengths), total_length or max([*self.lengths, 1])
        self.groups = list(groups) if groups is not None else [(7 * i) % 3 - 1 for i in range(self.S)]

        def rand(*shape):
            return torch.rand(*shape, generator=g, dtype=torch.float64)

        shape = (self.S, self.T)
        self.logp = (-3.0 * rand(*shape) - 0.01).to(dtype)
        self.old = (self.logp.double() + spread * (rand(*shape) * 2 - 1)).to(dtype) if old else None
        self.ref = (self.logp.double() + spread * (rand(*shape) * 2 - 1)).to(dtype) if ref else None
        self.rollout = (0.5 + rand(*shape)).to(dtype) if rollout else None
        self.entropy = (3 * rand(*shape)).to(dtype) if entropy else None
        p = self.logp.double().exp()  # of all others sum p^2 holds between nothing and (1 - p)^2
        self.sum_sq = (p**2 + (1 - p) ** 2 * (0.05 + 0.9 * rand(*shape))).to(dtype) if sum_sq else None
        adv = torch.randn(*(shape if token_advantages else shape[:1]), generator=g, dtype=torch.float64).to(dtype)
        self.adv = adv
        self.mask = torch.arange(self.T)[None] < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        if holes:
            self.mask &= rand(*shape) > 0.15
        self.targets = torch.randint(0, 50, shape, generator=g)
        if poison:
            for k, value in enumerate((self.logp, self.old, self.ref, self.rollout, self.entropy, self.sum_sq)):
                if value is not None:
                    value[~self.mask] = POISON[k % 3]
            if token_advantages:
                self.adv[~self.mask] = POISON[0]

    def _token_tensors(self, select):
        names = ("old_logprobs", self.old), ("ref_logprobs", self.ref), ("rollout_weights", self.rollout)
        keywords = {name: None if value is None else select(value) for name, value in names}
        return keywords | {"advantages": select(self.adv) if self.adv.ndim == 2 else self.adv}

    def padded(self) -> tuple[gk.TokenBatch, dict]:
        """The batch, and logprobs, entropy and sum_sq in its layout."""
        return self._make(lambda v: v, lambda kw: gk.TokenBatch.from_padded(self.targets, self.mask, **kw))

    def packed(self) -> tuple[gk.TokenBatch, dict]:
        inside = torch.arange(self.T)[None] < torch.tensor(self.lengths, dtype=torch.long)[:, None]
        cu = torch.tensor([0, *self.lengths], dtype=torch.long).cumsum(0)
        return self._make(
            lambda v: v[inside],
            lambda kw: gk.TokenBatch.from_packed(self.targets[inside], cu, mask_N=self.mask[inside], **kw),
        )

    def _make(self, select, build):
        batch = build(
            self._token_tensors(select)
            | {
                "is_expert_S": torch.tensor(self.expert, dtype=torch.bool),
                "groups": torch.tensor(self.groups, dtype=torch.long),
            }
        )
        batch = replace(batch, **self.unchecked)
        extra = {"logprobs": select(self.logp), "entropy": self.entropy, "sum_sq": self.sum_sq}
        return batch, {k: v if v is None or k == "logprobs" else select(v) for k, v in extra.items()}

    def naive(self) -> list[dict[int, Token]]:
        """The live tokens, from the tensors' values (rounded as they are), position -> Token."""

        def at(value, i, t, absent):
            return absent if value is None else float(value[i, t])

        return [
            {
                t: Token(
                    logp=float(self.logp[i, t]),
                    old=at(self.old, i, t, None),
                    ref=at(self.ref, i, t, None),
                    adv=float(self.adv[i, t] if self.adv.ndim == 2 else self.adv[i]),
                    rho=at(self.rollout, i, t, 1.0),
                    entropy=at(self.entropy, i, t, 0.0),
                    sum_sq=at(self.sum_sq, i, t, 0.0),
                )
                for t in range(self.T)
                if self.mask[i, t]
            }
            for i in range(self.S)
        ]
