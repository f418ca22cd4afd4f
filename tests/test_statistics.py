"""Correlations against hand values and planted truths."""

from __future__ import annotations

import numpy as np
import pytest

from gac_kernels.statistics import (
    chance,
    contrast,
    correlate,
    mean,
    pearson,
    ranks,
    reliability,
    spearman,
    spearman_brown,
    within,
)


def test_correlations_by_hand():
    assert pearson([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert pearson([1, 2, 3], [1e-200, 2e-200, 3e-200]) == pytest.approx(1.0)
    assert spearman([1, 2, 3, 4], [1, 10, 100, 90]) == pytest.approx(0.8)
    assert ranks([3.0, 1.0, 3.0, 2.0]).tolist() == [3.5, 1.0, 3.5, 2.0]
    assert np.isnan(pearson([1, 1, 1], [1, 2, 3])) and np.isnan(spearman([1, np.nan, 2], [1, 2, 3]))
    with pytest.raises(ValueError, match="of one length"):
        pearson([1, 2], [1, 2, 3])


def test_bootstrap_covers_and_repeats():
    draw = np.random.default_rng(0)
    x = draw.normal(size=60)
    y = 0.8 * x + 0.6 * draw.normal(size=60)
    found = correlate(x, y, clusters=np.arange(60), seed=1)
    assert found.low < found.pearson < found.high and found.low < 0.8 < found.high
    assert found == correlate(x, y, clusters=np.arange(60), seed=1)
    # Points that repeat their cluster are no further evidence: the interval stays.
    again = correlate(np.repeat(x, 4), np.repeat(y, 4), clusters=np.repeat(np.arange(60), 4), seed=1)
    assert (again.low, again.high) == pytest.approx((found.low, found.high))
    independent = correlate(x, draw.normal(size=60), clusters=np.arange(60), seed=1)
    assert independent.low < 0.0 < independent.high


def test_bootstrap_is_that_of_whole_clusters():
    """Against resamples drawn one by one and correlated by the plain formula."""
    draw = np.random.default_rng(4)
    clusters = np.repeat(np.arange(10), 3)
    x = np.repeat(draw.normal(size=10), 3) + 0.1 * draw.normal(size=30)
    y = x + draw.normal(size=30)
    plain = []
    for _ in range(4000):
        picked = np.concatenate([3 * c + np.arange(3) for c in draw.integers(0, 10, 10)])
        plain.append(pearson(x[picked], y[picked]))
    found = correlate(x, y, clusters=clusters, seed=0)
    assert (found.low, found.high) == pytest.approx(np.quantile(plain, (0.025, 0.975)), abs=0.03)


def test_no_correlation_where_nothing_varies():
    found = correlate([0.1] * 6, [1, 2, 3, 4, 5, 6], clusters=range(6), seed=0)
    assert all(np.isnan(value) for value in found)
    assert np.isnan(chance([0.1] * 6, [1, 2, 3, 4, 5, 6], strata=[0] * 6, seed=0).pearson)


def test_within_takes_the_clusters_means_out():
    assert within([1, 3, 10, 10, 16], [0, 0, 1, 1, 1]).tolist() == [-1, 1, -2, -2, 4]
    assert within([0.1, 0.1, 0.1], [0, 0, 0]).tolist() == [0, 0, 0]  # though 0.3 / 3 is not 0.1
    with pytest.raises(ValueError, match=r"clusters must have shape \(3,\), got \(2,\)"):
        within([1, 2, 3], [0, 1])


def test_contrast_of_a_better_and_a_worse_estimator():
    draw = np.random.default_rng(5)
    y = draw.normal(size=200)
    good, bad = y + 0.3 * draw.normal(size=200), y + 2.0 * draw.normal(size=200)
    found = contrast(good, bad, y, clusters=np.arange(200), seed=0)
    assert found.value == pytest.approx(pearson(good, y) - pearson(bad, y)) and 0.2 < found.low < found.value
    same = contrast(good, good, y, clusters=np.arange(200), seed=0)
    assert tuple(same) == (0.0, 0.0, 0.0)


def test_chance_keeps_to_its_strata():
    """Shuffled inside strata a trend between them survives, and shuffled over all it is gone."""
    strata = np.repeat(np.arange(5), 8)
    x = strata + 0.1 * np.random.default_rng(6).normal(size=40)
    assert chance(x, strata, strata=strata, seed=0).low > 0.9
    free = chance(x, strata, strata=np.zeros(40), seed=0)
    assert abs(free.pearson) < 0.05 and abs(free.spearman) < 0.05
    assert free.low == pytest.approx(-0.31, abs=0.06) and free.high == pytest.approx(0.31, abs=0.06)  # 1.96 / sqrt(39)


def test_spearman_brown_by_simulation():
    draw = np.random.default_rng(7)
    truth = draw.normal(size=4000)
    halves = [truth + draw.normal(size=4000) for _ in range(2)]
    again = [truth + draw.normal(size=4000) for _ in range(2)]
    found = reliability(*halves, clusters=np.arange(4000), seed=0)
    # What the whole's reliability is: the correlation of two wholes.
    assert found.pearson == pytest.approx(pearson(sum(halves), sum(again)), abs=0.03)
    assert spearman_brown(0.5) == pytest.approx(2 / 3) and spearman_brown(-0.3) == -0.3


def test_mean_of_clusters():
    found = mean([1.0, 1.0, 3.0, 3.0], clusters=[0, 0, 1, 1], seed=0)
    assert tuple(found) == (2.0, 1.0, 3.0)
