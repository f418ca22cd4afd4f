"""Bad input gets an error that names the argument, what was expected and what came."""

from __future__ import annotations

import numpy
import pytest
import torch
from support import Case

import gac_kernels as gk

S, T = 3, 5
TARGETS = torch.zeros(S, T, dtype=torch.long)
MASK = torch.ones(S, T, dtype=torch.bool)
ADV = torch.zeros(S)


def padded(**changes):
    given = {"targets_ST": TARGETS, "mask_ST": MASK, "advantages": ADV} | changes
    return gk.TokenBatch.from_padded(given.pop("targets_ST"), given.pop("mask_ST"), **given)


@pytest.mark.parametrize(
    ("changes", "error", "match"),
    [
        ({"targets_ST": TARGETS.float()}, TypeError, "targets_ST must have dtype int32 or int64, got float32"),
        ({"targets_ST": TARGETS[0]}, ValueError, r"targets_ST must be two-dimensional \(S, T\), got shape \(5,\)"),
        ({"mask_ST": MASK[:, :4]}, ValueError, r"mask_ST must have shape \(3, 5\), got \(3, 4\)"),
        ({"mask_ST": [[1]]}, TypeError, "mask_ST must be a torch.Tensor, got list"),
        ({"mask_ST": -1e9 * MASK}, ValueError, r"mask_ST must hold 0 \(left out\) and 1 \(counts\), got -1e\+09"),
        ({"mask_ST": 0.5 * MASK}, ValueError, "mask_ST must hold 0 .* got 0.5"),
        ({"mask_ST": torch.full((S, T), float("nan"))}, ValueError, "mask_ST must hold 0 .* got nan"),
        ({"is_expert_S": torch.zeros(S)}, TypeError, "is_expert_S must have dtype bool, got float32"),
        ({"is_expert_S": MASK[0]}, ValueError, r"is_expert_S must have shape \(3,\), got \(5,\)"),
        ({"advantages": torch.zeros(T)}, ValueError, r"advantages must have shape \(3,\) or \(3, 5\), got \(5,\)"),
        ({"advantages": None}, ValueError, "advantages must be given"),
        ({"old_logprobs": torch.zeros(S)}, ValueError, r"old_logprobs must have shape \(3, 5\), got \(3,\)"),
        ({"ref_logprobs": TARGETS}, TypeError, "ref_logprobs must have dtype float16"),
        ({"rollout_weights": torch.zeros(S, T, device="meta")}, ValueError, "rollout_weights must be on cpu"),
        ({"base_logits": torch.zeros(S, T + 1, 7)}, ValueError, r"base_logits must have shape \(3, 5, V\)"),
        ({"groups": ADV}, TypeError, "groups must have dtype int32 or int64"),
        ({"groups": torch.zeros(2, dtype=torch.long)}, ValueError, r"groups must have shape \(3,\), got \(2,\)"),
    ],
)
def test_padded_errors(changes, error, match):
    with pytest.raises(error, match=match):
        padded(**changes)


@pytest.mark.parametrize(
    ("cu", "match"),
    [
        ([0, 3, 2, 6], "without falling"),
        ([1, 3, 6], "got first 1"),
        ([0, 3, 7], "got first 0, last 7"),
        ([], r"cu_seqlens must have shape \(S \+ 1,\)"),
    ],
)
def test_packed_offsets(cu, match):
    with pytest.raises(ValueError, match=match):
        gk.TokenBatch.from_packed(torch.zeros(6, dtype=torch.long), torch.tensor(cu, dtype=torch.long), advantages=ADV)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float16])
def test_masks_in_numbers(dtype):
    mask = torch.tensor([[1, 0, 1, 1, 0]] * S)
    assert padded(mask_ST=mask.to(dtype)).mask.equal(mask.bool())


def test_a_batch_of_no_sequence_needs_no_advantages():
    empty = torch.zeros(0, T, dtype=torch.long)
    assert gk.TokenBatch.from_padded(empty, empty).num_sequences == 0
    assert gk.TokenBatch.from_packed(empty.flatten(), torch.zeros(1, dtype=torch.long)).num_sequences == 0


def test_a_batch_moves_to_a_device_with_all_that_it_holds():
    batch = padded(old_logprobs=torch.zeros(S, T), groups=torch.arange(S), base_logits=torch.zeros(S, T, 4))
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    held = [name for name, value in vars(batch).items() if value is not None]
    assert held == [name for name, value in vars(moved).items() if value is not None]
    assert all(vars(moved)[name].device.type == "meta" for name in held)


