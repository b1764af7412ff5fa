"""A sweep: one Experiment made into many, each a run of its own under Ray Tune, with one set of reward actors for all.

    <sweep>/<id>/           a trial's run; id is its configuration's hash, longer if it took over another trial's weights
    <sweep>/trials.jsonl    what no list of points can tell again: what Optuna asked for, who took over whose weights
    <sweep>/journal.jsonl   the parent run's, as in every run's folder; table.csv, report.html: what came of it

Tune decides which trial runs when. All that it hears of a trial is the trial's journal, so a trial that has ended in an earlier
life of the sweep can be told once more, and Tune's own state is never read.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
import pandas as pd
import ray
from pydantic import ValidationError
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain

from diffinstruct import orders, tracking
from diffinstruct.aim import Aim
from diffinstruct.cluster.rewards import ray_options, reward_pool, stand_in
from diffinstruct.cluster.train import (
    HEAD,
    attached,
    check_fits,
    close,
    embed,
    final_error,
    fit,
    most_nodes,
    warn_of_passing_copy,
)
from diffinstruct.experiment import Experiment, UserError, did_you_mean
from diffinstruct.orders import Paused
from diffinstruct.preflight import check_inputs
from diffinstruct.results import short
from diffinstruct.tracking import Parent, Tracker, records
from diffinstruct.watch import FIGURES

if TYPE_CHECKING:
    from diffinstruct.jury import RewardService

DRIVER = {HEAD: 0.001}
"""What a trial's own process asks for: a slot that every cluster has, on its head. If it took a CPU, trials could hold all of
them and wait for ever for their workers'."""

SHARED = "is the same in all trials of a sweep, because they share their reward actors"
DRAWN = 30  # points by which a space is checked
LISTEN = 0.5  # seconds between two looks into a trial's journal

Point = Mapping[str, Any]
"""What one trial changes: dotted key -> value."""

Space = Mapping[str, Domain]
"""Dotted key -> where its values come from: `tune.loguniform(0.1, 10)`, `tune.choice([...])`."""

Examine = Callable[[Experiment, Path], Mapping[str, float]]
"""(experiment, folder of its finished run) -> figures for its row."""

OnRow = Callable[[int, dict[str, Any]], None]
"""(number of the trial, its row), in the driver."""


class SweepError(RuntimeError):
    """Trials that failed, one line each; the others are in the sweep's folder, whole."""


