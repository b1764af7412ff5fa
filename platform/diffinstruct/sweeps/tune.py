"""A sweep: one Experiment made into many, each a run of its own under Ray Tune, with one set of reward actors for all.

    <sweep>/<id>/           a trial's run; id is its configuration's hash, longer if it took over
                            another trial's weights
    <sweep>/trials.jsonl    what no list of points can tell again: what Optuna asked for, who took over whose weights
    <sweep>/journal.jsonl   the parent run's, as in every run's folder; table.csv, report.html: what came of it

Tune decides which trial runs when. All that it hears of a trial is the trial's journal, so a trial that has ended in an
earlier life of the sweep can be told once more, and Tune's own state is never read.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from ray import tune
from ray.tune.progress_reporter import TrialProgressCallback
from ray.tune.schedulers import PopulationBasedTraining, TrialScheduler

from diffinstruct.cluster import ray_private
from diffinstruct.cluster.attach import HEAD, attached, check_fits, listed, most_nodes, stand_in
from diffinstruct.cluster.failures import close, final_error
from diffinstruct.cluster.reward_pool import reward_pool
from diffinstruct.cluster.shared_folder import check_seen
from diffinstruct.cluster.train import embed
from diffinstruct.cluster.waiting import waits_said
from diffinstruct.config.addresses import tracking_uri
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import check_inputs, refuse_passing_copy
from diffinstruct.config.sections import ClusterConfig
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.reward_service.monitor import PROBE_METRICS
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.signals import Paused, Signal
from diffinstruct.sweeps.criterion import SelectionCriterion
from diffinstruct.sweeps.points import Optuna, Point
from diffinstruct.sweeps.searchers import ListSearcher, OptunaSearcher
from diffinstruct.sweeps.trials import EvaluateRun, Shared, Trial, Trials
from diffinstruct.tracking.journal import Journal

DRIVER = {HEAD: 0.001}
"""What a trial's own process asks for: a slot that every cluster has, on its head. If it took a CPU, trials could hold
all of them and wait for ever for their workers'."""

OnRow = Callable[[int, dict[str, Any]], None]  # (number of the trial, its row), in the driver


class SweepError(RuntimeError):
    """Trials that failed, one line each; the others are in the sweep's folder, whole."""


def sweep(
    base: Experiment,
    points: Sequence[Point] | Optuna,
    folder: Path | str,
    evaluate: EvaluateRun | None = None,
    on_row: OnRow = lambda i, row: None,
    scheduler: TrialScheduler | None = None,
    criterion: SelectionCriterion | None = None,
) -> pd.DataFrame:
    """Run `base` once for each of `points`, as child runs of one MLflow run.

    Returns one row a trial: its point, "run" (its folder, below `folder`), its last metrics, and what `evaluate` makes
    of it, in a task of a worker's size. The same call again goes on: finished trials are not run twice, others continue
    from their checkpoints, the same MLflow runs go on. `on_row` gets each row as soon as its trial has ended. All
    trials that are known beforehand are checked before the first one starts. They share the reward actors of `base`:
    weights may vary, and which rewards are held out, but neither their names nor reference.model nor what is asked of
    the cluster.

    scheduler: one of Tune's, with time_attr="step" and no metric of its own: it compares the criterion's score. Trials that
        it ends early (ASHAScheduler) are finished runs of fewer steps. Trials that take over another's weights
        (PopulationBasedTraining) are several runs; the last one makes the row.
    Raises SweepError if any trial failed, after all have ended; Paused after SIGTERM, KeyboardInterrupt after Ctrl-C.
    """
    folder = Path(folder).absolute()
    base = base.tracked_at(tracking_uri(base.tracking.uri, folder.parent)).with_absolute_embeddings()
    trials = Trials(base, points, folder, evaluate)
    if scheduler or isinstance(points, Optuna):
        criterion = criterion or SelectionCriterion()
        _check_search(trials, criterion, scheduler)
    _check_trials(trials)
    with attached() as where, waits_said(base.cluster, base.reward_actors) as begun:
        check_fits(base.cluster, base.reward_actors)
        check_seen("sweep", folder, base.cluster)
        for experiment in _distinct(trials, {"prompts"}):
            embed(experiment)
        trials.open(keeps=isinstance(points, Optuna) or isinstance(scheduler, PopulationBasedTraining))
        signals.clear(folder)
        tracking, tags = base.tracking, {"sweep": folder, "trials": trials.count}
        where_to = (tracking.uri, tracking.experiment, folder.name, folder)
        parent = Journal(*where_to, trials.varied, tags, also=tracking.also)
        print(f"sweep {folder}  {trials.count} trials  tracking {parent.url}  {where}", flush=True)
        print(placement(base.cluster, base.reward_actors), flush=True)
        end = Outcome("KILLED")
        try:
            with (
                reward_pool(base) if base.reward_actors else nullcontext() as pool,
                signals.on_sigterm(lambda: signals.request(folder, Signal.PAUSE)),
            ):
                begun()  # of trials that others leave no room for Tune tells
                failures = _run_trials(trials, Shared(pool, where, parent.run_id, criterion), scheduler, on_row)
            end = _close_unfinished(trials, failures)
            table = _kept_table(trials, parent)
        finally:
            parent.finish(end.status, end.reason)
            shutil.rmtree(folder / "ray", ignore_errors=True)
    if end.unfinished:
        print(f"{'paused' if end.paused else 'interrupted'}: {end.unfinished}", flush=True)
        raise end.unfinished if end.paused else KeyboardInterrupt
    if end.status == "FAILED":
        raise SweepError(end.reason)
    return table


