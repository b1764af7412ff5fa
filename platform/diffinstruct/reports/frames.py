"""Runs as tables: kept rows of finished trials, a sweep's folder as one frame, estimates over training seeds.

A measure with an interval is four columns everywhere: `x`, `x.low`, `x.high` (95 %) and `x.n`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import RENAMED as RENAMED_KEYS
from diffinstruct.config.reading import load_run
from diffinstruct.config.sections import ARGUMENTS
from diffinstruct.errors import UserError, nearest_file
from diffinstruct.locks import exclusive
from diffinstruct.metrics import DISTANCES, HELD_OUT, METRICS
from diffinstruct.statistics import Estimate, Summary, over_seeds
from diffinstruct.tracking.journal import CODE_COMMIT, COMMIT
from diffinstruct.tracking.records import read_journal


# ------------------------------------------------------------------------------------------ tables
def table(rows: dict[str, Summary]) -> pd.DataFrame:
    """One row a generator, one column a measure, cells `value [low, high]`; empty where a row lacks the measure."""
    return pd.DataFrame({name: {m: str(f) for m, f in row.items()} for name, row in rows.items()}).T.fillna("")


def markdown(rows: dict[str, Summary], over: str = "prompts") -> str:
    """`table` as Markdown; the head names each column's n, the last line what the intervals are over, and the seed."""
    cells = table(rows)
    lines = [["", *cells.columns], ["---", *["--:"] * len(cells.columns)]]
    lines += [[name, *cells.loc[name]] for name in cells.index]
    counts = {m: sorted({row[m].n for row in rows.values() if m in row}) for m in cells.columns}
    lines.insert(2, ["n", *[" or ".join(map(str, counts[m])) for m in cells.columns]])
    seeds = sorted({str(f.seed) for row in rows.values() for f in row.values() if f.seed is not None})
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    seed = f"; seed {', '.join(seeds)}" if seeds else ""
    return f"{text}\n\nIn brackets: 95 % intervals over {over}{seed}.\n"


KEY = "trial"


class TrialRows:
    """A CSV file of finished trials: the column `trial` names them, `commit` the code, `at` the day."""

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
        new = pd.DataFrame([{KEY: trial, "commit": "unknown", "at": f"{pd.Timestamp.now(tz='UTC'):%Y-%m-%d}", **row}])
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(self.path.name + ".tmp")
        lock = self.path.with_name(f".{self.path.name}.lock")  # studies that share the file may run side by side
        with exclusive(lock):
            pd.concat([self.read(), new], ignore_index=True).to_csv(temporary, index=False, float_format="%.6g")
            os.replace(temporary, self.path)


def flat(summary: Summary) -> dict[str, float]:
    """A summary as columns: `x`, `x.low`, `x.high` (its interval over prompts), and `x.n`."""
    columns: dict[str, float] = {}
    for name, estimate in summary.items():
        columns |= {name: estimate.value, f"{name}.low": estimate.low, f"{name}.high": estimate.high, f"{name}.n": estimate.n}
    return columns


# ------------------------------------------------------------------------------------------------- runs as a frame
def load_sweep(path: Path | str) -> pd.DataFrame:
    """One row a run. `path`: a sweep's folder, whose folders with an experiment.yaml are the runs; a run's folder; or a
    CSV of kept rows, each of which is a finished trial.

    Columns: `run` (its folder; in a CSV the trial's name), `status` ("finished", "failed", "unfinished"), `reason` (why
    it ended otherwise), `commit` (of the code), `step` (rounds it has measured), `alarm` (step of the first alarm of
    reward hacking), every dotted key of its configuration, its last metrics, its evaluation. A CSV has
    those that were kept. NaN: does not apply.
    A measure of which any run has an interval holds evaluated values alone: training's metric of the same name is
    another thing. Raises UserError in one line for a path that holds no run, and for a file in it that cannot be read.
    """
    path = Path(path)
    if path.suffix == ".csv":
        if not path.is_file():
            raise UserError(f"{path}: no such file{nearest_file(path, '*.csv')}")
        frame = TrialRows(path).read().copy().assign(status="finished", reason=np.nan)
        if "reference.cfg_scale" in frame:
            frame["reference.cfg_scale"] += 1  # as guidance_scale counts
        frame = frame.rename(columns={KEY: "run", **RENAMED_KEYS}).rename(columns=renamed)
        if frame.empty:
            raise UserError(f"{path}: no rows in it")
    else:
        frame = pd.DataFrame([_run(folder) for folder in run_folders(path)])
    for measure in with_intervals(frame):
        frame.loc[frame[f"{measure}.low"].isna(), measure] = np.nan
    return frame