def grid(space: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values of dotted keys. Raises UserError where the values of a key are no list."""
    for key, values in space.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"{key}: a grid takes a list of values, got {values!r}")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def sample(space: Space, n: int, seed: int = 0) -> list[Point]:
    """`n` different points by chance, the same ones for the same seed. Raises UserError for a space that has not so many."""
    _check_domains(space)
    random, points = np.random.RandomState(seed), list[Point]()
    for _ in range(100 * n):
        if len(points) == n:
            break
        if (point := {key: domain.sample(random_state=random) for key, domain in space.items()}) not in points:
            points.append(point)
    if len(points) < n or n < 1:
        raise UserError(f"sample: asked for {n} points, found {len(points)} that differ")
    return points


def _check_domains(space: Space) -> None:
    for key, domain in space.items():
        if not isinstance(domain, Domain):
            raise UserError(f"{key}: should be a domain of Tune's, as tune.uniform(0, 1) or tune.choice([...]), got {domain!r}")


@dataclass(frozen=True)
class Optuna:
    """`trials` points that Optuna's TPE sampler asks for, each knowing the results before it: the aim's `up` as large and its
    `down` as small as can be, within the aim's bounds. With one trial at a time the same seed gives the same points,
    interrupted or not; with several they depend on which ends first."""

    space: Space
    trials: int
    seed: int = 0


def sweep(
    base: Experiment,
    points: Sequence[Point] | Optuna,
    folder: Path,
    examine: Examine | None = None,
    on_row: OnRow = lambda i, row: None,
    scheduler: TrialScheduler | None = None,
    aim: Aim | None = None,
) -> pd.DataFrame:
    """Run `base` once for each of `points`, as child runs of one MLflow run.

    Returns one row a trial: its point, "run" (its folder, below `folder`), its last metrics, and what `examine` makes of it, in
    a task of a worker's size. The same call again goes on: finished trials are not run twice, others continue from their
    checkpoints, the same MLflow runs go on. `on_row` gets each row as soon as its trial has ended.
    All trials that are known beforehand are checked before the first one starts. They share the reward actors of `base`:
    weights may vary, and which rewards are held out, but neither their names nor reference.model nor what is asked of the
    cluster.

    scheduler: one of Tune's, with time_attr="step" and no metric of its own: it compares the aim's score. Trials that it ends
        early (ASHAScheduler) are finished runs of fewer steps. Trials that take over another's weights
        (PopulationBasedTraining) are several runs; the last one makes the row.
    Raises SweepError if any trial failed, after all have ended; Paused after SIGTERM, KeyboardInterrupt after Ctrl-C.
    """
    folder = folder.absolute()
    base = base.tracked_at(tracking.tracking_uri(base.tracking.uri, folder.parent))
    trials = Trials(base, points, folder, examine)
    if any(experiment.mirror for experiment in (base, *trials.experiments)):
        raise UserError("mirror: is for single runs; what a sweep's trials leave lies in the sweep's folder")
    if scheduler or isinstance(points, Optuna):
        aim = aim or Aim()
        _check_looks(trials, aim, scheduler)
    for experiment in {of.model_dump_json(include={"prompts", "rewards"}): of for of in trials.experiments}.values():
        check_inputs(experiment)
    warn_of_passing_copy(folder)

    with attached() as where:
        check_fits(base)
        for experiment in {of.model_dump_json(include={"prompts"}): of for of in trials.experiments}.values():
            embed(experiment)
        trials.open(keeps=isinstance(points, Optuna) or isinstance(scheduler, PopulationBasedTraining))
        orders.withdraw(folder)
        tags = {"sweep": folder, "trials": trials.count}
        parent = Tracker(base.tracking.uri, base.tracking.experiment, folder.name, folder, trials.varied, tags)
        print(f"sweep {folder}  {trials.count} trials  tracking {parent.url}  {where}\n{placement(base)}", flush=True)
        status, reason = "KILLED", None
        try:
            with (
                reward_pool(base) if base.reward_actors else nullcontext() as pool,
                orders.on_sigterm(lambda: orders.give(folder, orders.PAUSE)),
            ):
                failures = _tuned(trials, pool, where, parent.run_id, scheduler, aim, on_row)
            # Tune answers Ctrl-C by ending its trials and returning as if nothing had happened.
            unfinished = [i for i in range(trials.count) if i not in failures and not trials.finished(i)]
            paused = orders.given(folder) == orders.PAUSE
            why: BaseException = Paused(f"{len(unfinished)} of {trials.count} trials are unfinished in {folder}")
            for i in unfinished:
                if i in trials.known:
                    close(trials.run(i), trials.experiment(i), why if paused else KeyboardInterrupt())
            reason = "\n".join(f"{dict(trials.point(i))}: {error}" for i, error in sorted(failures.items()))
            status = "KILLED" if unfinished else "FAILED" if failures else "FINISHED"
            table = trials.table()
            table.to_csv(folder / "table.csv", index=False)
            parent.artifact(folder / "table.csv")
            if len(table):
                from diffinstruct.report import write

                write(folder, folder / "report.html")
                parent.artifact(folder / "report.html")
        finally:
            parent.finish(status, reason)
            shutil.rmtree(folder / "ray", ignore_errors=True)
    if unfinished:
        print(f"interrupted: {why}", flush=True)
        raise why if paused else KeyboardInterrupt
    if failures:
        raise SweepError(reason)
    return table


def _tuned(
    trials: Trials,
    pool: RewardService | None,
    where: str,
    parent: str | None,
    scheduler: TrialScheduler | None,
    aim: Aim | None,
    on_row: OnRow,
) -> dict[int, BaseException]:
    """Run what is missing under Tune; the errors of those that failed."""
    done = {i for i in range(trials.count) if trials.finished(i)}
    for i in sorted(done):
        on_row(i, trials.row(i))
    if len(done) == trials.count:
        return {}
    # A scheduler has to hear of finished trials, too: it judges the others by them.
    todo = [i for i in trials.known if scheduler or i not in done]
    started_in, population = os.getcwd(), isinstance(scheduler, PopulationBasedTraining)
    uri = trials.base.tracking.uri
    if population:  # Tune wants to hand out its points itself
        keys = trials.point(todo[0])
        told: dict[str, Any] = {key: tune.sample_from(partial(_value, trials, key)) for key in keys}
        handed_out: dict[str, Any] = {"param_space": {"trial": tune.grid_search(todo), **told}}
        searcher, samples = None, 1
    else:
        searcher = Asking(trials, aim) if aim and isinstance(trials.points, Optuna) else Listed(trials, todo)
        handed_out, samples = {}, trials.count

    def trial(config: dict[str, Any]) -> None:
        stand_in(started_in)
        trials.base = trials.base.tracked_at(uri)
        Trial(trials, config, pool, where, parent, aim, population, started_in).run()

    logging.getLogger("ray.tune.tune").setLevel(logging.ERROR)  # how to go on from Tune's own state, which is cleared away
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other would put its table in the place of our lines

    def stop(trial: Any) -> None:
        orders.give(trials.run(trials.number(trial.trial_id, trial.config)), orders.STOP)

    results = tune.Tuner(
        tune.with_resources(trial, DRIVER),
        **handed_out,
        tune_config=tune.TuneConfig(
            num_samples=samples,
            max_concurrent_trials=at_once(trials.base),
            search_alg=searcher,
            scheduler=Gentle(scheduler, stop) if scheduler else None,
            **({"metric": "score", "mode": "max"} if scheduler else {}),
        ),
        run_config=tune.RunConfig(
            name=uuid.uuid4().hex,
            storage_path=str(trials.folder / "ray"),
            verbose=0,
            callbacks=[Progress(trials, done, on_row)],
        ),
    ).fit()
    trials.read()
    errors = {}
    for result, of in zip(results, results._experiment_analysis.trials, strict=True):  # a result alone does not say whose it is
        if result.error:
            errors[trials.number(of.trial_id, of.config)] = final_error(result.error) or result.error
    return {i: error for i, error in errors.items() if not isinstance(error, Paused)}


def _value(trials: Trials, key: str, spec: Any) -> Any:
    """What the trial that Tune is making changes `key` to."""
    return trials.point(spec.config.trial)[key]


# -------------------------------------------------------------------------------------------------------- trials
class Trials:
    """The trials of a sweep by number: what each changes, and where its run is.

    Raises UserError for points that do not fit `base` or each other.
    """

    def __init__(self, base: Experiment, points: Sequence[Point] | Optuna, folder: Path, examine: Examine | None) -> None:
        self.base, self.points, self.folder, self.examine = base, points, folder, examine
        self.ledger = folder / "trials.jsonl"
        self.known: dict[int, tuple[Point, str]] = {}  # number -> point, name of the run's folder
        listed = [] if isinstance(points, Optuna) else list(points)
        self.count = points.trials if isinstance(points, Optuna) else len(listed)
        if not isinstance(self.count, int) or self.count < 1:
            raise UserError(f"sweep: should have one trial or more, got {self.count!r}")
        if isinstance(points, Optuna):
            _check_domains(points.space)
            self.check_space(points.space, {})
        for i, listed_point in enumerate(listed):
            if not isinstance(listed_point, Mapping):
                raise UserError(f"sweep: point {i} should be a mapping of dotted keys, got {listed_point!r}")
            point = {key: value.item() if isinstance(value, np.generic) else value for key, value in listed_point.items()}
            experiment = self.checked(point)
            if experiment.derived_id in (run for _, run in self.known.values()):
                raise UserError(f"sweep: two trials have the same configuration, the second is {dict(point)}")
            self.known[i] = (point, experiment.derived_id)

    def __getstate__(self) -> dict[str, Any]:
        """Tune writes what it holds to disk: no place for a tracking server's password."""
        return {**vars(self), "base": self.base.public()}

    def checked(self, point: Point) -> Experiment:
        """The experiment of a point. Raises UserError where it is none, or where trials cannot differ."""
        for key in point:
            if key.split(".")[0] == "cluster" or key == "reference.model":
                raise UserError(f"{key}: {SHARED}")
            if key.split(".")[0] in ("runs", "tracking", "name"):
                raise UserError(f"{key}: is the sweep's, its trials have the same")
        experiment = changed(self.base, point)
        if set(experiment.rewards.names) != set(self.base.rewards.names):
            raise UserError(f"rewards: which rewards there are {SHARED}")
        return experiment

    def check_space(self, space: Mapping[str, Any], point: Point) -> None:
        """Raises UserError where what a search or a scheduler may make of `point` never is an experiment. Now and then is no
        mistake: some values only go with some others."""
        known = self.base.to_params()
        if unknown := next((key for key in space if key not in known), None):
            raise UserError(f"{unknown}: unknown key{did_you_mean(unknown, known)}")
        values, random, errors = {key: _some_of(domain) for key, domain in space.items()}, np.random.RandomState(0), []
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
        search = json.dumps([self.base.derived_id, asked], sort_keys=True)
        first = {"search": hashlib.sha256(search.encode()).hexdigest()[:12]}
        found = next((line for _, _, line in records(self.ledger)), None)
        if found is None:
            self._write(first)
        elif found != first:
            raise UserError(f"{self.ledger}: is of another search; this one needs a folder of its own")
        self.read()

    def read(self) -> None:
        for _, _, line in records(self.ledger):
            if "trial" in line:
                self.known[line["trial"]] = (line["point"], line["run"])

    def add(self, i: int, point: Point, run: str) -> None:
        """From now on trial `i` is this one, also for the sweep's next life."""
        self.known[i] = (point, run)
        self._write({"trial": i, "point": dict(point), "run": run})

    def _write(self, line: dict[str, Any]) -> None:
        with self.ledger.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def number(self, tune_id: str, config: Mapping[str, Any]) -> int:
        """Ours, of a trial of Tune's. Its configuration has it at its first start only: one that takes over another's weights
        is given that one's configuration."""
        known = self.folder / "ray" / f"{tune_id}.number"
        if not known.exists():
            known.parent.mkdir(parents=True, exist_ok=True)
            known.write_text(str(config["trial"]))
        return int(known.read_text())

    def point(self, i: int) -> Point:
        return self.known[i][0]

    def run(self, i: int) -> Path:
        return self.folder / self.known[i][1]

    def experiment(self, i: int) -> Experiment:
        return changed(self.base, self.point(i))

    def finished(self, i: int) -> bool:
        """Whether trial `i` has its row: metrics.json is the last thing that a run writes, examination.json that of a trial."""
        files = ["metrics.json"] + ["examination.json"] * bool(self.examine)
        return i in self.known and all((self.run(i) / name).exists() for name in files)

    def row(self, i: int) -> dict[str, Any]:
        """A finished run: its point in the space, its folder, its last metrics, what was found on examination."""
        found: dict[str, Any] = {**self.point(i), "run": str(self.run(i))}
        for name in ("metrics.json", "examination.json"):
            if (self.run(i) / name).exists():
                found |= json.loads((self.run(i) / name).read_text())
        return found

    def table(self) -> pd.DataFrame:
        """The rows of those that have finished."""
        return pd.DataFrame(self.row(i) for i in range(self.count) if self.finished(i))


@dataclass
class Trial:
    """One trial in a process of its own, from its configuration to its last report."""

    trials: Trials
    config: dict[str, Any]
    pool: RewardService | None
    where: str
    parent: str | None
    aim: Aim | None
    population: bool
    started_in: str

    def run(self) -> None:
        self.number = i = self.trials.number(tune.get_context().get_trial_id(), self.config)
        point = {key: value for key, value in self.config.items() if key != "trial"}
        self.trials.read()  # since this was sent here, trials may have been added
        if self.population:
            self._join(i, point)
        self.folder, experiment = self.trials.run(i), self.trials.experiment(i)
        if orders.given(self.trials.folder) == orders.PAUSE:
            raise Paused("the sweep pauses before this trial has begun")
        report: dict[str, float] = {}
        for report in self._train(experiment, self.trials.name(point)):
            self._report(report)
        if self.trials.examine and not (examination := self.folder / "examination.json").exists():
            found = examine(self.trials.examine, experiment, self.folder, self.started_in)
            values = {key: value for key, value in found.items() if key.rpartition(".")[2] not in ("low", "high", "n")}
            tracking.add_examination(self.folder, experiment.tracking.uri, self.trials.row(i)["step"], values)
            examination.with_suffix(".tmp").write_text(json.dumps(found, indent=2) + "\n")
            examination.with_suffix(".tmp").replace(examination)
        figures = report | {k: v for k, v in self.trials.row(i).items() if isinstance(v, int | float)}
        if report or not self.population:  # weights that were taken over at the last step were not looked at again
            self._look_for(figures)
        self._report(figures)

    def _train(self, experiment: Experiment, name: str) -> Iterator[dict[str, float]]:
        """The reports of the run's journal, while it is written; those of a finished run from first to last."""
        reports, errors = Reports(self.folder / "journal.jsonl"), []

        def train() -> None:
            try:
                fit(experiment, self.folder, self.pool, self.where, Parent(self.parent, name))
            except BaseException as error:
                errors.append(error)

        training = threading.Thread(target=train, daemon=True)
        if not (self.folder / "metrics.json").exists():
            training.start()
        while training.is_alive():
            yield from reports.new()
            if orders.given(self.trials.folder) == orders.PAUSE:
                orders.give(self.folder, orders.PAUSE)
            training.join(LISTEN)
        yield from reports.new()
        if errors:
            raise errors[0]

    def _look_for(self, figures: Mapping[str, float]) -> None:
        """Raises UserError where the end has come without a figure that the sweep looks for."""
        if self.aim is None:
            return
        asked = [self.aim.up, *[self.aim.down] * isinstance(self.trials.points, Optuna)]
        bounds = [key for key in (*self.aim.floors, *self.aim.ceilings) if not key.startswith("watch/")]
        if missing := next((key for key in asked + bounds if key not in figures), None):
            raise UserError(f"aim: no figure {missing!r} came of this trial{did_you_mean(missing, figures)}")

    def _report(self, figures: dict[str, float]) -> None:
        """Tell Tune. What a scheduler compares is not there before the first look."""
        if self.aim is None or self.aim.up not in figures:
            return
        with tempfile.TemporaryDirectory() as folder:
            if self.population:  # whoever takes over this trial's weights finds them by this; Tune only passes it on
                (Path(folder) / "run.json").write_text(json.dumps({"trial": self.number, "run": self.folder.name}))
            checkpoint = tune.Checkpoint.from_directory(folder) if self.population else None
            tune.report({**figures, "score": self.aim.score(figures)}, checkpoint=checkpoint)

    def _join(self, i: int, point: Point) -> None:
        """Find out who this trial is: itself, going on, or one that takes over another's weights under a new configuration."""
        from diffinstruct.run import take_over

        if (told := tune.get_checkpoint()) is None:
            return
        with told.as_directory() as folder:
            donor = json.loads((Path(folder) / "run.json").read_text())
        if donor["trial"] == i and dict(self.trials.point(i)) == point:
            return
        before, experiment = self.trials.run(i), changed(self.trials.base, point)
        lineage = hashlib.sha256(f"{before.name} {donor['run']}".encode()).hexdigest()[:6]
        run = f"{experiment.derived_id}-{lineage}"
        step = take_over(experiment, self.trials.folder / run, self.trials.folder / donor["run"])
        close(before, self.trials.experiment(i), Paused(f"went on as {run} with the weights of {donor['run']} at step {step}"))
        self.trials.add(i, point, run)


class Reports:
    """A journal as Tune wants it: a report for each logged step, with the figures of the last look beside its metrics."""

    def __init__(self, journal: Path) -> None:
        self.journal, self.offset = journal, 0
        self.watched: dict[str, float] = {}

    def new(self) -> Iterator[dict[str, float]]:
        """What has been written since."""
        for _, end, record in records(self.journal, self.offset):
            self.offset = end
            metrics = record.get("metrics", {})
            looked = {key: value for key, value in metrics.items() if key.startswith("watch/")}
            self.watched |= looked
            if len(metrics) > len(looked):
                yield {"step": record["step"], **metrics, **self.watched}


def examine(how: Examine, experiment: Experiment, folder: Path, started_in: str) -> dict[str, float]:
    """What `how` finds, from a task of a worker's size beside the trial's own group."""

    def task() -> dict[str, float]:
        import torch

        stand_in(started_in)
        torch.set_num_threads(experiment.cluster.cpus_per_worker)
        return dict(how(experiment, folder))

    of_worker = ray_options(experiment.cluster.per_worker)
    return ray.get(ray.remote(task).options(**of_worker, scheduling_strategy="DEFAULT", max_retries=3).remote())


# -------------------------------------------------------------------------------------------- what Tune is given
class Listed(Searcher):
    """Hands out the points of a list."""

    def __init__(self, trials: Trials, todo: Sequence[int]) -> None:
        super().__init__()
        self.trials, self.todo = trials, list(todo)

    def suggest(self, trial_id: str) -> Any:
        if not self.todo or orders.given(self.trials.folder) == orders.PAUSE:
            return Searcher.FINISHED
        i = self.todo.pop(0)
        return {**self.trials.point(i), "trial": i}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A list is not changed by results."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's state is never read."""

    def get_state(self) -> dict[str, Any]:
        return {}


class Asking(Listed):
    """Hands out the points that Optuna asks for. Those of an earlier life first: it is told at once what they came to."""

    def __init__(self, trials: Trials, aim: Aim) -> None:
        super().__init__(trials, [i for i in trials.known if not trials.finished(i)])
        assert isinstance(trials.points, Optuna)
        self.search, self.aim = trials.points, aim
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(directions=["maximize", "minimize"])
        self.distributions = OptunaSearch.convert_search_space(dict(self.search.space))
        self.asked: dict[int, optuna.Trial] = {}
        self.numbers: dict[str, int] = {}  # Tune's name of a trial -> ours
        for i in sorted(trials.known):
            self.study.enqueue_trial(dict(trials.point(i)))
            self._ask(i)
            if trials.finished(i):
                self._tell(i, trials.row(i))

    def _ask(self, i: int) -> Point:
        # A sampler of its own for each point: what it draws depends on the trials before, not on when the sweep was started.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.search.seed + i, constraints_func=lambda trial: trial.user_attrs.get("excess", [0.0])
        )
        self.asked[i] = self.study.ask(self.distributions)
        return self.asked[i].params

    def _tell(self, i: int, figures: Mapping[str, Any]) -> None:
        aim, trial = self.aim, self.asked.pop(i)
        trial.set_user_attr("excess", [*aim.excess(figures).values()])
        self.study.tell(trial, [figures[aim.up], figures[aim.down]])

    def suggest(self, trial_id: str) -> Any:
        new = len(self.trials.known)
        if not self.todo and new < self.search.trials and orders.given(self.trials.folder) != orders.PAUSE:
            point = self._ask(new)
            self.trials.add(new, point, self.trials.checked(point).derived_id)
            self.todo.append(new)
        suggested = super().suggest(trial_id)
        if suggested != Searcher.FINISHED:
            self.numbers[trial_id] = suggested["trial"]
        return suggested

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        i = self.numbers[trial_id]
        if error or result is None:
            self.study.tell(self.asked.pop(i), state=optuna.trial.TrialState.FAIL)
        else:
            self._tell(i, result)


