"""The estimators against their definitions over tokens, in NumPy; and what Signals promise."""

import itertools
import math

import numpy as np
import pytest
import torch
from host_reads import HostRead, forbid_host_reads
from hypothesis import given, settings
from hypothesis import strategies as st

import gac_kernels as gk
from gac_kernels import objectives
from gac_kernels import signals as sig
from gac_kernels.signals import Signals, coefficient_estimate, hidden_estimate, logit_estimate

V = 5  # vocabulary of the made-up sequences


class Sequence:
    """One sequence's tokens: coefficients, mean advantage, and the direction of each token's logit gradient."""

    def __init__(self, rng, expert, tokens):
        self.expert, self.tokens = expert, tokens
        probs_TV = rng.dirichlet(np.ones(V), size=tokens)
        target_T = rng.integers(0, V, size=tokens)
        p_T = probs_TV[np.arange(tokens), target_T]
        self.direction_TV = np.eye(V)[target_T] - probs_TV
        self.nll_T = -np.log(p_T)
        self.cs_T = -p_T * (1 - p_T)
        self.advantage = 0.0 if expert else float(rng.normal())
        self.cr_T = np.zeros(tokens) if expert else -self.advantage * rng.uniform(0.5, 1.5, size=tokens)

    def row(self):
        diff_T, own_T = self.cs_T - self.cr_T, self.cs_T if self.expert else self.cr_T
        n_T = (self.direction_TV**2).sum(1)
        if self.tokens == 0:
            return [0.0] * 12
        sums = [diff_T**2, self.cs_T, self.cr_T, self.cs_T**2, self.cr_T**2, self.cs_T * self.cr_T]
        sums += [own_T**2 * n_T, diff_T**2 * n_T]
        return [float(self.expert), self.tokens, self.nll_T.sum(), self.advantage, *(x.sum() for x in sums)]


def batch(seed, experts, rollouts, dead=0):
    rng = np.random.default_rng(seed)
    kinds = [(True, None)] * experts + [(False, None)] * rollouts + [(True, 0), (False, 0)] * dead
    rng.shuffle(kinds)
    return [Sequence(rng, e, int(rng.integers(1, 9)) if n is None else n) for e, n in kinds]


def signals_of(sequences, dtype=torch.float64, **keywords):
    rows = torch.tensor([s.row() for s in sequences], dtype=torch.float64).reshape(-1, 12)
    return Signals(rows.to(dtype), has_sum_sq=True, **keywords)


def trimmed_variance(values, trim):
    values = sorted(values)
    cut = int(trim * len(values)) if len(values) >= 4 else 0
    return np.var(values[cut : len(values) - cut])


def coefficient_definition(sequences, trim=0.1, znorm=False):
    live = [s for s in sequences if s.tokens]
    experts, rollouts = [s for s in live if s.expert], [s for s in live if not s.expert]
    cs, cr = [np.concatenate([getattr(s, name) for s in live] or [[]]) for name in ("cs_T", "cr_T")]

    def z(x, over):
        return (x - over.mean()) / over.std() if znorm and over.std() > 0 else x

    return (
        max(1e-8, trimmed_variance([s.nll_T.mean() for s in experts], trim)) if experts else None,
        max(1e-8, np.var([s.advantage for s in rollouts])) if rollouts else None,
        np.mean([np.mean((z(s.cs_T, cs) - z(s.cr_T, cr)) ** 2) for s in live]) if live else None,
    )


def check(estimate, definition, rtol, atol=0.0):
    assert estimate.values_3.dtype == torch.float64
    for got, present, want in zip(estimate.values_3.tolist(), estimate.present_3.tolist(), definition, strict=True):
        assert present == (want is not None)
        if present:
            assert got == pytest.approx(want, rel=rtol, abs=atol)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 25), st.integers(0, 12), st.integers(0, 2),
    st.sampled_from([0.0, 0.1, 0.29, 0.4999]), st.booleans(),
)  # fmt: skip
def test_coefficient_estimator(seed, experts, rollouts, dead, trim, znorm):
    sequences = batch(seed, experts, rollouts, dead)
    got = coefficient_estimate(signals_of(sequences), trim=trim, znorm=znorm)
    # Sums multiplied out cannot tell a distance of 0 between coefficients of order one from one of 1e-13.
    check(got, coefficient_definition(sequences, trim, znorm), 1e-9, atol=1e-13 if znorm else 0.0)


