"""The trials of a sweep by number, and one trial's process."""

from __future__ import annotations

import hashlib
import itertools
import json
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ray import tune

from diffinstruct.cluster.failures import close
from diffinstruct.cluster.reward_pool import RewardPool
from diffinstruct.cluster.tasks import in_tasks
from diffinstruct.cluster.train import fit
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import nearest_key
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.reports.frames import short
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.signals import Paused, Signal
from diffinstruct.sweeps.criterion import SelectionCriterion
from diffinstruct.sweeps.points import DRAWN, Optuna, Point, changed, check_domains, values_of
from diffinstruct.tracking.journal import Parent, add_evaluation
from diffinstruct.tracking.records import MetricsRecord, json_lines, records

SHARED = "is the same in all trials of a sweep, because they share their reward actors"
LISTEN = 0.5  # seconds between two looks into a trial's journal

EvaluateRun = Callable[[Experiment, Path], Mapping[str, float]]
"""(experiment, folder of its finished run) -> metrics for its row."""


class Trials:
    """The trials of a sweep by number: what each changes, and where its run is.

    Raises UserError for points that do not fit `base` or each other.
    """

    def __init__(self, base: Experiment, points: Sequence[Point] | Optuna, folder: Path, evaluate: EvaluateRun | None) -> None:
        self.base, self.points, self.folder, self.evaluate = base, points, folder, evaluate
        self.ledger = folder / "trials.jsonl"
        self.known: dict[int, tuple[Point, str]] = {}  # number -> point, name of the run's folder
        listed = [] if isinstance(points, Optuna) else list(points)
        self.count = points.trials if isinstance(points, Optuna) else len(listed)
        if not isinstance(self.count, int) or self.count < 1:
            raise UserError(f"sweep: should have one trial or more, got {self.count!r}")
        if isinstance(points, Optuna):
            check_domains(points.space)
            self.check_space(points.space, {})
        for i, listed_point in enumerate(listed):
            if not isinstance(listed_point, Mapping):
                raise UserError(f"sweep: point {i} should be a mapping of dotted keys, got {listed_point!r}")
            point = {key: value.item() if isinstance(value, np.generic) else value for key, value in listed_point.items()}
            experiment = self.checked(point)
            if experiment.config_hash in (run for _, run in self.known.values()):
                raise UserError(f"sweep: two trials have the same configuration, the second is {dict(point)}")
            self.known[i] = (point, experiment.config_hash)

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes what it holds to disk: no place for a tracking server's password."""
        return {**vars(self), "base": self.base.without_secrets()}

    def checked(self, point: Point) -> Experiment:
        """The experiment of a point. Raises UserError where it is none, or where trials cannot differ."""
        for key in point:
            if key.split(".")[0] == "cluster" or key == "reference.model":
                raise UserError(f"{key}: {SHARED}")
            touched = {name for name in self.base.to_params() if f"{name}.".startswith(f"{key}.")}  # it may be a section
            if touched and touched.isdisjoint(self.base.identity):
                raise UserError(f"{key}: cannot be varied, all trials of a sweep share it")
        experiment = changed(self.base, point)
        if set(experiment.rewards.names) != set(self.base.rewards.names):
            raise UserError(f"rewards: which rewards there are {SHARED}")
        return experiment

    def check_space(self, space: Mapping[str, Any], point: Point) -> None:
        """Raises UserError where none of DRAWN random points is valid; some invalid ones are allowed. Their values are
        `point`'s but for those of `space`, from which a search or a scheduler draws."""
        known = self.base.to_params()
        if unknown := next((key for key in space if key not in known), None):
            raise UserError(f"{unknown}: unknown key{nearest_key(unknown, known)}")
        values, random, errors = {key: values_of(domain) for key, domain in space.items()}, np.random.RandomState(0), []
        for _ in range(DRAWN):
            try:
                self.checked({**point, **{key: some[random.randint(len(some))] for key, some in values.items()}})
            except UserError as error:
                errors.append(error)
        if len(errors) == DRAWN:
            raise errors[0]

    @property
    def experiments(self) -> list[Experiment]:
        """Those that are known beforehand; the base of a search."""
        return [self.experiment(i) for i in self.known] or [self.base]

    @property
    def varied(self) -> dict[str, Any]:
        """Each key that the points change, and the values that it takes."""
        if isinstance(self.points, Optuna):
            return {key: domain.domain_str for key, domain in self.points.space.items()}
        values: dict[str, list[Any]] = {}
        for key, value in itertools.chain.from_iterable(point.items() for point in self.points):
            if value not in values.setdefault(key, []):
                values[key].append(value)
        return values

    def name(self, point: Point) -> str:
        """A trial's in MLflow: what tells it from the others."""
        varying = {key for key, values in self.varied.items() if isinstance(values, str) or len(values) > 1}
        told = {key: value for key, value in point.items() if key in varying} or point
        said = short([*told])
        return " ".join(f"{said[key]}={value}" for key, value in told.items()) or "base"

    def open(self, keeps: bool) -> None:
        """Make the folder, and read what the sweep has done in an earlier life, if it `keeps` a ledger."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not keeps:
            return
        asked = self.varied if isinstance(self.points, Optuna) else [dict(point) for point in self.points]
        search = json.dumps([self.base.config_hash, asked], sort_keys=True)
        first = {"search": hashlib.sha256(search.encode()).hexdigest()[:12]}
        found = next((line for _, _, line in json_lines(self.ledger)), None)
        if found is None:
            self._write(first)
        elif found != first:
            raise UserError(f"{self.ledger}: is of another search; this one needs a folder of its own")
        self.read()

    def read(self) -> None:
        for _, _, line in json_lines(self.ledger):
            if "trial" in line:
                self.known[line["trial"]] = (line["point"], line["run"])

    def add(self, i: int, point: Point, run: str) -> None:
        """From now on trial `i` is this one, also for the sweep's next life."""
        self.known[i] = (point, run)
        self._write({"trial": i, "point": dict(point), "run": run})

    def _write(self, line: dict[str, Any]) -> None:
        with self.ledger.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def number(self, tune_id: str, config: Mapping[str, Any]) -> int:
        """Our number of Tune's trial, kept in a file because PBT copies the donor's configuration, number included."""
        known = self.folder / "ray" / f"{tune_id}.number"
        if not known.exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(str(config["trial"]), encoding="utf-8")
        return int(known.read_text(encoding="utf-8"))

    def point(self, i: int) -> Point:
        return self.known[i][0]

    def run_folder(self, i: int) -> Path:
        return self.folder / self.known[i][1]

    def experiment(self, i: int) -> Experiment:
        return changed(self.base, self.point(i))

    def finished(self, i: int) -> bool:
        """Whether trial `i` has its row: the last file that a run writes is metrics.json, a trial evaluation.json."""
        if i not in self.known or not (self.run_folder(i) / "metrics.json").exists():
            return False
        return not self.evaluate or evaluation_file(self.run_folder(i)).exists()

    def row(self, i: int) -> dict[str, Any]:
        """A finished run: its point in the space, its folder, its last metrics, its evaluation."""
        row: dict[str, Any] = {**self.point(i), "run": str(self.run_folder(i))}
        for file in (self.run_folder(i) / "metrics.json", evaluation_file(self.run_folder(i))):
            if file.exists():
                row |= json.loads(file.read_text(encoding="utf-8"))
        return row

    def table(self) -> pd.DataFrame:
        """The rows of those that have finished."""
        return pd.DataFrame(self.row(i) for i in range(self.count) if self.finished(i))


