"""Offsets of packed batches that nobody has checked: all backends, losses and counts take them alike and in bounds."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

import gac_kernels as gk

N, H, V = 30, 8, 11
# To the end and back; gaps before and behind; below 0 and far behind the end; a fall at once.
LYING = (0, N, 0, N), (5, 12, 9, 20), (-4, 40, 3, -(2**62)), (12, 3, 20, 25)
POLICIES = gk.SAPO(), gk.GSPO(), gk.DFPO(), gk.GRPO()
AGGREGATIONS = ("token-mean", "seq-mean-token-mean")


def made(offsets) -> tuple[gk.TokenBatch, list[tuple[int, int]]]:
    """The batch, built past the check, and where each sequence lies by the rule: clamp, then a running maximum."""
    g = torch.Generator().manual_seed(0)
    good = gk.TokenBatch.from_packed(
        torch.randint(0, V, (N,), generator=g), torch.tensor([0, 10, 20, N]), mask_N=torch.rand(N, generator=g) > 0.2,
        is_expert_S=torch.tensor([False, True, False]), advantages=torch.randn(N, generator=g),
        old_logprobs=-2 - torch.rand(N, generator=g), groups=torch.tensor([0, 0, 0]),
    )  # fmt: skip
    rising = itertools.accumulate((min(max(offset, 0), N) for offset in offsets), max)
    return replace(good, cu_seqlens=torch.tensor(offsets)), list(itertools.pairwise(rising))


def padded(batch: gk.TokenBatch, spans) -> gk.TokenBatch:
    """The same sequences, cut out one by one."""

    def rows(value_N):
        return pad_sequence([value_N[a:b] for a, b in spans], batch_first=True)

    return gk.TokenBatch.from_padded(
        rows(batch.targets), rows(batch.mask), is_expert_S=batch.is_expert, advantages=rows(batch.advantages),
        old_logprobs=rows(batch.old_logprobs), groups=batch.groups,
    )  # fmt: skip


def scattered(rows, spans, like_N):
    """What is one a token of the padded batch in its places of the packed one; 0 where no sequence is."""
    out = torch.zeros_like(like_N)
    for row, (a, b) in zip(rows, spans, strict=True):
        out[a:b] = row[: b - a]
    return out


@pytest.mark.parametrize(("offsets", "policy"), list(zip(LYING, POLICIES, strict=True)))
def test_losses(every_backend, offsets, policy):
    """Loss, signals and gradients are those of the sequences cut out and padded, from log-probs, logits and hidden
    states; a sequence that the rule leaves empty has no signals, and its hidden gradient is 0."""
    batch, spans = made(offsets)
    own = padded(batch, spans)
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(N, H, generator=g), torch.randn(V, H, generator=g)
    heat = gk.LogitTransform(temperature=torch.tensor([0.5, 1.0, 2.0]))
    objective = gk.HybridObjective(policy, aggregation="token-mean", supervised_aggregation="seq-mean-token-mean")
    cut = pad_sequence([hidden[a:b] for a, b in spans], batch_first=True)
    leaf, own_leaf = hidden.clone().requires_grad_(), cut.clone().requires_grad_()
    got = gk.hybrid_loss_from_hidden(leaf, weight, batch, objective, 0.3, transform=heat)
    want = gk.hybrid_loss_from_hidden(own_leaf, weight, own, objective, 0.3, transform=heat)
    for out in (got, want):
        out.loss.backward()
    torch.testing.assert_close(got.loss, want.loss)
    torch.testing.assert_close(got.signals.rows, want.signals.rows)
    torch.testing.assert_close(got.signals.hidden, want.signals.hidden)
    torch.testing.assert_close(leaf.grad, scattered(own_leaf.grad, spans, leaf))
    empty = [s for s, (a, b) in enumerate(spans) if not batch.mask[a:b].any()]
    assert got.signals.hidden[empty].eq(0).all() and got.signals.rows[empty].eq(0).all()

    logits = (hidden @ weight.T).requires_grad_()
    out = gk.hybrid_loss_from_logits(logits, batch, objective, 0.3, transform=heat)
    out.loss.backward()
    torch.testing.assert_close(out.loss, want.loss)
    torch.testing.assert_close(out.signals.rows, want.signals.rows)
    torch.testing.assert_close(logits.grad @ weight, leaf.grad)
    alone = gk.hybrid_loss(out.logprobs, batch, objective, 0.3)
    torch.testing.assert_close(alone.loss, want.loss)
    torch.testing.assert_close(alone.logprobs, scattered(want.logprobs, spans, out.logprobs))


@pytest.mark.parametrize("offsets", [*LYING, (0, 0, 0, 0), (2**62, 3, 5, 9)])
def test_counts(offsets):
    batch, spans = made(offsets)
    own = padded(batch, spans)
    for aggregation in AGGREGATIONS:
        objective = gk.HybridObjective(aggregation=aggregation, supervised_aggregation=aggregation)
        got, want = gk.Denominators.of(batch, objective), gk.Denominators.of(own, objective)
        assert got.policy.equal(want.policy) and got.supervised.equal(want.supervised)


def test_under_torch_compile():
    """A batch that is built in the compiled region is not looked at."""
    batch, _ = made((0, N, 0, N))
    weight, objective = torch.randn(V, H), gk.HybridObjective()

    def loss(hidden, targets, cu_seqlens, advantages):
        packed = gk.TokenBatch.from_packed(targets, cu_seqlens, advantages=advantages)
        out = gk.hybrid_loss_from_hidden(hidden, weight, packed, objective, 0.0)
        return out.loss, out.signals.hidden

    given = torch.randn(N, H), batch.targets, batch.cu_seqlens, batch.advantages
    _, means = torch.compile(loss, backend="eager", fullgraph=True)(given[0].requires_grad_(), *given[1:])
    assert means[0].ne(0).any() and means[1:].eq(0).all()


def test_no_sequence_at_all(every_backend):
    """Offsets of no sequence beside tokens: all of them are of none."""
    batch = gk.TokenBatch(
        torch.zeros(4, dtype=torch.long), torch.ones(4, dtype=torch.bool), torch.tensor([0]),
        torch.zeros(0, dtype=torch.bool), torch.zeros(0),
    )  # fmt: skip
    heat = gk.LogitTransform(temperature=torch.zeros(0))
    leaf = torch.randn(4, H, requires_grad=True)
    out = gk.hybrid_loss_from_hidden(leaf, torch.randn(V, H), batch, gk.HybridObjective(), 0.5, transform=heat)
    out.loss.backward()
    assert out.loss == 0 and leaf.grad.eq(0).all()