@pytest.mark.parametrize("znorm", [False, True])
def test_coefficient_estimator_from_float32_rows(znorm):
    sequences = batch(3, 30, 40)
    got = coefficient_estimate(signals_of(sequences, torch.float32), znorm=znorm)
    check(got, coefficient_definition(sequences, znorm=znorm), 1e-5)


@pytest.mark.parametrize(("count", "cut"), [(3, 0), (4, 1), (5, 2), (9, 3), (10, 4)])
def test_trimming_by_count_from_both_ends(count, cut):
    """int(0.4 n) at each end, none below four: the numbers here are counted by hand."""
    nll = np.random.default_rng(count).normal(size=count) ** 3
    rows = torch.zeros(count, 12, dtype=torch.float64)
    rows[:, sig.EXPERT], rows[:, sig.TOKENS], rows[:, sig.NLL_SUM] = 1, 2, torch.from_numpy(2 * nll)
    got = coefficient_estimate(Signals(rows), trim=0.4).values_3[0].item()
    assert got == pytest.approx(max(1e-8, np.var(np.sort(nll)[cut : count - cut])), rel=1e-12)


def test_floor_of_the_variances_and_none_of_the_distance():
    rows = torch.zeros(6, 12)
    rows[:, sig.TOKENS], rows[:3, sig.EXPERT] = 1, 1
    assert coefficient_estimate(Signals(rows)).values_3.tolist() == [1e-8, 1e-8, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("column", [sig.NLL_SUM, sig.ADVANTAGE, sig.DISAGREEMENT])
def test_what_is_not_finite_stays_visible(bad, column):
    signals = signals_of(batch(1, 6, 6))
    row = int(torch.nonzero(signals.rows[:, sig.EXPERT] == float(column == sig.NLL_SUM))[0])
    signals.rows[row, column] = bad
    estimate = coefficient_estimate(signals)
    hit = {sig.NLL_SUM: 0, sig.ADVANTAGE: 1, sig.DISAGREEMENT: 2}[column]
    assert [math.isfinite(v) for v in estimate.values_3.tolist()] == [i != hit for i in range(3)]
    assert estimate.present_3.all()


def test_trimming_takes_an_infinite_nll_and_never_a_nan():
    signals = signals_of(batch(2, 20, 0))
    finite = torch.sort(signals.rows[:, sig.NLL_SUM] / signals.rows[:, sig.TOKENS]).values
    worst = int((signals.rows[:, sig.NLL_SUM] / signals.rows[:, sig.TOKENS]).argmax())
    signals.rows[worst, sig.NLL_SUM] = math.inf
    assert coefficient_estimate(signals).values_3[0].item() == pytest.approx(np.var(finite[2:18].numpy()), rel=1e-12)
    signals.rows[worst, sig.NLL_SUM] = math.nan
    assert coefficient_estimate(signals).values_3[0].isnan()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [-0.1, -0.3, -0.7])  # the noise is below, around and above 0