def _check_trials(trials: Trials) -> None:
    """Raises UserError for what the trials read that is not there, and for a mirror."""
    if any(experiment.mirror for experiment in (trials.base, *trials.experiments)):
        raise UserError("mirror: is for single runs; what a sweep's trials leave lies in the sweep's folder")
    for experiment in _distinct(trials, {"prompts", "rewards"}):
        check_inputs(experiment)
    refuse_passing_copy("sweep", trials.folder)


def _distinct(trials: Trials, sections: set[str]) -> Iterable[Experiment]:
    """One experiment for each value that these sections have among the trials."""
    return {experiment.model_dump_json(include=sections): experiment for experiment in trials.experiments}.values()


@dataclass(frozen=True)
class Outcome:
    """How a sweep has ended; `reason`: the failed trials, a line each; `unfinished`: says how many trials are."""

    status: str
    reason: str | None = None
    unfinished: Paused | None = None
    paused: bool = False


def _close_unfinished(trials: Trials, failures: Mapping[int, BaseException]) -> Outcome:
    """Close the MLflow runs of unfinished trials; Tune answers Ctrl-C by ending its trials and returning as if done."""
    reason = "\n".join(f"{dict(trials.point(i))}: {error}" for i, error in sorted(failures.items()))
    unfinished = [i for i in range(trials.count) if i not in failures and not trials.finished(i)]
    if not unfinished:
        return Outcome("FAILED" if failures else "FINISHED", reason)
    paused = signals.requested(trials.folder) == Signal.PAUSE
    pause = Paused(f"{len(unfinished)} of {trials.count} trials are unfinished in {trials.folder}")
    for i in unfinished:
        if i in trials.known:
            close(trials.run_folder(i), trials.base.tracking, pause if paused else KeyboardInterrupt())
    return Outcome("KILLED", reason, pause, paused)


def _kept_table(trials: Trials, parent: Journal) -> pd.DataFrame:
    """The finished trials' rows, kept as table.csv and report.html in the sweep's folder and in its parent run."""
    from diffinstruct.reports.page import write

    table = trials.table()
    table.to_csv(trials.folder / "table.csv", index=False)
    parent.artifact(trials.folder / "table.csv")
    if len(table):
        write(trials.folder, trials.folder / "report.html")
        parent.artifact(trials.folder / "report.html")
    return table


