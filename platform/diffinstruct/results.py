"""Finished trials as a table that outlives them: one row a trial in a CSV file, and figures over training seeds.

An experiment that takes hours is interrupted; what it knows already must not be. Each finished trial adds its row, and a trial
whose row is there is not run again, on this machine or another.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from diffinstruct.evaluation import Figure, Summary
from diffinstruct.experiment import UserError

KEY = "trial"


class Rows:
    """A CSV file of finished trials: column `trial` names them, `commit` the code, `at` the day; the rest is the trial's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> pd.DataFrame:
        """Raises UserError for a file that cannot be read, or that has a trial twice."""
        if not self.path.exists():
            return pd.DataFrame(columns=[KEY])
        try:
            frame = pd.read_csv(self.path)
        except ValueError as error:  # pandas' parser errors, too
            raise UserError(f"{self.path}: {' '.join(str(error).split())}") from None
        if KEY not in frame:
            raise UserError(f"{self.path}: no column {KEY!r}")
        if (twice := frame[KEY].duplicated()).any():
            raise UserError(f"{self.path}: has a trial twice: {frame[KEY][twice].iloc[0]}")
        return frame

    def missing(self, trials: Iterable[str]) -> list[str]:
        """Those of `trials` that have no row yet."""
        done = set(self.read()[KEY])
        return [trial for trial in trials if trial not in done]

    def add(self, trial: str, row: Mapping[str, Any]) -> None:
        """Adds a finished trial's row. The file is replaced, never half written."""
        new = pd.DataFrame([{KEY: trial, "commit": _commit(), "at": f"{pd.Timestamp.now(tz='UTC'):%Y-%m-%d}", **row}])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        pd.concat([self.read(), new], ignore_index=True).to_csv(temporary, index=False, float_format="%.6g")
        os.replace(temporary, self.path)


def flat(summary: Summary) -> dict[str, float]:
    """A summary as columns: `x`, `x.low`, `x.high` (its interval over prompts), and `x.n`."""
    columns: dict[str, float] = {}
    for name, figure in summary.items():
        columns |= {name: figure.value, f"{name}.low": figure.low, f"{name}.high": figure.high, f"{name}.n": figure.n}
    return columns


def over_seeds(values: Sequence[float]) -> Figure:
    """The mean over training seeds with Student's interval; n is the number of seeds. One seed has no interval."""
    array = np.asarray(values, np.float64)
    mean, n = float(array.mean()), len(array)
    half = float(stats.t.ppf(0.975, n - 1) * array.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")
    return Figure(mean, mean - half, mean + half, n)


def by_seed(frame: pd.DataFrame, by: str, measures: Sequence[str]) -> dict[str, Summary]:
    """Rows of a table: for each value of `by`, in the order of appearance, every measure over the seeds."""
    return {
        str(name): {measure: over_seeds(group[measure].to_numpy()) for measure in measures}
        for name, group in frame.groupby(by, sort=False)
    }


def paired_by_seed(
    frame: pd.DataFrame, by: str, one: str, other: str, measure: str, noise: tuple[float, int] | None = None
) -> Figure:
    """one - other, over the seeds that both have: same start, same prompts and noise of every round.

    noise: (sigma, degrees of freedom) of `seed_noise`, in place of the few differences' own spread: with it one seed has an
        interval too, as wide as if this pair were as noisy as those that sigma was taken from.
    """
    wide = frame[frame[by].isin([one, other])].pivot(index="seed", columns=by, values=measure).dropna()
    figure = over_seeds((wide[one] - wide[other]).to_numpy())
    if noise is None:
        return figure
    sigma, freedom = noise
    half = float(stats.t.ppf(0.975, freedom)) * sigma * np.sqrt(2 / figure.n)
    return Figure(figure.value, figure.value - half, figure.value + half, figure.n)


def at_distance(trials: pd.DataFrame, distance: str, at: ArrayLike, measures: Sequence[str]) -> dict[str, float]:
    """Each measure where a path of trials is `at` that distance, the mean over several: between the two trials that are nearest
    by distance. NaN where the path does not go that far, either way."""
    path, wanted = trials.sort_values(distance), np.atleast_1d(np.asarray(at, np.float64))
    within = len(path) and path[distance].iloc[0] <= wanted.min() and wanted.max() <= path[distance].iloc[-1]
    return {key: float(np.interp(wanted, path[distance], path[key]).mean()) if within else np.nan for key in measures}


def seed_noise(frame: pd.DataFrame, by: str, measure: str) -> tuple[float, int]:
    """What is left of a measure when each arm's and each seed's own mean is taken away (two-way analysis of variance): its
    standard deviation, and the degrees of freedom of that. Only seeds that all arms of more than one seed have count."""
    wide = frame.pivot(index="seed", columns=by, values=measure)
    wide = wide.loc[:, wide.notna().sum() > 1].dropna()
    left = wide.sub(wide.mean(axis=0), axis=1)
    left = left.sub(left.mean(axis=1), axis=0)
    freedom = (wide.shape[0] - 1) * (wide.shape[1] - 1)
    if freedom < 1:
        raise ValueError(f"the noise of {measure} takes two arms with two seeds in common, there are {wide.shape[::-1]}")
    return float(np.sqrt((left.to_numpy() ** 2).sum() / freedom)), freedom


def _commit() -> str:
    """The code that made a row, as git says it, "-dirty" where files other than the rows differ; "unknown" without git."""
    git = ["git", "-C", str(Path(__file__).parent)]

    def said(*command: str) -> str:
        try:
            return subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
        except OSError:
            return ""

    commit = said("rev-parse", "--short", "HEAD")
    return (commit or "unknown") + "-dirty" * bool(said("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/docs"))
