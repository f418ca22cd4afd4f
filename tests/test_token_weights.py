"""The operator `token_weights` against plain arithmetic: what each token is, and what it weighs in the loss."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gac_kernels.objectives import AGGREGATIONS
from gac_kernels.schemas import DEAD, DEMONSTRATION, ROLLOUT

FORMS = {"reference": "token_weights_reference", "device": "token_weights"}


def plain(lengths, live, expert, advantages, per_token, mu, counts, aggregations, norm_length):
    """(kind, weight, advantage) of every token, sequence by sequence."""
    tokens = [sum(row) for row in live]
    out = []
    for s, row in enumerate(live):
        branch = aggregations[expert[s]]
        members = [k for k in range(len(live)) if expert[k] == expert[s]]
        if branch == "token-mean":
            count = sum(tokens[k] for k in members)
        else:
            count = sum(tokens[k] > 0 for k in members)
        if counts[expert[s]] is not None:
            count = counts[expert[s]]
        share = mu if expert[s] else 1.0 - mu
        for t in range(lengths[s]):
            if not row[t]:
                out.append((DEAD, 0.0, 0.0))
                continue
            weight = share / count
            if branch == "seq-mean-token-mean":
                weight /= tokens[s]
            elif branch == "seq-mean-token-sum-norm":
                weight /= norm_length
            advantage = 0.0 if expert[s] else advantages[s][t] if per_token else advantages[s][0]
            out.append((DEMONSTRATION if expert[s] else ROLLOUT, weight, advantage))
    return out


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6), st.booleans(), st.booleans(), st.booleans(),
    st.sampled_from(list(itertools.product(range(len(AGGREGATIONS)), repeat=2))), st.sampled_from(list(FORMS)),
)  # fmt: skip
def test_weights(seed, packed, per_token, given_counts, aggregations, form):
    rng = random.Random(seed)
    S = rng.randint(1, 5)
    T = rng.randint(1, 6)
    lengths = [rng.randint(0, 6) for _ in range(S)] if packed else [T] * S
    live = [[rng.random() < 0.7 for _ in range(n)] for n in lengths]
    expert = [rng.random() < 0.4 for _ in range(S)]
    advantages = [[rng.gauss(0, 1) for _ in range(max(n, 1))] for n in lengths]
    mu, norm_length = rng.random(), 0.5 + 9 * rng.random()
    counts = (3.5, 2.0) if given_counts else (None, None)
    want = plain(
        lengths, live, expert, advantages, per_token, mu, counts, [AGGREGATIONS[a] for a in aggregations], norm_length
    )

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    flat = [a for row, n in zip(advantages, lengths, strict=True) for a in row[:n]]
    kind, weight, adv = getattr(torch.ops.gac_kernels, FORMS[form])(
        torch.tensor([x for row in live for x in row], dtype=torch.bool),
        torch.tensor([0, *itertools.accumulate(lengths)]) if packed else None,
        0 if packed else T,
        torch.tensor(expert),
        tensor(flat if per_token else [row[0] for row in advantages]),
        per_token,
        tensor(mu),
        *(None if count is None else tensor(count) for count in counts),
        *aggregations,
        norm_length,
    )
    assert kind.dtype == torch.uint8 and kind.tolist() == [k for k, _, _ in want]
    torch.testing.assert_close(weight, tensor([w for _, w, _ in want]), rtol=1e-13, atol=0)
    assert adv.tolist() == [a for _, _, a in want]


@pytest.mark.parametrize("form", FORMS)
def test_dead_tokens_weigh_nothing_whatever_they_hold(form):
    """Also those behind the last sequence of a packed batch."""
    kind, weight, adv = getattr(torch.ops.gac_kernels, FORMS[form])(
        torch.tensor([True, False, True, True]), torch.tensor([0, 2, 3]), 0, torch.tensor([False, True]),
        torch.tensor([math.nan, math.nan, math.nan, math.nan]), True, torch.tensor(0.25), None, None, 0, 0, 1.0,
    )  # fmt: skip
    assert kind.tolist() == [ROLLOUT, DEAD, DEMONSTRATION, DEAD]
    assert weight.tolist() == [0.75, 0.0, 0.25, 0.0]
    assert adv[0].isnan() and adv[1:].tolist() == [0.0, 0.0, 0.0]