def run_folders(path: Path | str) -> list[Path]:
    """The runs in a sweep's folder, by name, or the one that `path` is. Raises UserError where there is none."""
    path = Path(path)
    if (path / "experiment.yaml").is_file():
        return [path]
    if found := sorted(file.parent for file in path.glob("*/experiment.yaml")):
        return found
    if path.is_dir():
        raise UserError(f"{path}: no run in it (neither it nor a folder in it has an experiment.yaml)")
    if path.exists():
        raise UserError(f"{path}: should be a run's folder, a sweep's, or a .csv of kept rows")
    raise UserError(f"{path}: no such folder{nearest_file(path, '*')}")


RENAMED = {
    "divergence": "x0_gap",
    "watch/": "overoptimization/",
    "hacking": "overoptimization",
    "watch": "overoptimization.no_held_out",
    "overoptimization.blind": "overoptimization.no_held_out",
    "blind": "overoptimization.probe_skipped",
}
"""Metrics, events, and groups of them (with a slash) of older versions, and what they are called now."""


def renamed(name: str) -> str:
    """Today's name of a metric or an event."""
    group, slash, rest = name.partition("/")
    return RENAMED.get(name) or RENAMED.get(group + slash, group + slash) + rest


def read_run(folder: Path | str) -> list[dict[str, Any]]:
    """The records of a run's journal with today's names, whichever version has written it."""
    records = read_journal(folder)
    for record in records:
        for kind in record.keys() & {"metrics", "examined"}:
            record[kind] = {renamed(key): value for key, value in record[kind].items()}
        if "event" in record:
            record["event"] = renamed(record["event"])
    return records


def planned(path: Path) -> int:
    """How many trials the sweep in this folder is to have, as its parent run says; 0 where there is no such run."""
    return int([{}, *start_tags(read_journal(path))][-1].get("trials", 0))


def learning_curves(path: Path | str) -> pd.DataFrame:
    """Every metric at every step of the runs in a folder, from their journals: columns `run`, `step`, `key`, `value`.
    Where a resumed run measured a step again, the later value."""
    values = {
        (str(folder), record["step"], key): value
        for folder in run_folders(path)
        for record in read_run(folder)
        for key, value in record.get("metrics", {}).items()
    }
    return pd.DataFrame([(*at, value) for at, value in values.items()], columns=["run", "step", "key", "value"])


def with_intervals(frame: pd.DataFrame) -> list[str]:
    """The measures that have intervals, in the order of the columns: they were evaluated."""
    return [column for column in frame if f"{column}.low" in frame]


@dataclass(frozen=True)
class Measures:
    """The columns of a frame that a sweep is judged by; None for what it does not have."""

    trained: str | None
    held_out: str | None
    distance: str | None
    diversity: str | None

    def titles(self) -> dict[str, str]:
        """Column -> what figures and tables call it, in the order above."""
        said: dict[str | None, str] = {
            self.trained: f"trained reward, {_reward(self.trained)}",
            self.held_out: METRICS[HELD_OUT].title.format(_reward(self.held_out)),
            **{name: METRICS[name].title for name in (self.distance, self.diversity) if name},
        }
        return {column: title for column, title in said.items() if column is not None}


