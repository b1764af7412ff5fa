"""Distances between pictures' features."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    pass
from diffinstruct.statistics import Array, Estimate, from_replicates, resamples


def kid(features: Array, reference: Array, seed: int) -> Estimate:
    """Kernel distance between `features` [n, F] and `reference` [m, F] (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased squared MMD under the kernel (x.y / F + 1)^3, 0 in the mean if both have one law. Over all pairs rather
    than over random subsets, whose spread is no interval: prompts and reference pictures are resampled instead, and
    a picture is never paired with its own copy, which keeps every resample unbiased.
    """
    value, replicates = kid_replicates(features, reference, seed)
    return from_replicates(value, replicates, len(features), seed)


def kid_replicates(features: Array, reference: Array, seed: int) -> tuple[float, Array]:
    x, y = np.asarray(features, np.float64), np.asarray(reference, np.float64)
    x_weights = np.vstack([np.ones(len(x)), resamples(len(x), seed)])  # the first row is the sample itself
    y_weights = np.vstack([np.ones(len(y)), resamples(len(y), seed + 1)])
    between = ((x_weights @ _kernel(x, y)) * y_weights).sum(1) / (len(x) * len(y))
    distances = _mean_over_pairs(x, x_weights) + _mean_over_pairs(y, y_weights) - 2 * between
    return float(distances[0]), distances[1:]


def _kernel(x: Array, y: Array) -> Array:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _mean_over_pairs(x: Array, weights: Array) -> Array:
    """For each row of weights [R, n], the mean of kernel(x_i, x_j) over pairs of different originals i, j."""
    kernel = _kernel(x, x)
    np.fill_diagonal(kernel, 0)
    return ((weights @ kernel) * weights).sum(1) / (len(x) ** 2 - (weights**2).sum(1))


def mean_pairwise_distance(features: Array) -> float:
    """Diversity of pictures of one prompt: the mean distance between two of `features` [K, F]."""
    k = len(features)
    return float(np.linalg.norm(features[:, None] - features[None], axis=-1).sum() / (k * (k - 1)))
