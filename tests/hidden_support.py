"""Hidden states and a head for tests, and the float64 oracle of their loss: the products and the loss from logits."""

from __future__ import annotations

from dataclasses import replace

import torch
from logit_support import check_gradient, check_rows, make

import gac_kernels as gk
from gac_kernels import reference

HEAD = ("hidden", "weight", "bias")


class HiddenCase:
    """Hidden states (S, T, H) or packed (N, H), a head of V rows, and a batch whose log-probs lie near its own."""

    def __init__(self, lengths=(5, 0, 9, 3), expert=(False, True, False, True), *, H=12, V=37, dtype=torch.float32,
                 seed=0, packed=False, bias=True, base=False, **options):  # fmt: skip
        g = torch.Generator().manual_seed(100 + seed)

        def normal(*shape):
            return torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)

        shape = (len(lengths), max([*lengths, 1]))
        hidden, self.weight, self.bias = normal(*shape, H), normal(V, H), normal(V) if bias else None
        options = {"dtype": torch.float64, "V": V, "seed": seed, "packed": packed, **options}
        logits = (hidden.double() @ self.weight.double().t()).add_(0 if not bias else self.bias.double())
        self.batch = make(lengths, expert, logits=logits, base=False, **options).batch
        inside = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
        self.hidden = (hidden[inside] if packed else hidden).clone()
        self.base = None
        if base:
            self.base = {"base_hidden": normal(*self.hidden.shape[:-1], 7), "base_weight": normal(V, 7)}
            self.base["base_bias"] = normal(V)
        if options.get("poison", True):
            self.hidden[~self.batch.mask] = float("nan")

    def leaves(self, dtype=None, wanted=HEAD):
        """Fresh leaves in ``dtype``, by name."""
        values = {name: getattr(self, name) for name in HEAD if getattr(self, name) is not None}
        return {n: v.detach().clone().to(dtype or v.dtype).requires_grad_(n in wanted) for n, v in values.items()}

    def ours(self, objective, mu=0.3, *, wanted=HEAD, scale=1.0, **options):
        leaves = self.leaves(wanted=wanted)
        rest = {"bias": leaves.get("bias")} | (self.base or {}) | options
        out = gk.hybrid_loss_from_hidden(leaves["hidden"], leaves["weight"], self.batch, objective, mu, **rest)
        if out.loss.requires_grad:
            (scale * out.loss).backward()
        return out, {name: leaf.grad for name, leaf in leaves.items()}

    def oracle(self, objective, mu=0.3, transform=None, denominators=None, scale=1.0, dtype=torch.float64):
        """The same in float64, or ``dtype``, with all logits."""
        leaves = self.leaves(dtype)
        names = ("advantages", "old_logprobs", "ref_logprobs", "rollout_weights")
        wide = {n: None if getattr(self.batch, n) is None else getattr(self.batch, n).to(dtype) for n in names}
        base = None
        if self.base:
            b = {name: value.to(dtype) for name, value in self.base.items()}
            base = b["base_hidden"] @ b["base_weight"].t() + b["base_bias"]
        batch = replace(self.batch, base_logits=base, **wide)
        live = torch.where(self.batch.mask[..., None], leaves["hidden"], 0.0)
        logits = live @ leaves["weight"].t() + (leaves["bias"] if self.bias is not None else 0.0)
        transform = transform or gk.LogitTransform()
        out = reference.hybrid_loss_from_logits(
            logits, batch, objective, mu, transform=transform, denominators=denominators
        )
        (scale * out.loss).backward()
        return out, {name: leaf.grad for name, leaf in leaves.items()}

    def check(self, objective, mu=0.3, *, transform=None, denominators=None, scale=1.0, wanted=HEAD, **options):
        """Loss, gradients, per-row results and signals against the oracle."""
        want, want_gradients = self.oracle(objective, mu, transform, denominators, scale)
        eager = None
        if self.weight.dtype == torch.float32:
            _, eager = self.oracle(objective, mu, transform, denominators, scale, torch.float32)
        got, gradients = self.ours(
            objective, mu, transform=transform or gk.LogitTransform(), denominators=denominators, scale=scale,
            wanted=wanted, **options,
        )  # fmt: skip
        acc = torch.promote_types(self.weight.dtype, torch.float32)
        largest = float(want.logprobs.abs().max()) if want.logprobs.numel() else 0.0
        condition = max(1.0, largest)
        if acc == torch.float64:
            check_rows(got.logprobs, want.logprobs, acc)
            check_rows(got.token_entropy, want.token_entropy, acc)
        else:  # a product in float32 rounds a logit by some ulp of its largest term
            torch.testing.assert_close(got.logprobs.double(), want.logprobs, rtol=2e-6, atol=4e-6)
            torch.testing.assert_close(got.token_entropy.double(), want.token_entropy, rtol=2e-6, atol=4e-6)
        for name, gradient in gradients.items():
            if name not in wanted:
                assert gradient is None
                continue
            check_gradient(gradient, want_gradients[name], None if eager is None else eager[name], 2 * condition)
        bound = condition * (1e-11 if acc == torch.float64 else 6e-6)
        for name in ("loss", "policy_loss", "supervised_loss", "kl", "entropy"):
            value, expected = getattr(got, name), getattr(want, name)
            assert value.dtype == acc and value.shape == ()
            torch.testing.assert_close(value.double(), expected.double(), rtol=bound, atol=bound, equal_nan=True)
        torch.testing.assert_close(got.signals.rows.double(), want.signals.rows, rtol=10 * bound, atol=10 * bound)
        for name, value in got.metrics.items():
            torch.testing.assert_close(value.double(), want.metrics[name], rtol=10 * bound, atol=10 * bound)
