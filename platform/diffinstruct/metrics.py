"""What runs and generators are compared by: one row a metric, with its title, its direction and its interval.

A row is all that a new metric takes: `evaluate` computes it, and summaries, paired differences, tables and pages show
it. No torch here, so that a page of results needs none.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from diffinstruct.statistics import Array, Estimate, bootstrap_mean, from_replicates, resamples, wilson


@dataclass(frozen=True)
class Metric:
    """One number by which generators are compared.

    name: the column that holds it; with a "/" at its end a family, whose members are columns "<name><member>".
    title: what tables, plots and pages call it; "{}" stands for the member.
    direction: "up" where more is better, "down" where less is.
    interval: "share": 0 or 1 a prompt, Wilson's interval; "mean": a number a prompt, bootstrap over prompts;
        "features": one number for all pictures, with the function's own resamples.
    function: computes it. For a share or a mean: images [B, 3, H, W] in [0, 1] -> [B]. For "features": (features
        [n, F], those of the reference's pictures [m, F], seed) -> (value, resampled values). None: it has another
        origin, as the scores of rewards and the metrics of training have.
    """

    name: str
    title: str
    direction: Literal["up", "down"] = "up"
    interval: Literal["share", "mean", "features"] = "mean"
    function: Callable[..., Any] | None = None

    def estimate(self, values: Array, seed: int) -> Estimate:
        """The mean of `values` [n], one a prompt, with this metric's interval."""
        return wilson(values.sum(), len(values), seed) if self.interval == "share" else bootstrap_mean(values, seed)


# ------------------------------------------------------------------------------------------ distances of features
def kid(features: Array, reference: Array, seed: int) -> Estimate:
    """Kernel distance between `features` [n, F] and `reference` [m, F] (Binkowski et al. 2018, arXiv 1801.01401).

    The unbiased squared MMD under the kernel (x.y / F + 1)^3, over all pairs. Its interval comes from resampled prompts
    and reference pictures; a picture is never paired with its own copy, so every resample is unbiased.
    """
    value, replicates = kid_replicates(features, reference, seed)
    return from_replicates(value, replicates, len(features), seed)


def kid_replicates(features: Array, reference: Array, seed: int) -> tuple[float, Array]:
    """The value of `kid`, and its values on the resamples; equal seeds give the same resamples."""
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


# ------------------------------------------------------------------------------------------ the table
DISTANCES = ("kid", "x0_gap")  # distances from the reference: of an evaluation, which is preferred, and of training
REWARD, HELD_OUT, ACCURACY = "reward/", "held_out/", "accuracy/"

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        # of an evaluation
        Metric(REWARD, "reward, {}"),
        Metric("accuracy", "attributes right"),
        Metric(ACCURACY, "{} right", interval="share"),
        Metric("kid", "KID to the reference", "down", "features", kid_replicates),
        Metric("diversity", "diversity"),  # from several pictures of a prompt, which `evaluate` makes
        # of training alone
        Metric(HELD_OUT, "held-out reward, {}"),
        Metric("x0_gap", "divergence from the reference", "down"),
        Metric("overoptimization/unexplained", "gain of the trained beyond the held-out, within-prompt std", "down"),
        Metric("overoptimization/variety", "variety, share of the start's"),
    )
}


def find_metric(column: str, metrics: Mapping[str, Metric] = METRICS) -> Metric | None:
    """The metric that a column holds, a family's member under its own name and title; None for any other column."""
    if column in metrics and not column.endswith("/"):
        return metrics[column]
    family, slash, member = column.partition("/")
    if member and (row := metrics.get(family + slash)):
        return replace(row, name=column, title=row.title.format(member))
    return None
