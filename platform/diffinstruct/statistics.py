"""Values with their 95 % intervals: shares, means, paired differences, over prompts and over training seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Array = NDArray[Any]
RESAMPLES = 2000
Z = 1.959963984540054  # the standard normal's 97.5 % point


@dataclass(frozen=True)
class Estimate:
    """A measured value and its 95 % interval; `n` prompts (or pairs), `seed` of noise and resamples."""

    value: float
    low: float
    high: float
    n: int
    seed: int | None = None

    def __str__(self) -> str:
        """`value [low, high]`, with two significant digits of the interval's width; "?" where there is none."""
        width = self.high - self.low
        if not math.isfinite(width):
            return f"{self.value:.3f} [?]"
        digits = min(9, max(0, 1 - math.floor(math.log10(width)))) if width > 0 else 3
        return f"{self.value:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]"


Summary = dict[str, Estimate]


def wilson(successes: float, n: int, seed: int | None = None) -> Estimate:
    """A share and its score interval (Wilson 1927), which stays inside [0, 1] and is honest at 0 of n and n of n."""
    share, spread = successes / n, Z * Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), n, seed)


def resamples(n: int, seed: int) -> Array:
    """How often each of n prompts is drawn in each bootstrap resample: [RESAMPLES, n], every row sums to n.

    The same seed gives the same resamples: differences between two models evaluated on the same prompts stay paired.
    """
    drawn = np.random.default_rng(seed).integers(n, size=(RESAMPLES, n))
    in_row = drawn + n * np.arange(RESAMPLES)[:, None]  # each resample counts in bins of its own
    return np.bincount(in_row.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n).astype(np.float64)


def bootstrap_mean(values: ArrayLike, seed: int) -> Estimate:
    """The mean of `values` [n], one a prompt, with the percentile bootstrap's interval. Raises on NaN and infinity."""
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} values are not finite")
    if len(values) == 1:
        return Estimate(float(values[0]), -math.inf, math.inf, 1, seed)
    return from_replicates(values.mean(), resamples(len(values), seed) @ values / len(values), len(values), seed)


def paired_difference(a: ArrayLike, b: ArrayLike, seed: int) -> Estimate:
    """The mean of a - b over prompts, both models given the same prompts and noise."""
    return bootstrap_mean(np.asarray(a, np.float64) - np.asarray(b, np.float64), seed)


def win_rate(a: ArrayLike, b: ArrayLike, seed: int | None = None) -> Estimate:
    """The share of prompts on which a is above b; a tie is half a win."""
    a, b = np.asarray(a), np.asarray(b)
    return wilson(float((a > b).sum() + 0.5 * (a == b).sum()), len(a), seed)


def from_replicates(value: float, replicates: Array, n: int, seed: int) -> Estimate:
    low, high = np.quantile(replicates, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n, seed)


def over_seeds(values: Sequence[float]) -> Estimate:
    """The mean over training seeds with Student's interval; n is the number of seeds. One seed has no interval."""
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    return Estimate(mean, mean - half, mean + half, n)


def by_seed(frame: pd.DataFrame, by: str, measures: Sequence[str]) -> dict[str, Summary]:
    """Rows of a table: for each value of `by`, in the order of appearance, every measure over the seeds."""
    return {
        str(name): {measure: over_seeds(group[measure].to_numpy()) for measure in measures}
        for name, group in frame.groupby(by, sort=False)
    }


def paired_by_seed(
    frame: pd.DataFrame, by: str, one: str, other: str, measure: str, noise: tuple[float, int] | None = None
) -> Estimate:
    """one - other, over the seeds that both have: same start, same prompts and noise of every round.

    noise: (sigma, degrees of freedom) of `seed_noise`, in place of the few differences' own standard deviation: with it
        one seed has an interval, too.
    """
    wide = frame[frame[by].isin([one, other])].pivot(index="seed", columns=by, values=measure).dropna()
    figure = over_seeds((wide[one] - wide[other]).to_numpy())
    if noise is None:
        return figure
    sigma, freedom = noise
    half = float(stats.t.ppf(0.975, freedom)) * sigma * np.sqrt(2 / figure.n)
    return Estimate(figure.value, figure.value - half, figure.value + half, figure.n)


def at_distance(trials: pd.DataFrame, distance: str, at: ArrayLike, measures: Sequence[str]) -> dict[str, float]:
    """Each measure where a path of trials is `at` that distance, interpolated; the mean over several distances. NaN
    where the path does not go that far, either way."""
    path, wanted = trials.sort_values(distance), np.atleast_1d(np.asarray(at, np.float64))
    within = len(path) and path[distance].iloc[0] <= wanted.min() and wanted.max() <= path[distance].iloc[-1]
    return {key: float(np.interp(wanted, path[distance], path[key]).mean()) if within else np.nan for key in measures}


def seed_noise(frame: pd.DataFrame, by: str, measure: str) -> tuple[float, int]:
    """The standard deviation of a measure beside each arm's and each seed's own mean (two-way analysis of variance), and
    its degrees of freedom. Only seeds that all arms of more than one seed have count."""
    wide = frame.pivot(index="seed", columns=by, values=measure)
    wide = wide.loc[:, wide.notna().sum() > 1].dropna()
    left = wide.sub(wide.mean(axis=0), axis=1)
    left = left.sub(left.mean(axis=1), axis=0)
    freedom = (wide.shape[0] - 1) * (wide.shape[1] - 1)
    if freedom < 1:
        raise ValueError(f"the noise of {measure} takes two arms with two seeds in common, there are {wide.shape[::-1]}")
    return float(np.sqrt((left.to_numpy() ** 2).sum() / freedom)), freedom