def test_denominators_are_the_counts_of_the_step():
    """Of padded and packed micro-batches alike; a sequence without a live token counts nowhere."""
    case = Case((5, 0, 9, 2), (False, False, True, True), seed=3, poison=False)
    (padded_batch, extra), (packed_batch, _) = case.padded(), case.packed()
    live_S = padded_batch.mask.sum(1)
    for policy, supervised in (("token-mean", "seq-mean-token-mean"), ("seq-mean-token-sum", "token-mean")):
        objective = gk.HybridObjective(aggregation=policy, supervised_aggregation=supervised)
        experts = padded_batch.is_expert
        want = [
            int(rows.sum() if how == "token-mean" else (rows > 0).sum())
            for rows, how in ((live_S[~experts], policy), (live_S[experts], supervised))
        ]
        for batches in (padded_batch, [packed_batch]):
            counts = gk.Denominators.of(batches, objective)
            assert [float(counts.policy), float(counts.supervised)] == want
        twice = gk.Denominators.of(iter([padded_batch, packed_batch]), objective)
        assert [float(twice.policy), float(twice.supervised)] == [2 * count for count in want]
        whole, given = (
            gk.hybrid_loss(extra["logprobs"], padded_batch, objective, 0.3, denominators=d).loss for d in (None, counts)
        )
        torch.testing.assert_close(given, whole, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        (([], gk.HybridObjective()), ValueError, "batches must hold at least one TokenBatch, got none"),
        ((["one"], gk.HybridObjective()), TypeError, "batches must be TokenBatches, got str"),
        ((padded(), gk.SAPO()), TypeError, "objective must be a HybridObjective, got SAPO"),
    ],
)
def test_denominators_of_what_cannot_be_counted(given, error, match):
    with pytest.raises(error, match=match):
        gk.Denominators.of(*given)


def test_ignore_index_masks():
    targets = TARGETS.clone()
    targets[0, 2] = -100
    assert not padded(targets_ST=targets).mask[0, 2]
    assert padded(mask_ST=MASK.float()).mask.all()


def test_demonstrations_need_no_advantages():
    batch = padded(advantages=None, is_expert_S=torch.ones(S, dtype=torch.bool))
    out = gk.hybrid_loss(torch.full((S, T), -1.0), batch, gk.HybridObjective(supervised=gk.NLL("none")), 0.25)
    assert out.loss == 0.25


@pytest.mark.parametrize(
    ("keywords", "error", "match"),
    [
        (
            {"logprobs": torch.zeros(S, T + 1)},
            ValueError,
            r"logprobs must have the targets' shape \(3, 5\), got \(3, 6\)",
        ),
        ({"logprobs": TARGETS}, TypeError, "logprobs must be a floating point tensor, got torch.int64"),
        ({"logprobs": None}, TypeError, "logprobs must be"),
        ({"logprobs": torch.zeros(S, T, device="meta")}, ValueError, "logprobs must be on cpu"),
        ({"batch": None}, TypeError, "batch must be a TokenBatch, got NoneType"),
        ({"objective": gk.SAPO()}, TypeError, "objective must be a HybridObjective, got SAPO"),
        ({"mu": 1.5}, ValueError, r"mu must be finite and in \[0, 1\], got 1.5"),
        ({"mu": float("nan")}, ValueError, "mu must be finite"),
        ({"mu": "half"}, TypeError, "mu must be a number or a 0-d tensor, got str"),
        ({"mu": torch.zeros(2)}, ValueError, "mu must be a number or a 0-d tensor, got shape"),
        ({"mu": torch.zeros((), device="meta")}, ValueError, "mu must be on cpu"),
        ({"objective": gk.HybridObjective(gk.DFPO())}, ValueError, "batch.groups must be given"),
        ({"objective": gk.HybridObjective(kl_coef=0.1)}, ValueError, "batch.ref_logprobs must be given"),
        ({"objective": gk.HybridObjective(entropy_coef=0.1)}, ValueError, "entropy must be given"),
        ({"objective": gk.HybridObjective(supervised=gk.GIFT())}, ValueError, "GIFT needs the logits"),
        ({"entropy": torch.zeros(S)}, ValueError, "entropy must have the targets' shape"),
        ({"sum_sq": torch.zeros(S)}, ValueError, "sum_sq must have the targets' shape"),
        ({"denominators": gk.Denominators(policy=-1.0)}, ValueError, "denominators.policy must be finite"),
    ],
)
def test_loss_errors(keywords, error, match):
    given = {"logprobs": torch.zeros(S, T), "batch": padded(), "objective": gk.HybridObjective(), "mu": 0.5} | keywords
    positional = [given.pop(name) for name in ("logprobs", "batch", "objective", "mu")]
    with pytest.raises(error, match=match):
        gk.hybrid_loss(*positional, **given)