def _run_trials(trials: Trials, shared: Shared, scheduler: TrialScheduler | None, on_row: OnRow) -> dict[int, BaseException]:
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

    def trial(config: dict[str, Any]) -> None:
        stand_in(started_in, trials.base)
        trials.base = trials.base.tracked_at(uri)
        Trial(trials, config, shared, population, started_in).run()

    def stop(trial: Any) -> None:
        signals.request(trials.run_folder(trials.number(trial.trial_id, trial.config)), Signal.STOP)

    # Tune would tell how to go on from its own state, which is cleared away
    logging.getLogger("ray.tune.tune").setLevel(logging.ERROR)
    os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # the other would put its table in the place of our lines
    space, search = _search(trials, todo, shared.criterion, population)
    results = tune.Tuner(
        tune.with_resources(trial, DRIVER),
        param_space=space,
        tune_config=tune.TuneConfig(
            **search,
            max_concurrent_trials=at_once(trials.base.cluster, trials.base.reward_actors),
            scheduler=StopByRequest(scheduler, stop) if scheduler else None,
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
    # A result alone does not say whose it is.
    for result, of in zip(results, ray_private.tune_trials(results), strict=True):
        if result.error:
            errors[trials.number(of.trial_id, of.config)] = final_error(result.error) or result.error
    return {i: error for i, error in errors.items() if not isinstance(error, Paused)}


def _search(
    trials: Trials, todo: list[int], criterion: SelectionCriterion | None, population: bool
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Tune's parameter space and how it is searched; a population wants Tune to hand out its points itself."""
    if population:
        keys = trials.point(todo[0])
        values: dict[str, Any] = {key: tune.sample_from(partial(_value, trials, key)) for key in keys}
        return {"trial": tune.grid_search(todo), **values}, {"num_samples": 1}
    searcher = (
        OptunaSearcher(trials, criterion) if criterion and isinstance(trials.points, Optuna) else ListSearcher(trials, todo)
    )
    return None, {"num_samples": trials.count, "search_alg": searcher}


def _value(trials: Trials, key: str, spec: Any) -> Any:
    """What the trial that Tune is making changes `key` to."""
    return trials.point(spec.config.trial)[key]


class StopByRequest:
    """One of Tune's schedulers, but its STOP asks the trial's run to end as a finished one; it is not the run's death."""

    def __init__(self, scheduler: TrialScheduler, stop: Callable[[Any], None]) -> None:
        self.scheduler, self.stop = scheduler, stop
        self.stopped: set[Any] = set()

    def __getattr__(self, name: str) -> Any:
        if name == "scheduler":  # not there yet, while it is unpickled
            raise AttributeError(name)
        return getattr(self.scheduler, name)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if trial in self.stopped:
            return TrialScheduler.CONTINUE
        decision: str = self.scheduler.on_trial_result(tune_controller, trial, result)
        if decision != TrialScheduler.STOP:
            return decision
        self.stopped.add(trial)
        self.stop(trial)
        return TrialScheduler.CONTINUE


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
        paused = signals.requested(self.trials.folder) == Signal.PAUSE
        self._say(self.trials.number(trial.trial_id, trial.config), "paused" if paused else "failed")

    def _say(self, i: int, how: str) -> None:
        self.ended.add(i)
        print(f"trial {len(self.ended)}/{self.trials.count} {how}  {dict(self.trials.point(i))}", flush=True)


def _check_search(trials: Trials, criterion: SelectionCriterion, scheduler: TrialScheduler | None) -> None:
    """Raises UserError where the criterion's metrics would never come, or a scheduler would not count steps."""
    keys = (criterion.maximize, criterion.minimize, *criterion.floors, *criterion.ceilings)
    probed = [key for key in keys if key.startswith("overoptimization/")]
    if unknown := next((key for key in probed if key not in PROBE_METRICS), None):
        raise UserError(
            f"criterion: the over-optimization monitor has no metric {unknown!r}{did_you_mean(unknown, PROBE_METRICS)}"
        )
    for i in trials.known or [None]:
        experiment = trials.base if i is None else trials.experiment(i)
        if probed and not experiment.overoptimization.every:
            raise UserError(f"overoptimization.every: is 0, but the sweep looks at {probed[0]}")
        if criterion.maximize == "overoptimization/held_out" and not experiment.rewards.held_out:
            raise UserError("rewards.held_out: is empty, but the sweep looks at overoptimization/held_out")
    if (counts := ray_private.time_attribute(scheduler, default="step")) != "step":
        raise UserError(f'scheduler: time_attr should be "step", got {counts!r}, which starts anew when a trial does')
    if isinstance(scheduler, PopulationBasedTraining) and len({tuple(point) for point, _ in trials.known.values()}) != 1:
        raise UserError("sweep: the points of a population all change the same keys")
    if isinstance(scheduler, PopulationBasedTraining):
        point, changes = trials.point(0), ray_private.hyperparameter_mutations(scheduler)
        if unknown := next((key for key in changes if key not in point), None):
            raise UserError(f"scheduler: it changes {unknown}, which the points do not{did_you_mean(unknown, point)}")
        trials.check_space(changes, point)
    every = trials.base.logging.checkpoint_every
    if isinstance(scheduler, PopulationBasedTraining) and every > ray_private.perturbation_interval(scheduler):
        raise UserError(
            f"logging.checkpoint_every: {every} steps, more than the scheduler's perturbation_interval, "
            f"{ray_private.perturbation_interval(scheduler)}: there would be no weights to take over"
        )


def at_once(asked: ClusterConfig, actors: int) -> int:
    """How many trials the cluster has workers for, beside the reward actors; at least one."""
    total = _total()
    fits = [  # amounts may be fractions
        (total.get(kind, 0) - actors * asked.per_reward_actor.get(kind, 0)) / (asked.workers * amount) + 1e-9
        for kind, amount in asked.per_worker.items()
    ]
    return max(1, int(min(fits)))


def placement(asked: ClusterConfig, actors: int) -> str:
    """What the sweep asks of the cluster, in a line."""
    total = _total()
    kinds = {**asked.per_worker, **asked.per_reward_actor}
    return (
        f"placement  {at_once(asked, actors)} trials at once, {asked.workers} workers each, "
        f"{listed(asked.per_worker)} a worker; "
        f"for all of them {actors} reward actors, {listed(asked.per_reward_actor)} an actor; "
        f"Ray has {listed({kind: total.get(kind, 0) for kind in kinds})}"
    )


def _total() -> dict[str, float]:
    """What the cluster has of each resource, with what its autoscaler may start."""
    total: dict[str, float] = {}
    for resources, count in most_nodes() or [(ray.cluster_resources(), 1)]:
        for kind, amount in resources.items():
            total[kind] = total.get(kind, 0) + amount * count
    return total
