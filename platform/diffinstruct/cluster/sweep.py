"""A sweep: one Experiment made into many, each a run of its own under Ray Tune, with one set of reward actors for all."""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from pydantic import ValidationError
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from diffinstruct import tracking
from diffinstruct.cluster.rewards import ray_options, reward_pool, stand_in
from diffinstruct.cluster.train import HEAD, attached, check_fits, close, final_error, fit, most_nodes
from diffinstruct.experiment import Experiment, UserError, did_you_mean

DRIVER = {HEAD: 0.001}
"""What a trial's own process asks for: a slot that every cluster has, on its head. If it took a CPU, trials could hold all of
them and wait for ever for their workers'."""

SHARED = "is the same in all trials of a sweep, because they share their reward actors"

Point = Mapping[str, Any]
"""What one trial changes: dotted key -> value."""

Examine = Callable[[Experiment, Path], Mapping[str, float]]
"""(experiment, folder of its finished run) -> figures for its row."""


class SweepError(RuntimeError):
    """Trials that failed, one line each; the others are in the sweep's folder, whole."""


def grid(space: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Every combination of the values of dotted keys."""
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def sweep(
    base: Experiment,
    points: Sequence[Point],
    folder: Path,
    examine: Examine | None = None,
    on_row: Callable[[int, dict[str, Any]], None] = lambda i, row: None,
) -> pd.DataFrame:
    """Run `base` once for each of `points`, as child runs of one MLflow run; a trial's folder is its configuration's hash.

    Returns one row a trial: its point, "run" (its folder, below `folder`), its last metrics, and what `examine` makes of it,
    in a task of a worker's size. The same call again goes on: finished trials are not run twice, others continue from their
    checkpoints. `on_row` gets the point's index and the row in the driver, as soon as a trial has ended.
    All trials are checked before the first one starts, and share the reward actors of `base`: weights may vary, and
    which rewards are held out, but neither their names nor reference.model nor what is asked of the cluster.
    Raises SweepError if any trial failed, after all have ended, and KeyboardInterrupt after Ctrl-C.
    """
    folder = folder.absolute()
    for key in itertools.chain(*points):
        if key.split(".")[0] == "cluster" or key == "reference.model":
            raise UserError(f"{key}: {SHARED}")
    uri = tracking.tracking_uri(base.tracking.uri, folder.parent)
    base = changed(base, {"tracking.uri": uri})
    trials = [changed(base, point) for point in points]
    if any(set(trial.rewards.names) != set(base.rewards.names) for trial in trials):
        raise UserError(f"rewards: which rewards there are {SHARED}")
    folders = [folder / trial.derived_id for trial in trials]
    if len(set(folders)) < len(folders):
        twice = next(point for i, point in enumerate(points) if folders.index(folders[i]) < i)
        raise UserError(f"sweep: two trials have the same configuration, the second is {dict(twice)}")
    started_in = os.getcwd()

    with attached() as where:
        check_fits(base)
        parent = tracking.start_parent(uri, base.tracking.experiment, folder.name, _varied(points), {"sweep": str(folder)})
        print(f"sweep {folder}  {len(trials)} trials  tracking {uri}  {where}", flush=True)
        with reward_pool(base) if base.reward_actors else nullcontext() as pool:

            def trial(config: dict[str, int]) -> None:
                i = config["trial"]
                stand_in(started_in)
                if not (folders[i] / "metrics.json").exists():  # the last thing that a run writes
                    fit(trials[i], folders[i], pool, where, parent, callbacks=[TuneReportCallback()])
                if examine and not (folders[i] / "examination.json").exists():
                    examined(examine, trials[i], folders[i], started_in)

            os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no tables of Tune's
            results = tune.Tuner(
                tune.with_resources(trial, DRIVER),
                param_space={"trial": tune.grid_search(list(range(len(trials))))},
                tune_config=tune.TuneConfig(max_concurrent_trials=at_once(base)),
                run_config=tune.RunConfig(
                    name=uuid.uuid4().hex,
                    storage_path=str(folder / "ray"),
                    verbose=0,
                    callbacks=[Progress(points, folders, on_row)],
                ),
            ).fit()
        failures = {r.config["trial"]: final_error(r.error) or r.error for r in results if r.error and r.config}
        failed = "\n".join(f"{dict(points[i])}: {error}" for i, error in sorted(failures.items()))
        # Tune answers Ctrl-C by ending its trials and returning as if nothing had happened.
        unfinished = [i for i, at in enumerate(folders) if i not in failures and not (at / "metrics.json").exists()]
        for i in unfinished:
            close(folders[i], trials[i], KeyboardInterrupt())
        status = "KILLED" if unfinished else "FAILED" if failed else "FINISHED"
        tracking.finish_parent(uri, parent, status, failed or None)
    if unfinished:
        print(f"interrupted: {len(unfinished)} of {len(trials)} trials are unfinished in {folder}", flush=True)
        raise KeyboardInterrupt
    if failed:
        raise SweepError(failed)
    return table(points, folders)


def examined(examine: Examine, experiment: Experiment, folder: Path, started_in: str) -> None:
    """Leave what `examine` finds in the run's folder, from a task of a worker's size beside the trial's own group."""

    def task() -> None:
        import torch

        stand_in(started_in)
        torch.set_num_threads(experiment.cluster.cpus_per_worker)
        found = json.dumps(dict(examine(experiment, folder)), indent=2)
        (folder / "examination.tmp").write_text(found + "\n")
        (folder / "examination.tmp").replace(folder / "examination.json")

    of_worker = ray_options(experiment.cluster.per_worker)
    ray.get(ray.remote(task).options(**of_worker, scheduling_strategy="DEFAULT", max_retries=3).remote())


class Progress(tune.Callback):
    """A line for each trial that ends, and its row."""

    def __init__(self, points: Sequence[Point], folders: Sequence[Path], on_row: Callable[[int, dict[str, Any]], None]) -> None:
        self.points, self.folders, self.on_row, self.ended = points, folders, on_row, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "done")
        i = trial.config["trial"]
        self.on_row(i, row(self.points[i], self.folders[i]))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed")

    def _say(self, trial: Any, how: str) -> None:
        self.ended += 1
        print(f"trial {self.ended}/{len(self.points)} {how}  {self.points[trial.config['trial']]}", flush=True)


