"""The same call gives the same bits on every backend: again, beside other work, on 1 and 2 threads; and a row's results
are its own, whatever lies beside it."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch
from logit_support import make

import gac_kernels as gk

OBJECTIVE = gk.HybridObjective(gk.SAPO("sigmoid", 2.0, 3.0), kl_coef=0.1, entropy_coef=0.01)
COUNTS = gk.Denominators(policy=1.0, supervised=1.0)  # else a row's weight depends on how many there are
PER_SEQUENCE = (
    "targets",
    "mask",
    "is_expert",
    "advantages",
    "old_logprobs",
    "ref_logprobs",
    "rollout_weights",
    "groups",
)


def results(case, rows=slice(None)):
    """Everything that a loss gives a token or a sequence, and the gradient, of these sequences alone."""
    logits = case.logits[rows].clone().requires_grad_()
    fields = {name: getattr(case.batch, name)[rows].clone() for name in PER_SEQUENCE}
    out = gk.hybrid_loss_from_logits(
        logits, gk.TokenBatch(cu_seqlens=None, **fields), OBJECTIVE, 0.3, denominators=COUNTS
    )
    out.loss.backward()
    return out.logprobs, out.token_entropy, out.signals.rows, logits.grad


def from_logprobs(case, rows=slice(None)):
    """The same from log-probs."""
    logprobs = case.batch.ref_logprobs[rows].nan_to_num(-1.0, 0.0, -1.0).clone().requires_grad_()
    fields = {name: getattr(case.batch, name)[rows].clone() for name in PER_SEQUENCE}
    batch = gk.TokenBatch(cu_seqlens=None, **fields)
    objective = replace(OBJECTIVE, entropy_coef=0.0)
    out = gk.hybrid_loss(logprobs, batch, objective, 0.3, denominators=COUNTS)
    out.loss.backward()
    return out.logprobs, out.signals.rows, logprobs.grad


def same(got, want):
    """To the bit: torch.equal takes -0.0 for 0.0, and no nan for itself."""
    return all(
        a.shape == b.shape and a.contiguous().view(torch.uint8).equal(b.contiguous().view(torch.uint8))
        for a, b in zip(got, want, strict=True)
    )


def a_case(backend, dtype=torch.float32):
    return make((5, 9, 7, 3), (False, True, False, True), V=67 if backend == "triton" else 1031, dtype=dtype, seed=4)


@pytest.mark.parametrize("function", [results, from_logprobs], ids=["logits", "logprobs"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_alone_has_the_bits_that_it_has_in_a_batch(every_backend, function, dtype):
    case = a_case(every_backend, dtype)
    whole = function(case)
    for rows in ([0], [1], [2], [3], [3, 1], [2, 0, 3, 1]):
        assert same(function(case, rows), [value[rows] for value in whole]), rows


def test_the_same_call_beside_other_work(every_backend):
    """Two threads that keep the cores and the allocator busy do not change a bit."""
    case, stop = a_case(every_backend), threading.Event()
    want = results(case)

    def work():
        while not stop.is_set():
            torch.randn(64, 64).mm(torch.randn(64, 64)).sum()

    others = [threading.Thread(target=work) for _ in range(2)]
    for other in others:
        other.start()
    try:
        for _ in range(3 if every_backend == "triton" else 60):
            assert same(results(case), want)
    finally:
        stop.set()
        for other in others:
            other.join()


def test_one_and_two_threads(every_backend):
    case, before, seen = a_case(every_backend), torch.get_num_threads(), []
    try:
        for count in (1, 2, 1):
            torch.set_num_threads(count)
            seen.append((*results(case), *from_logprobs(case)))
    finally:
        torch.set_num_threads(before)
    assert same(seen[1], seen[0]) and same(seen[2], seen[0])


def test_the_comparison_sees_a_bit():
    zero = torch.zeros(3)
    assert same([zero], [zero.clone()]) and not same([zero], [-zero])
    assert not same([zero], [torch.tensor([0.0, 1e-45, 0.0])])
