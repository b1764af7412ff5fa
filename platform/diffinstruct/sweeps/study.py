"""A question put to many trials: named arms of one recipe, each with several training seeds, and a table over seeds.

What an experiment that takes hours has found must outlive its machine. A finished trial adds its row to a CSV file that
is kept with the code, and a trial whose row is there is not run again, whichever of the recipe's studies ran it. The
same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from diffinstruct.config.addresses import tracking_uri
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import refuse_passing_copy
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.reports.frames import KEY, TrialRows, markdown, measures, points, ran_with, swept
from diffinstruct.run_folder.signals import EXIT_PAUSED, Paused
from diffinstruct.statistics import Summary, by_seed, paired_by_seed, seed_noise
from diffinstruct.sweeps.points import Point, changed
from diffinstruct.sweeps.trials import EvaluateRun
from diffinstruct.sweeps.tune import SweepError, sweep
from diffinstruct.tracking.journal import publish
from diffinstruct.tracking.records import read_journal


@dataclass(frozen=True)
class StudyResult:
    """rows: all trials, with their `arm`. table: arm -> measure -> estimate over seeds. text: the file that says it."""

    base: Experiment
    rows: pd.DataFrame
    table: dict[str, Summary]
    text: Path

    def say(self, text: str) -> None:
        """Print, and write below what was said before."""
        print(text)
        with self.text.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def differences(self, recipe: str, measures: Mapping[str, str]) -> None:
        """Each arm minus `recipe` in `measures` (column -> what it is called), paired over seeds; the intervals come
        from the seeds' standard deviation pooled over arms, since the few that one arm has say little. One seed says
        nothing."""
        if self.rows["seed"].nunique() < 2:
            return
        noise = {key: seed_noise(self.rows, "arm", key) for key in measures}
        told = ", ".join(f"{measures[key]} {sigma:.3g}" for key, (sigma, _) in noise.items())
        freedom = min(of for _, of in noise.values())
        self.say(f"- noise of training seeds, standard deviation: {told} ({freedom} degrees of freedom)")
        for arm in (arm for arm in self.table if arm != recipe):
            paired = {key: paired_by_seed(self.rows, "arm", arm, recipe, key, of) for key, of in noise.items()}
            self.say(f"- {arm}, minus {recipe}: " + ", ".join(f"{measures[key]} {value}" for key, value in paired.items()))

    def draw(self, x: str | None = None, y: str | None = None) -> None:
        """Draw and publish the Pareto front of the arms, and heat maps over two keys of the configuration."""
        from diffinstruct.reports import plots

        frame = self.rows.rename(columns={KEY: "run"}).assign(status="finished")
        of, keys = measures(frame), swept(frame)
        drawn = [self.text.with_name(f"{self.text.stem}_pareto.png")]
        plots.pareto(points(frame), of, keys, drawn[0])
        if x and y:
            drawn.append(self.text.with_name(f"{self.text.stem}_heat_maps.png"))
            plots.heat_maps(frame, of, x, y, drawn[-1])
        self.publish(*drawn)
        for path in drawn:
            print(f"figure {path}")

    def publish(self, *figures: Path) -> None:
        """Table, rows and figures into a run of MLflow's."""
        uri = tracking_uri(self.base.tracking.uri, Path(self.base.output_dir))
        rows = self.text.with_suffix(".csv")
        self.rows.to_csv(rows, index=False)
        publish(uri, self.base.tracking.experiment, self.text.with_suffix(""), self.text, rows, *figures)


SMOKE = {"steps": 2, "global_batch_size": 4, "logging.every": 1, "logging.grid_prompts": 2}
SMOKE_EVERY = 30  # prompts of the evaluation, which takes longer than two steps