def test_znorm_leaves_a_constant_coefficient_as_it_is(dtype, constant):
    """Its variance, from sums in their own precision, is noise, and nothing to divide by."""
    sequences = batch(4, 5, 7)
    for s in sequences:
        s.cs_T = np.full(s.tokens, constant)
    cr = np.concatenate([s.cr_T for s in sequences])
    want = np.mean([np.mean((constant - (s.cr_T - cr.mean()) / cr.std()) ** 2) for s in sequences])
    got = coefficient_estimate(signals_of(sequences, dtype), znorm=True).values_3[2].item()
    assert got == pytest.approx(want, rel=1e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("supervised", sig.AGGREGATIONS)
@pytest.mark.parametrize("policy", sig.AGGREGATIONS)
@pytest.mark.parametrize(("experts", "rollouts"), [(7, 5), (0, 4), (3, 0), (0, 0)])
def test_logit_estimator_is_the_squared_norm_of_the_gradients(supervised, policy, experts, rollouts):
    """Against the gradients themselves, token by token over the vocabulary, with the weights of the aggregations."""
    norm_length, sequences = 11.0, batch(5, experts, rollouts, dead=1)
    live = [s for s in sequences if s.tokens]

    def token_weight(s):  # the aggregation's weight of a token in the branch's loss, times the branch's sequences
        own = [o for o in live if o.expert == s.expert]
        loss_weight = {
            "token-mean": 1 / sum(o.tokens for o in own),
            "seq-mean-token-mean": 1 / len(own) / s.tokens,
            "seq-mean-token-sum": 1 / len(own),
            "seq-mean-token-sum-norm": 1 / len(own) / norm_length,
        }[supervised if s.expert else policy]
        return loss_weight * len(own)

    def noise(expert):
        own = [s for s in live if s.expert == expert]
        norms = [np.sum((token_weight(s) * (s.cs_T if expert else s.cr_T)[:, None] * s.direction_TV) ** 2) for s in own]
        return np.mean(norms) / len(own) if own else None

    distances = [np.sum((token_weight(s) * (s.cs_T - s.cr_T)[:, None] * s.direction_TV) ** 2) for s in live]
    signals = signals_of(
        sequences, policy_aggregation=policy, supervised_aggregation=supervised, norm_length=norm_length
    )
    check(logit_estimate(signals), (noise(True), noise(False), np.mean(distances) if live else None), 1e-10)


@pytest.mark.parametrize("estimator", ["coefficient", "logit", "hidden"])
def test_a_sequence_without_tokens_counts_nowhere_whatever_its_row_says(estimator):
    rows, options = signals_of(batch(9, 11, 6)).rows, {"trim": 0.1, "znorm": True}
    dead = torch.full((3, 12), 7.0)
    dead[:, sig.EXPERT], dead[:, sig.TOKENS] = torch.tensor([1.0, 0.0, 1.0]), 0.0

    def estimate(rows):
        return sig.estimate(Signals(rows, has_sum_sq=True, hidden=rows[:, 2:4]), estimator, **options)

    for got, want in zip(estimate(torch.cat((rows, dead))), estimate(rows), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=0)


def test_logit_estimator_needs_what_it_reads():
    rows = torch.ones(2, 12)
    with pytest.raises(ValueError, match="sum_sq"):
        logit_estimate(Signals(rows))
    with pytest.raises(ValueError, match="norm_length"):
        logit_estimate(Signals(rows, has_sum_sq=True, policy_aggregation="seq-mean-token-sum-norm"))


@pytest.mark.parametrize(("experts", "rollouts"), [(6, 9), (2, 2), (1, 5), (4, 0), (0, 0)])
def test_hidden_estimator(experts, rollouts):
    sequences = batch(6, experts, rollouts, dead=1)
    hidden = np.random.default_rng(0).normal(size=(len(sequences), 4)) + 0.5
    hidden += np.array([[3.0 * s.expert] for s in sequences])
    groups = [
        np.array([h for h, s in zip(hidden, sequences, strict=True) if s.tokens and s.expert == e])
        for e in (True, False)
    ]
    # seq-mean-token-mean for rollouts: a sequence's mean counts as it is; token-mean for demonstrations: by its tokens.
    tokens = np.array([s.tokens for s in sequences if s.tokens and s.expert], dtype=float)
    if len(tokens):
        groups[0] = groups[0] * (tokens * len(tokens) / tokens.sum())[:, None]
    noises = [np.trace(np.atleast_2d(np.cov(g.T))) / len(g) if len(g) > 1 else None for g in groups]
    distance = None
    if None not in noises:
        distance = max(0.0, np.sum((groups[0].mean(0) - groups[1].mean(0)) ** 2) - sum(noises))
    signals = signals_of(sequences)
    signals = Signals(signals.rows, hidden=torch.from_numpy(hidden))
    check(hidden_estimate(signals), (*noises, distance), 1e-10)
    with pytest.raises(ValueError, match="hidden"):
        hidden_estimate(signals_of(sequences))


def test_hidden_estimator_ignores_dead_rows_and_is_never_negative():
    sequences = batch(7, 3, 3, dead=2)
    hidden = torch.ones(len(sequences), 4)
    hidden[[s.tokens == 0 for s in sequences]] = math.nan
    hidden[[s.tokens > 0 for s in sequences]] += torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    values = hidden_estimate(Signals(signals_of(sequences).rows, hidden=hidden)).values_3
    assert values.isfinite().all()
    assert (values >= 0).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.integers(0, 12), max_size=4), st.booleans())
def test_micro_batches_add_up_to_one_batch_bit_for_bit(seed, cuts, znorm):
    whole = signals_of(batch(seed, 6, 6), torch.float32)
    edges = [0, *sorted(cuts), 12]
    parts = [Signals(whole.rows[a:b], has_sum_sq=True) for a, b in itertools.pairwise(edges)]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    assert torch.equal(total.rows, whole.rows)
    assert total.has_sum_sq
    for one, many in zip(
        coefficient_estimate(whole, znorm=znorm), coefficient_estimate(total, znorm=znorm), strict=True
    ):
        assert torch.equal(one, many)
    assert torch.equal(logit_estimate(whole).values_3, logit_estimate(total).values_3)