@dataclass(frozen=True)
class Shared:
    """What all trials of a sweep share: reward actors, the cluster's address, the parent run, the criterion."""

    pool: RewardPool | None
    where: str
    parent: str | None
    criterion: SelectionCriterion | None


@dataclass
class Trial:
    """One trial in a process of its own, from its configuration to its last report."""

    trials: Trials
    config: dict[str, Any]
    shared: Shared
    population: bool
    started_in: str

    def run(self) -> None:
        self.number = i = self.trials.number(tune.get_context().get_trial_id(), self.config)
        point = {key: value for key, value in self.config.items() if key != "trial"}
        self.trials.read()  # since this was sent here, trials may have been added
        if self.population:
            self._take_over_weights(i, point)
        self.folder, experiment = self.trials.run_folder(i), self.trials.experiment(i)
        if signals.requested(self.trials.folder) == Signal.PAUSE:
            raise Paused("the sweep pauses before this trial has begun")
        report: dict[str, float] = {}
        for report in self._train(experiment, self.trials.name(point)):
            self._report(report)
        if self.trials.evaluate and not (file := evaluation_file(self.folder)).exists():
            evaluate = partial(self.trials.evaluate, experiment, self.folder)
            (evaluation,) = map(dict, in_tasks([evaluate], experiment, self.started_in))
            values = {key: value for key, value in evaluation.items() if key.rpartition(".")[2] not in ("low", "high", "n")}
            step = self.trials.row(i)["step"]
            add_evaluation(self.folder, experiment.tracking.uri, step, values, experiment.tracking.also)
            file.with_suffix(".tmp").write_text(json.dumps(evaluation, indent=2) + "\n", encoding="utf-8")
            file.with_suffix(".tmp").replace(file)
        metrics = report | {k: v for k, v in self.trials.row(i).items() if isinstance(v, int | float)}
        if report or not self.population:  # weights that were taken over at the last step were not looked at again
            self._require_metrics(metrics)
        self._report(metrics)

    def _train(self, experiment: Experiment, name: str) -> Iterator[dict[str, float]]:
        """The reports of the run's journal, while it is written; those of a finished run from first to last."""
        reports, errors = Reports(self.folder / "journal.jsonl"), []

        def train() -> None:
            try:
                fit(experiment, self.folder, self.shared.pool, self.shared.where, Parent(self.shared.parent, name))
            except BaseException as error:
                errors.append(error)

        training = threading.Thread(target=train, daemon=True)
        if not (self.folder / "metrics.json").exists():
            training.start()
        while training.is_alive():
            yield from reports.new()
            if signals.requested(self.trials.folder) == Signal.PAUSE:
                signals.request(self.folder, Signal.PAUSE)
            training.join(LISTEN)
        yield from reports.new()
        if errors:
            raise errors[0]

    def _require_metrics(self, metrics: Mapping[str, float]) -> None:
        """Raises UserError where the end has come without a metric that the sweep looks for."""
        if (criterion := self.shared.criterion) is None:
            return
        asked = [criterion.maximize, *[criterion.minimize] * isinstance(self.trials.points, Optuna)]
        bounds = [key for key in (*criterion.floors, *criterion.ceilings) if not key.startswith("overoptimization/")]
        if missing := next((key for key in asked + bounds if key not in metrics), None):
            raise UserError(f"criterion: no metric {missing!r} came of this trial{did_you_mean(missing, metrics)}")

    def _report(self, metrics: dict[str, float]) -> None:
        """Tell Tune. What a scheduler compares is not there before the first look."""
        if (criterion := self.shared.criterion) is None or criterion.maximize not in metrics:
            return
        with tempfile.TemporaryDirectory() as folder:
            if self.population:  # whoever takes over this trial's weights finds them by this; Tune only passes it on
                (Path(folder) / "run.json").write_text(
                    json.dumps({"trial": self.number, "run": self.folder.name}), encoding="utf-8"
                )
            checkpoint = tune.Checkpoint.from_directory(folder) if self.population else None
            tune.report({**metrics, "score": criterion.score(metrics)}, checkpoint=checkpoint)

    def _take_over_weights(self, i: int, point: Point) -> None:
        """Find out whether this trial goes on as itself, or takes over another's weights under a new configuration."""
        from diffinstruct.training.resume import take_over

        if (told := tune.get_checkpoint()) is None:
            return
        with told.as_directory() as folder:
            donor = json.loads((Path(folder) / "run.json").read_text(encoding="utf-8"))
        if donor["trial"] == i and dict(self.trials.point(i)) == point:
            return
        before, experiment = self.trials.run_folder(i), changed(self.trials.base, point)
        lineage = hashlib.sha256(f"{before.name} {donor['run']}".encode()).hexdigest()[:6]
        run = f"{experiment.config_hash}-{lineage}"
        step = take_over(experiment, self.trials.folder / run, self.trials.folder / donor["run"])
        close(before, self.trials.base.tracking, Paused(f"went on as {run} with the weights of {donor['run']} at step {step}"))
        self.trials.add(i, point, run)


class Reports:
    """A journal as Tune wants it: a report for each logged step, with the metrics of the last probe beside its own."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.offset = journal, 0
        self.probed: dict[str, float] = {}

    def new(self) -> Iterator[dict[str, float]]:
        """What has been written since."""
        for _, end, record in records(self.journal, self.offset):
            self.offset = end
            if not isinstance(record, MetricsRecord):
                continue
            metrics = record.metrics
            probed = {key: value for key, value in metrics.items() if key.startswith("overoptimization/")}
            self.probed |= probed
            if len(metrics) > len(probed):
                yield {"step": record.step, **metrics, **self.probed}


def evaluation_file(folder: Path) -> Path:
    """A run's evaluation; version 0.1 called it examination.json."""
    old = folder / "examination.json"
    return old if old.exists() else folder / "evaluation.json"
