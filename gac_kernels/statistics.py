"""Correlations of paired points, how far chance reaches in them, and how reliable a measurement is.

Shapes: M points, C clusters, R resamples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES, SHUFFLES = 2000, 500
Floats = NDArray[np.float64]


class Correlation(NamedTuple):
    """Both correlations, and the 95 % interval of Pearson's; nan where a side does not vary."""

    pearson: float
    spearman: float
    low: float
    high: float


class Interval(NamedTuple):
    """A mean or a difference with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def pearson(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of two sequences of one length; nan where a side does not vary or is not finite."""
    x_M, y_M = _pair(x, y)
    if not (np.isfinite(x_M).all() and np.isfinite(y_M).all()) or len(x_M) < 2:
        return float("nan")
    # Scaled before squaring: signals near 1e-200 would have variances of 0. Exact equality, not a tolerance, says
    # that a side is constant: its mean need not be exact.
    if x_M.min() == x_M.max() or y_M.min() == y_M.max():
        return float("nan")
    x_M, y_M = _standard(x_M), _standard(y_M)
    return float(np.clip((x_M @ y_M) / np.sqrt((x_M @ x_M) * (y_M @ y_M)), -1.0, 1.0))


def ranks(x: ArrayLike) -> Floats:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(x, dtype=np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def spearman(x: ArrayLike, y: ArrayLike) -> float:
    """Pearson's correlation of the ranks."""
    x_M, y_M = _pair(x, y)
    if np.isnan(x_M).any() or np.isnan(y_M).any():
        return float("nan")
    return pearson(ranks(x_M), ranks(y_M))


def within(x: ArrayLike, clusters: ArrayLike) -> Floats:
    """Values less the mean of their cluster: what is left of a trend that is common to a whole cluster is nothing.

    A cluster of equal values becomes exactly 0, whatever its mean is rounded to.
    """
    x_M, members = _clustered(x, clusters)
    left = x_M.copy()
    for places in members:
        constant = x_M[places].min() == x_M[places].max()
        left[places] = 0.0 if constant else x_M[places] - x_M[places].mean()
    return left


def correlate(x: ArrayLike, y: ArrayLike, *, clusters: ArrayLike, seed: int) -> Correlation:
    """Correlations with an interval from resampling whole clusters.

    Args:
        clusters: of each point: points of one cluster share a side, so they are no independent evidence.
        seed: of the resampling.
    """
    x_M, y_M = _pair(x, y)
    low, high = _quantiles(_resampled(x_M, y_M, _weights(x_M, clusters, seed)))
    return Correlation(pearson(x_M, y_M), spearman(x_M, y_M), low, high)


def contrast(x: ArrayLike, other: ArrayLike, y: ArrayLike, *, clusters: ArrayLike, seed: int) -> Interval:
    """Pearson's correlation of ``x`` with ``y`` less that of ``other`` with ``y``, both from the same resamples."""
    (x_M, y_M), (other_M, _) = _pair(x, y), _pair(other, y)
    weights_RM = _weights(x_M, clusters, seed)
    apart = _resampled(x_M, y_M, weights_RM) - _resampled(other_M, y_M, weights_RM)
    return Interval(pearson(x_M, y_M) - pearson(other_M, y_M), *_quantiles(apart))


def mean(x: ArrayLike, *, clusters: ArrayLike, seed: int) -> Interval:
    """Mean over the points with an interval from resampling whole clusters."""
    x_M = np.asarray(x, dtype=np.float64)
    weights_RM = _weights(x_M, clusters, seed)
    return Interval(float(x_M.mean()), *_quantiles(weights_RM @ x_M / weights_RM.sum(1)))


def chance(x: ArrayLike, y: ArrayLike, *, strata: ArrayLike, seed: int) -> Correlation:
    """What correlations ``SHUFFLES`` random orders of ``x`` inside each stratum make: their means, and the range that
    holds 95 % of Pearson's. A correlation inside the range may be chance."""
    x_M, y_M = _pair(x, y)
    draw, order_RM = np.random.default_rng(seed), np.empty((SHUFFLES, len(x_M)), dtype=np.intp)
    for places in _clustered(x_M, strata)[1]:
        order_RM[:, places] = draw.permuted(np.tile(places, (SHUFFLES, 1)), axis=1)
    (pearsons_R, spearmans_R) = (_dealt(u, v, order_RM) for u, v in ((x_M, y_M), (ranks(x_M), ranks(y_M))))
    return Correlation(float(pearsons_R.mean()), float(spearmans_R.mean()), *_quantiles(pearsons_R))


def spearman_brown(half: float) -> float:
    """Reliability of a whole measurement from the correlation of its two halves, 2 r / (1 + r) (Spearman and Brown,
    1910). Halves that do not agree (r <= 0) have no whole to speak of: their r is returned."""
    return 2.0 * half / (1.0 + half) if half > 0.0 else half


def reliability(first: ArrayLike, second: ArrayLike, *, clusters: ArrayLike, seed: int) -> Correlation:
    """:func:`correlate` of the two halves of a measurement, each figure stepped up by :func:`spearman_brown`."""
    return Correlation(*map(spearman_brown, correlate(first, second, clusters=clusters, seed=seed)))


def _weights(x_M: Floats, clusters: ArrayLike, seed: int) -> Floats:
    """(R, M) how often each point is in each resample of the clusters."""
    _, members = _clustered(x_M, clusters)
    count = len(members)
    drawn_RC = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=RESAMPLES)
    weights_RM = np.empty((RESAMPLES, len(x_M)))
    for cluster, places in enumerate(members):
        weights_RM[:, places] = drawn_RC[:, [cluster]]
    return weights_RM


