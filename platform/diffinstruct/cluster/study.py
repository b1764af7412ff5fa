"""A question put to many trials: named arms of one recipe, each with several training seeds, and a table over seeds.

What an experiment that takes hours has found must outlive its machine. A finished trial adds its row to a CSV file that is
kept with the code, and a trial whose row is there is not run again. The same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from diffinstruct import tracking
from diffinstruct.cluster.sweep import Examine, Point, SweepError, changed, sweep
from diffinstruct.evaluation import Summary, markdown
from diffinstruct.experiment import Experiment, UserError, load
from diffinstruct.results import KEY, Rows, by_seed


@dataclass(frozen=True)
class Answer:
    """rows: all trials. table: arm -> measure -> figure over seeds. text: the file that says it."""

    base: Experiment
    rows: pd.DataFrame
    table: dict[str, Summary]
    text: Path

    def say(self, text: str) -> None:
        """Print, and write below what was said before."""
        print(text)
        with self.text.open("a") as file:
            file.write(f"{text}\n")

    def publish(self, *figures: Path) -> None:
        """Table, rows and figures into a run of MLflow's."""
        name, uri = self.text.stem, tracking.tracking_uri(self.base.tracking.uri, Path(self.base.runs))
        tracking.publish(uri, self.base.tracking.experiment, name, self.text, self.text.with_suffix(".csv"), *figures)


SMOKE = {"steps": 2, "global_batch_size": 8, "logging.every": 1, "logging.grid_prompts": 2}


@dataclass(frozen=True)
class Study:
    """arms: name -> what it changes of `recipe`. measures: column of a trial's row -> what the table calls it. rows: the CSV
    file of finished trials; its name is the study's."""

    question: str
    recipe: Path
    arms: Mapping[str, Point]
    seeds: Sequence[int]
    measures: Mapping[str, str]
    examine: Examine
    rows: Path

    def main(self) -> Answer | None:
        """The command line of an experiment: run what is missing; with every row there, print the table and leave it beside the
        rows. None while rows are missing."""
        parser = argparse.ArgumentParser(description=self.question, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--smoke", action="store_true", help="first and last arm, one seed, 2 steps")
        parser.add_argument("--trials", type=int, metavar="N", help="run at most N of those that are missing")
        asked = parser.parse_args()
        try:
            return self.smoke() if asked.smoke else self.answer(asked.trials)
        except (UserError, SweepError) as error:
            print(error, file=sys.stderr)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # the sweep has said what is unfinished

    def answer(self, most: int | None = None) -> Answer | None:
        base = changed(load(self.recipe), {"name": self.rows.stem})
        return self._answer(base, Rows(self.rows), self.arms, self.seeds, most)

    def smoke(self) -> Answer | None:
        base = changed(load(self.recipe), {"name": f"{self.rows.stem}-smoke", **SMOKE})
        first, *_, last = self.arms
        arms = {name: {k: v for k, v in self.arms[name].items() if k not in SMOKE} for name in (first, last)}
        return self._answer(base, Rows(_folder(base) / self.rows.name), arms, self.seeds[:1], None)

    def _answer(
        self, base: Experiment, rows: Rows, arms: Mapping[str, Point], seeds: Sequence[int], most: int | None
    ) -> Answer | None:
        frame = complete(rows, base, arms, seeds, _folder(base), self.examine, most)
        if frame is None:
            print("trials are missing: the same command goes on")
            return None
        table = by_seed(frame, "arm", [*self.measures])
        named = {arm: {self.measures[key]: figure for key, figure in of.items()} for arm, of in table.items()}
        answer = Answer(base, frame, table, rows.path.with_suffix(".md"))
        answer.text.unlink(missing_ok=True)
        answer.say(markdown(named, "training seeds (Student's); prompts and noise are the same for all"))
        return answer


def complete(
    rows: Rows,
    base: Experiment,
    arms: Mapping[str, Point],
    seeds: Sequence[int],
    folder: Path,
    examine: Examine,
    most: int | None = None,
) -> pd.DataFrame | None:
    """Run the trials, every arm with every seed, that have no row yet, `most` of them at most; all rows, or None while some are
    missing. A row has `arm`, `seed`, and what the trial's own row has but for its folder."""
    named = {f"{arm}, seed {seed}": (arm, seed) for seed in seeds for arm in arms}
    missing = rows.missing(named)
    todo = missing[:most]

    def add(i: int, row: dict[str, Any]) -> None:
        arm, seed = named[todo[i]]
        rows.add(todo[i], {"arm": arm, "seed": seed} | {key: value for key, value in row.items() if key not in ("run", "seed")})

    print(f"{rows.path}: {len(named) - len(missing)} of {len(named)} trials are there", flush=True)
    if todo:
        sweep(base, [{**arms[named[trial][0]], "seed": named[trial][1]} for trial in todo], folder, examine, add)
    return None if rows.missing(named) else rows.read().set_index(KEY).loc[list(named)].reset_index()


def _folder(base: Experiment) -> Path:
    return Path(base.runs).absolute() / base.name
