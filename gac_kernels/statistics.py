"""Correlations of paired points and how far chance reaches in them.

Shapes: M points.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000


class Correlation(NamedTuple):
    """Both correlations, and the 95 % bootstrap interval of Pearson's; nan where a side does not vary."""

    pearson: float
    spearman: float
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
    x_M, y_M = (v / np.abs(v).max() for v in (x_M, y_M))
    x_M, y_M = x_M - x_M.mean(), y_M - y_M.mean()
    return float(np.clip((x_M @ y_M) / np.sqrt((x_M @ x_M) * (y_M @ y_M)), -1.0, 1.0))


def ranks(x: ArrayLike) -> NDArray[np.float64]:
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


def correlate(x: ArrayLike, y: ArrayLike, *, clusters: ArrayLike, seed: int) -> Correlation:
    """Correlations with an interval from resampling whole clusters.

    Args:
        clusters: of each point: points of one cluster share a side, so they are no independent evidence.
        seed: of the resampling.
    """
    x_M, y_M = _pair(x, y)
    cluster_M = np.asarray(clusters)
    if cluster_M.shape != x_M.shape:
        raise ValueError(f"clusters must have shape {x_M.shape}, got {cluster_M.shape}")
    members = [np.flatnonzero(cluster_M == name) for name in np.unique(cluster_M)]
    draw = np.random.default_rng(seed)
    found = []
    for _ in range(RESAMPLES):
        picked = np.concatenate([members[i] for i in draw.integers(0, len(members), len(members))])
        found.append(pearson(x_M[picked], y_M[picked]))
    finite = [value for value in found if np.isfinite(value)]  # a resample of one cluster alone tells nothing
    low, high = np.quantile(finite, (0.025, 0.975)) if finite else (float("nan"), float("nan"))
    return Correlation(pearson(x_M, y_M), spearman(x_M, y_M), float(low), float(high))


def _pair(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    x_M, y_M = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x_M.ndim != 1 or x_M.shape != y_M.shape:
        raise ValueError(f"x and y must be one-dimensional and of one length, got shapes {x_M.shape} and {y_M.shape}")
    return x_M, y_M