def table(points: Sequence[Point], folders: Sequence[Path]) -> pd.DataFrame:
    """One row a run."""
    return pd.DataFrame(row(point, folder) for point, folder in zip(points, folders, strict=True))


def row(point: Point, folder: Path) -> dict[str, Any]:
    """A finished run: its point in the space, its folder, its last metrics, what was found on examination."""
    found: dict[str, Any] = {**point, "run": str(folder)} | json.loads((folder / "metrics.json").read_text())
    examination = folder / "examination.json"
    return found | (json.loads(examination.read_text()) if examination.exists() else {})


def _varied(points: Sequence[Point]) -> dict[str, list[Any]]:
    """Each key that the points change, and the values that it takes."""
    values: dict[str, list[Any]] = {}
    for key, value in itertools.chain.from_iterable(point.items() for point in points):
        if value not in values.setdefault(key, []):
            values[key].append(value)
    return values


def at_once(experiment: Experiment) -> int:
    """How many trials the cluster has workers for, beside the reward actors; at least one."""
    asked, actors = experiment.cluster, experiment.reward_actors
    nodes = most_nodes() or [(ray.cluster_resources(), 1)]
    total = {kind: sum(resources.get(kind, 0) * count for resources, count in nodes) for kind in asked.per_worker}
    fits = [
        (total[kind] - actors * asked.per_reward_actor.get(kind, 0)) / (asked.workers * amount) + 1e-9  # may be fractions
        for kind, amount in asked.per_worker.items()
    ]
    return max(1, int(min(fits)))


def changed(base: Experiment, values: Mapping[str, Any]) -> Experiment:
    """`base` with the values of dotted keys; raises UserError, a line for each that does not fit."""
    content = base.model_dump()
    for key, value in values.items():
        *parents, last = key.split(".")
        section: Any = content
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        if not isinstance(section, dict) or last not in section:
            raise UserError(f"{key}: unknown key{did_you_mean(key, base.to_params())}")
        section[last] = value
    try:
        return Experiment.model_validate(content)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None