@dataclass(frozen=True)
class Study:
    """arms: name -> what it changes of `recipe`. measures: column of a trial's row -> what the table calls it. evaluate:
    as a sweep's; with `every=n` it is content with every n-th prompt. rows: the CSV file of the recipe's finished
    trials, which its studies share."""

    name: str
    question: str
    recipe: Path
    arms: Mapping[str, Point]
    seeds: Sequence[int]
    measures: Mapping[str, str]
    evaluate: Callable[..., Mapping[str, float]]
    rows: Path

    def main(self) -> StudyResult | None:
        """The command line of an experiment: run what is missing; with every row there, print the table and leave it in
        the folder of the runs. None while rows are missing."""
        parser = argparse.ArgumentParser(description=self.question, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument(
            "--smoke", action="store_true", help="first and last arm, 1 seed, 2 steps, evaluated on few prompts"
        )
        parser.add_argument("--trials", type=int, metavar="N", help="run at most N of those that are missing")
        asked = parser.parse_args()
        if asked.trials is not None and asked.trials < 0:
            parser.error(f"--trials: should be 0 or more, got {asked.trials}")
        try:
            return self.smoke() if asked.smoke else self.answer(asked.trials)
        except (UserError, SweepError) as error:
            print(error, file=sys.stderr)
            raise SystemExit(2 if isinstance(error, UserError) else 1) from None
        except Paused:
            raise SystemExit(EXIT_PAUSED) from None
        except KeyboardInterrupt:
            raise SystemExit(130) from None  # the sweep has said what is unfinished

    def smoke(self) -> StudyResult | None:
        base = changed(load(self.recipe), {"name": f"{self.name}-smoke", **SMOKE})
        first, *_, last = [*self.arms] * 2  # there may be one
        arms = {name: {k: v for k, v in self.arms[name].items() if k not in SMOKE} for name in (first, last)}
        evaluate = partial(self.evaluate, every=SMOKE_EVERY)
        small = replace(self, arms=arms, seeds=self.seeds[:1], rows=_folder(base) / self.rows.name, evaluate=evaluate)
        return small.answer(base=base)

    def answer(self, most: int | None = None, base: Experiment | None = None) -> StudyResult | None:
        """Run at most `most` of the missing trials of `base`, by default the recipe; the table, once all rows are there."""
        base, rows = base or load(self.recipe), TrialRows(self.rows)
        frame = run_missing_trials(rows, base, self.arms, self.seeds, _folder(base), self.evaluate, most)
        if frame is None:
            print("trials are missing: the same command goes on")
            return None
        for measure in self.measures:
            if (absent := frame[measure].isna()).any():
                raise UserError(
                    f"{rows.path}: no {measure} for {frame[KEY][absent].iloc[0]}; take that row out to run it again"
                )
        unsaid = {key: value for key, value in base.to_params().items() if key in frame and value is not None}
        frame = frame.fillna(unsaid)  # what a row does not change is as in the recipe
        table = by_seed(frame, "arm", [*self.measures])
        named = {arm: {self.measures[key]: estimate for key, estimate in of.items()} for arm, of in table.items()}
        answer = StudyResult(base, frame, table, _folder(base) / f"{self.name}.md")
        answer.text.parent.mkdir(parents=True, exist_ok=True)
        answer.text.unlink(missing_ok=True)
        answer.say(markdown(named, "training seeds (Student's); prompts and noise are the same for all"))
        return answer


def run_missing_trials(
    rows: TrialRows,
    base: Experiment,
    arms: Mapping[str, Point],
    seeds: Sequence[int],
    folder: Path,
    evaluate: EvaluateRun,
    most: int | None = None,
) -> pd.DataFrame | None:
    """Run the trials, every arm with every seed, that have no row yet, `most` of them at most; all rows, or None while
    some are missing. A row has the trial's own but for its folder, and its `arm`."""
    points: dict[str, Point] = {}
    wanted = []
    for seed, (arm, changes) in itertools.product(seeds, arms.items()):
        point = {**changes, "seed": seed}
        wanted.append((arm, trial_name(point)))
        points[trial_name(point)] = point
    missing = rows.missing(points)
    todo = missing[:most]

    def add(i: int, row: dict[str, Any]) -> None:
        code = ran_with(read_journal(row["run"]))
        rows.add(todo[i], {"commit": code, **{key: value for key, value in row.items() if key != "run"}})

    refuse_passing_copy("rows", rows.path.absolute())
    print(f"{rows.path}: {len(points) - len(missing)} of {len(points)} trials are there", flush=True)
    if todo:
        sweep(base, [points[trial] for trial in todo], folder, evaluate, add)
    if rows.missing(points):
        return None
    found = rows.read().set_index(KEY).loc[[trial for _, trial in wanted]].reset_index()
    return found.copy().assign(arm=[arm for arm, _ in wanted])  # a copy in one piece: rows have hundreds of columns


def trial_name(point: Point) -> str:
    """The changes of a recipe, as its rows name them: unchanged when the recipe gains keys."""
    return " ".join(f"{key}={value}" for key, value in sorted(point.items()))


def _folder(base: Experiment) -> Path:
    return Path(base.output_dir).absolute() / base.name