def measures(frame: pd.DataFrame) -> Measures:
    """What a frame's runs are judged by: evaluated measures if any run has them, else training's; the first rewards."""
    intervals = with_intervals(frame)
    held_out = [str(column).partition("/")[2] for column in frame if str(column).startswith("held_out/")]
    if "rewards.trained" in frame:
        trained = [reward["name"] for value in frame["rewards.trained"].dropna() for reward in json.loads(value)]
    else:  # kept rows, whose first columns are training's
        bounds = {f"{measure}.{end}" for measure in intervals for end in ("low", "high", "n")}
        rewards = [str(column) for column in frame if str(column).startswith("reward/") and column not in bounds]
        trained = [name for column in rewards if (name := _reward(column)) not in held_out]

    def first(*columns: str) -> str | None:
        there = [column for column in columns if column in frame and frame[column].notna().any()]
        return next((column for column in there if column in intervals), next(iter(there), None))

    return Measures(
        first(*(f"reward/{name}" for name in trained[:1])),
        first(*(f"{kind}/{name}" for name in held_out[:1] for kind in ("reward", "held_out"))),
        first(*DISTANCES),
        first("diversity", "overoptimization/variety"),
    )


def swept(frame: pd.DataFrame) -> list[str]:
    """The keys of a run's identity that differ between runs, in the order of `identity_keys`, but for the seed and the
    cluster. A row without a key, as older rows are, differs from those that have one."""
    keys = [key for key in identity_keys(frame) if key != "seed" and not key.startswith("cluster.")]
    return [key for key in keys if _differs(frame, key)]


def identity_keys(frame: pd.DataFrame) -> list[str]:
    """The columns that are keys of a run's identity, in the configuration's order, then arguments it does not have."""
    known = Experiment().identity
    arguments = tuple(f"objective.{section}." for section in ARGUMENTS.values())
    return [key for key in known if key in frame] + [
        column for column in frame if column.startswith(arguments) and column not in known
    ]


def _differs(frame: pd.DataFrame, key: str) -> bool:
    if key.startswith("objective.args.") and "objective.name" in frame:  # whether it has the argument, the name says
        return bool(frame.groupby("objective.name", dropna=False)[key].nunique(dropna=False).max() > 1)
    return bool(frame[key].nunique(dropna=False) > 1)


def points(frame: pd.DataFrame) -> pd.DataFrame:
    """One row for each configuration among the finished runs: the swept keys, `runs` (a tuple of their names), and each
    of `measures` with its interval. Of several training seeds: the mean and Student's interval over them; of one: the
    run's own interval over prompts, if it was evaluated."""
    keys, wanted, done = swept(frame), measures(frame).titles(), frame[frame["status"] == "finished"]
    found = []
    for _, group in done.groupby(keys or np.zeros(len(done)), sort=False, dropna=False):
        row: dict[str, Any] = {key: group[key].iloc[0] for key in keys} | {"runs": tuple(group["run"])}
        for measure in wanted:
            known = group.dropna(subset=[measure])
            if len(known) == 1:
                row |= {column: known[column].iloc[0] for column in _columns(measure) if column in known}
            elif len(known):
                row |= flat({measure: over_seeds(known[measure].to_numpy())})
        found.append(row)
    columns = [*keys, "runs", *(column for measure in wanted for column in _columns(measure))]
    return pd.DataFrame(found, columns=columns)


def pareto_front(points: pd.DataFrame, up: str, down: str) -> pd.DataFrame:
    """Those of `points` that no other beats: none has as much of `up` and as little of `down`, and more or less of one
    of them. In the order of `down`; a row that lacks one of the two is not on the front."""
    known = points.dropna(subset=[up, down])
    more, less = known[up].to_numpy(np.float64), known[down].to_numpy(np.float64)
    no_worse = (more >= more[:, None]) & (less <= less[:, None])  # [i, j]: j than i
    better = (more > more[:, None]) | (less < less[:, None])
    return known[~(no_worse & better).any(axis=1)].sort_values(down)