class Gentle(TrialScheduler):
    """A scheduler whose STOP is an order to the trial's run, which then ends as a finished one, not its death."""

    def __init__(self, scheduler: TrialScheduler, stop: Callable[[Any], None]) -> None:
        self.scheduler, self.stop = scheduler, stop
        self.stopped: set[Any] = set()

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial in self.stopped:
            return TrialScheduler.CONTINUE
        decision: str = self.scheduler.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        self.stopped.add(trial)
        self.stop(trial)
        return TrialScheduler.CONTINUE

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self.scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_add(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_error(tune_controller, trial)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self.scheduler.on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self.scheduler.on_trial_remove(tune_controller, trial)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        return self.scheduler.choose_trial_to_run(tune_controller)

    def debug_string(self) -> str:
        return str(self.scheduler.debug_string())


class Progress(TrialProgressCallback):
    """A line for each trial that ends, in place of Tune's, and its row; those of `ended` have had theirs."""

    def __init__(self, trials: Trials, ended: set[int], on_row: OnRow) -> None:
        super().__init__()
        self.trials, self.ended, self.on_row = trials, ended, on_row

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any) -> None:
        """The journal has it."""

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        if (i := self.trials.number(trial.trial_id, trial.config)) not in self.ended:
            self.trials.read()
            self._say(i, "done")
            self.on_row(i, self.trials.row(i))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        paused = orders.given(self.trials.folder) == orders.PAUSE
        self._say(self.trials.number(trial.trial_id, trial.config), "paused" if paused else "failed")

    def _say(self, i: int, how: str) -> None:
        self.ended.add(i)
        print(f"trial {len(self.ended)}/{self.trials.count} {how}  {dict(self.trials.point(i))}", flush=True)