def _resampled(x_M: Floats, y_M: Floats, weights_RM: Floats) -> Floats:
    """(R,) Pearson's correlation of each resample; nan where a side does not vary in it."""
    if np.isnan(pearson(x_M, y_M)):
        return np.full(len(weights_RM), np.nan)
    x_M, y_M, total_R = _standard(x_M), _standard(y_M), weights_RM.sum(1)
    mean_x, mean_y, xx, yy, xy = (weights_RM @ v / total_R for v in (x_M, y_M, x_M * x_M, y_M * y_M, x_M * y_M))
    rounding = len(x_M) * np.finfo(np.float64).eps
    var_x, var_y = xx - mean_x**2, yy - mean_y**2
    varies = (var_x > rounding * xx) & (var_y > rounding * yy)
    scale = np.sqrt(np.where(varies, var_x * var_y, 1.0))
    return np.where(varies, np.clip((xy - mean_x * mean_y) / scale, -1.0, 1.0), np.nan)


def _dealt(x_M: Floats, y_M: Floats, order_RM: NDArray[np.intp]) -> Floats:
    """(R,) Pearson's correlation of each order of x with y."""
    if np.isnan(pearson(x_M, y_M)):
        return np.full(len(order_RM), np.nan)
    x_M, y_M = _standard(x_M), _standard(y_M)
    return x_M[order_RM] @ y_M / np.sqrt((x_M @ x_M) * (y_M @ y_M))


def _quantiles(found_R: Floats) -> tuple[float, float]:
    finite = found_R[np.isfinite(found_R)]  # a resample of one cluster alone may tell nothing
    if not len(finite):
        return float("nan"), float("nan")
    low, high = np.quantile(finite, (0.025, 0.975))
    return float(low), float(high)


def _standard(x_M: Floats) -> Floats:
    """Of size one at most and centred."""
    x_M = x_M / np.abs(x_M).max()
    return x_M - x_M.mean()


def _clustered(x: ArrayLike, clusters: ArrayLike) -> tuple[Floats, list[NDArray[np.intp]]]:
    x_M, cluster_M = np.asarray(x, dtype=np.float64), np.asarray(clusters)
    if cluster_M.shape != x_M.shape:
        raise ValueError(f"clusters must have shape {x_M.shape}, got {cluster_M.shape}")
    return x_M, [np.flatnonzero(cluster_M == name) for name in np.unique(cluster_M)]


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[Floats, Floats]:
    x_M, y_M = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_M.ndim != 1 or x_M.shape != y_M.shape:
        raise ValueError(f"x and y must be one-dimensional and of one length, got shapes {x_M.shape} and {y_M.shape}")
    return x_M, y_M