def reward_gap(frame: pd.DataFrame) -> tuple[pd.Series, str]:
    """How much more the trained reward has gained than the held-out ones, for each row, and in which unit.

    In within-prompt standard deviations of the start (`overoptimization/unexplained`), where all finished runs have
    that.
    Else in standard deviations over the finished runs: each reward less its mean, divided by its deviation, trained
    minus held-out; that compares the runs of one sweep with each other and says nothing of any of them alone.
    """
    done = frame["status"] == "finished"
    if "overoptimization/unexplained" in frame and frame.loc[done, "overoptimization/unexplained"].notna().all():
        return frame["overoptimization/unexplained"], "within-prompt standard deviations of the start's scores"
    of = measures(frame)
    if of.trained is None or of.held_out is None:
        return pd.Series(np.nan, frame.index), "standard deviations over the sweep"
    among = frame.loc[done, [of.trained, of.held_out]]
    standard = (frame[[of.trained, of.held_out]] - among.mean()) / among.std(ddof=0).replace(0, np.nan)
    return standard[of.trained] - standard[of.held_out], "standard deviations over the sweep"


def described(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A configuration in the words of the swept `keys`: "reward_scale 2, t_law uniform". What the row lacks is passed
    over; one that lacks all is "the recipe"."""
    said = short(keys)
    return ", ".join(f"{said[key]} {plain(row[key])}" for key in keys if not pd.isna(row[key])) or "the recipe"


def short(keys: Sequence[str]) -> dict[str, str]:
    """Dotted keys -> their last words, where those tell them apart; "objective.name" is "objective"."""
    last: dict[str, str] = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    return {key: word if list(last.values()).count(word) == 1 else key for key, word in last.items()}


def plain(value: Any) -> str:
    """A cell for people: numbers in four digits, nothing for NaN."""
    if isinstance(value, (bool, np.bool_, str)):
        return str(value)
    return "" if pd.isna(value) else f"{value:.4g}"


def estimate_text(row: Mapping[str, Any], measure: str) -> str:
    """`value [low, high]` of a row, `value` where it has no interval, nothing where it has no value."""
    if pd.isna(row.get(measure)):
        return ""
    value, low, high = row[measure], row.get(f"{measure}.low", np.nan), row.get(f"{measure}.high", np.nan)
    return plain(value) if pd.isna(low) else str(Estimate(value, low, high, int(row[f"{measure}.n"])))


def ran_with(journal: Iterable[Mapping[str, Any]]) -> str:
    """The commits that a run was started and gone on with, joined by "+"; "unknown" if it never had one."""
    commits = [tags.get(CODE_COMMIT, tags.get(COMMIT)) for tags in start_tags(journal)]
    return "+".join(dict.fromkeys(filter(None, commits))) or "unknown"


def start_tags(journal: Iterable[Mapping[str, Any]]) -> list[dict[str, str]]:
    """The tags that a run was started with, and gone on with, in order."""
    return [record["start"].get("tags", {}) for record in journal if "start" in record]


def _run(folder: Path) -> dict[str, Any]:
    records: list[dict[str, Any]] = []
    for record in read_run(folder):
        if "back_to" in record:  # what came after that step has been left
            records = [kept for kept in records if kept.get("step", 0) <= record["back_to"]]
        records.append(record)
    last: dict[str, Any] = next((record for record in reversed(records) if record.keys() & {"start", "finish"}), {})
    torn = "its journal has no end, and may have been cut or deleted" if (folder / "metrics.json").exists() else None
    measured = [record for record in records if "metrics" in record]
    row: dict[str, Any] = {
        "run": str(folder),
        "status": {"FINISHED": "finished", "FAILED": "failed"}.get(str(last.get("finish")), "unfinished"),
        "reason": last.get("reason") if "finish" in last else torn,
        "commit": ran_with(records),
        "step": max((record["step"] for record in measured), default=0),
        "alarm": min((record["step"] for record in records if record.get("event") == "overoptimization"), default=np.nan),
        **load_run(folder).to_params(),
    }
    for record in measured:
        row |= record["metrics"]
    for name in ("metrics.json", "examination.json", "evaluation.json"):  # the second is what version 0.1 wrote
        if (file := folder / name).exists():
            try:
                found = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise UserError(f"{file}: not JSON: {error}") from None
            if not isinstance(found, dict):
                raise UserError(f"{file}: should be metrics by name, got {found!r}")
            row |= {renamed(key): value for key, value in found.items()}
    return row


def _reward(column: str | None) -> str:
    return str(column).partition("/")[2]


def _columns(measure: str) -> list[str]:
    return [measure, f"{measure}.low", f"{measure}.high", f"{measure}.n"]