def _some_of(domain: Any) -> list[Any]:
    """Values of a domain, a list or a function without arguments, as many as DRAWN or all."""
    if isinstance(domain, list | tuple):
        return list(domain)
    if isinstance(domain, Categorical):
        return list(domain.categories)
    random = np.random.RandomState(0)
    return [domain.sample(random_state=random) if isinstance(domain, Domain) else domain() for _ in range(DRAWN)]


def _check_looks(trials: Trials, aim: Aim, scheduler: TrialScheduler | None) -> None:
    """Raises UserError where the aim's figures would never come, or a scheduler would count something else than steps."""
    looks = [key for key in (aim.up, aim.down, *aim.floors, *aim.ceilings) if key.startswith("watch/")]
    if unknown := next((key for key in looks if key not in FIGURES), None):
        raise UserError(f"aim: the watch has no figure {unknown!r}{did_you_mean(unknown, FIGURES)}")
    for i in trials.known or [None]:
        experiment = trials.base if i is None else trials.experiment(i)
        if looks and not experiment.watch.every:
            raise UserError(f"watch.every: is 0, but the sweep looks at {looks[0]}")
        if aim.up == "watch/held_out" and not experiment.rewards.held_out:
            raise UserError("rewards.held_out: is empty, but the sweep looks at watch/held_out")
    if (counts := getattr(scheduler, "_time_attr", "step")) != "step":
        raise UserError(f'scheduler: time_attr should be "step", got {counts!r}, which starts anew when a trial does')
    if isinstance(scheduler, PopulationBasedTraining) and len({tuple(point) for point, _ in trials.known.values()}) != 1:
        raise UserError("sweep: the points of a population all change the same keys")
    if isinstance(scheduler, PopulationBasedTraining):
        point, changes = trials.point(0), scheduler._hyperparam_mutations
        if unknown := next((key for key in changes if key not in point), None):
            raise UserError(f"scheduler: it changes {unknown}, which the points do not{did_you_mean(unknown, point)}")
        trials.check_space(changes, point)
    every = trials.base.logging.checkpoint_every
    if isinstance(scheduler, PopulationBasedTraining) and every > scheduler._perturbation_interval:
        raise UserError(
            f"logging.checkpoint_every: {every} steps, more than the scheduler's perturbation_interval, "
            f"{scheduler._perturbation_interval}: there would be no weights to take over"
        )