def test_adding_keeps_hidden_rows_and_promotes():
    a = Signals(torch.ones(2, 12), hidden=torch.zeros(2, 3))
    b = Signals(torch.zeros(1, 12, dtype=torch.float64), hidden=torch.ones(1, 3))
    assert (a + b).hidden.tolist() == [[0] * 3, [0] * 3, [1] * 3]
    assert (a + b).rows.dtype == torch.float64


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("has_sum_sq", Signals(torch.ones(1, 12), has_sum_sq=True)),
        ("policy_aggregation", Signals(torch.ones(1, 12), policy_aggregation="token-mean")),
        ("supervised_aggregation", Signals(torch.ones(1, 12), supervised_aggregation="seq-mean-token-sum")),
        ("norm_length", Signals(torch.ones(1, 12), norm_length=7.0)),
        ("hidden", Signals(torch.ones(1, 12), hidden=torch.ones(1, 2))),
        ("device", Signals(torch.ones(1, 12, device="meta"))),
    ],
)
def test_signals_that_were_made_differently_do_not_add(field, other):
    with pytest.raises(ValueError, match=field):
        Signals(torch.ones(1, 12)) + other


@pytest.mark.parametrize(
    ("error", "match", "keywords"),
    [
        (ValueError, r"rows .*\(S, 12\).*\(3, 11\)", {"rows": torch.ones(3, 11)}),
        (TypeError, "rows .* torch.float16", {"rows": torch.ones(3, 12, dtype=torch.float16)}),
        (ValueError, "policy_aggregation .* 'mean'", {"policy_aggregation": "mean"}),
        (ValueError, "supervised_aggregation .* 'mean'", {"supervised_aggregation": "mean"}),
        (ValueError, "norm_length .* 0", {"norm_length": 0}),
        (ValueError, r"hidden .*\(3, H\).*\(2, 4\)", {"hidden": torch.ones(2, 4)}),
    ],
)
def test_errors_name_the_field(error, match, keywords):
    with pytest.raises(error, match=match):
        Signals(**{"rows": torch.ones(3, 12), **keywords})


def test_sum_adds_them():
    parts = [gk.Signals(torch.rand(count, 12)) for count in (2, 1, 3)]
    assert sum(parts).rows.equal(torch.cat([part.rows for part in parts]))


def test_adding_something_else_is_a_type_error():
    with pytest.raises(TypeError):
        Signals(torch.ones(1, 12)) + 1


def test_all_reduce_without_a_process_group_is_the_signals_themselves():
    signals = Signals(torch.ones(1, 12))
    assert signals.all_reduce() is signals


def test_aggregations_are_those_of_the_objectives():
    assert set(sig.AGGREGATIONS) == set(objectives.AGGREGATIONS)
    defaults, objective = Signals(torch.ones(1, 12)), gk.HybridObjective()
    assert defaults.policy_aggregation == objective.aggregation
    assert defaults.supervised_aggregation == objective.supervised_aggregation


@pytest.mark.parametrize("estimator", ["coefficient", "logit", "hidden"])
@pytest.mark.parametrize("znorm", [False, True])
def test_estimators_read_nothing_from_the_device(estimator, znorm):
    signals = Signals(signals_of(batch(8, 12, 5)).rows, has_sum_sq=True, hidden=torch.ones(17, 3))
    with forbid_host_reads() as watch:
        sig.estimate(signals, estimator, trim=0.1, znorm=znorm)
    assert watch.operators > 20
    meta = Signals(signals.rows.to("meta"), has_sum_sq=True, hidden=signals.hidden.to("meta"))
    assert sig.estimate(meta, estimator, trim=0.1, znorm=znorm).values_3.shape == (3,)


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(), lambda x: bool(x.any()), lambda x: float(x[0]), lambda x: x.tolist(),
        lambda x: x[x > 0],
        lambda x: torch.nonzero(x), lambda x: torch.where(x > 0), lambda x: int(x[0]), lambda x: x.numpy(),
        lambda x: torch.equal(x, x), lambda x: x.unique(), lambda x: torch.masked_select(x, x > 0),
    ],
)  # fmt: skip
def test_the_watch_sees_a_read(read):
    x = torch.ones(3)
    with pytest.raises(HostRead), forbid_host_reads():
        read(x)