def test_packed_needs_a_norm_length():
    batch, extra = Case((3, 4), (False, True)).packed()
    with pytest.raises(ValueError, match="norm_length must be given"):
        gk.hybrid_loss(extra["logprobs"], batch, gk.HybridObjective(aggregation="seq-mean-token-sum-norm"), 0.5)


def test_backends_tells_what_is_forced():
    assert gk.backends()["cuda"].startswith(("triton:", "cuda:", "reference:"))
    with gk.use_backend("reference"):
        assert set(gk.backends().values()) == {"reference: asked for by use_backend"}
    if gk.backends()["cpu"].startswith("cpu:"):
        with gk.use_backend("cpu"):
            assert gk.backends()["cpu"] == "cpu: asked for by use_backend"
            assert gk.backends()["cuda"] == "none: use_backend('cpu') has no kernels for it"


@pytest.mark.parametrize(
    ("shape", "cure"),
    [((S, T + 1, 7), r"; targets are shifted.*: give logits\[\.\.\., :-1, :\]"), ((1, S, T, 7), r"; give logits\[0\]")],
)
def test_a_usual_misfit_is_told_with_its_cure(shape, cure):
    text = rf"logits must have shape \({S}, {T}, V\) to match targets, got \({', '.join(map(str, shape))}\)"
    with pytest.raises(ValueError, match=text + cure):
        gk.hybrid_loss_from_logits(torch.zeros(shape), padded(), gk.HybridObjective(), 0.3)
    with pytest.raises(ValueError, match=(text + cure).replace("logits", "hidden").replace("V", "H")):
        gk.hybrid_loss_from_hidden(torch.zeros(shape), torch.zeros(9, 7), padded(), gk.HybridObjective(), 0.3)


def test_a_number_of_numpy_is_a_number():
    logprobs = torch.full((S, T), -1.0)
    losses = [gk.hybrid_loss(logprobs, padded(), gk.HybridObjective(), mu).loss for mu in (0.25, numpy.float32(0.25))]
    assert losses[0].equal(losses[1])


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend must be one of"), gk.use_backend("gpu"):
        pass
    assert set(gk.backends()) == {"cpu", "cuda", "other"}


def test_paper_signals():
    """Without an objective the coefficients are the paper's: c_r = -A, c_s = -phi, whatever the old log-probs say."""
    case = Case((5, 7), (False, True), seed=41)
    batch, extra = case.padded()
    rows = gk.signals_from_logprobs(extra["logprobs"], batch).rows
    live, p = case.mask, extra["logprobs"].exp()
    phi = torch.where(live, p * (1 - p), 0.0)
    rollout, expert = (phi[0] - case.adv[0])[live[0]], phi[1][live[1]]
    torch.testing.assert_close(rows[0, 4], rollout.square().sum())
    torch.testing.assert_close(rows[1, 4], expert.square().sum())
    torch.testing.assert_close(rows[0, 3], case.adv[0])
    torch.testing.assert_close(rows[:, 1], live.sum(-1).double())


def test_signals_with_an_objective_are_those_of_its_loss():
    case = Case((5, 7, 6), (False, True, False), seed=42)
    batch, extra = case.padded()
    objective = gk.HybridObjective(gk.GSPO(), kl_coef=0.1, entropy_coef=0.1)
    loss = gk.hybrid_loss(extra["logprobs"], batch, objective, 0.9, entropy=extra["entropy"], sum_sq=extra["sum_sq"])
    alone = gk.signals_from_logprobs(extra["logprobs"].requires_grad_(), batch, objective, sum_sq=extra["sum_sq"])
    assert alone.rows.equal(loss.signals.rows) and not alone.rows.requires_grad