# ----------------------------------------------------------------------------------------------------- resources
def at_once(experiment: Experiment) -> int:
    """How many trials the cluster has workers for, beside the reward actors; at least one."""
    asked, actors, total = experiment.cluster, experiment.reward_actors, _total()
    fits = [  # amounts may be fractions
        (total.get(kind, 0) - actors * asked.per_reward_actor.get(kind, 0)) / (asked.workers * amount) + 1e-9
        for kind, amount in asked.per_worker.items()
    ]
    return max(1, int(min(fits)))


def placement(experiment: Experiment) -> str:
    """What the sweep asks of the cluster, in a line."""
    asked, actors, total = experiment.cluster, experiment.reward_actors, _total()

    def said(resources: Mapping[str, float]) -> str:
        return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())

    kinds = {**asked.per_worker, **asked.per_reward_actor}
    return (
        f"placement  {at_once(experiment)} trials at once, {asked.workers} workers each, {said(asked.per_worker)} a worker; "
        f"for all of them {actors} reward actors, {said(asked.per_reward_actor)} an actor; "
        f"Ray has {said({kind: total.get(kind, 0) for kind in kinds})}"
    )


def _total() -> dict[str, float]:
    """What the cluster has of each resource, with what its autoscaler may start."""
    total: dict[str, float] = {}
    for resources, count in most_nodes() or [(ray.cluster_resources(), 1)]:
        for kind, amount in resources.items():
            total[kind] = total.get(kind, 0) + amount * count
    return total


def changed(base: Experiment, values: Mapping[str, Any]) -> Experiment:
    """`base` with the values of dotted keys; raises UserError, a line for each that does not fit."""
    content = base.public().model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        section: Any = content
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            raise UserError(f"{key}: unknown key{did_you_mean(key, base.to_params())}")
        section[last] = value
    try:
        experiment = Experiment.model_validate(content)
        return experiment if "tracking.uri" in values else experiment.tracked_at(base.tracking.uri)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None
