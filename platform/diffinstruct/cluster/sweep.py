"""A sweep: one Experiment made into many, each a run of its own under Ray Tune, with one set of reward actors for all."""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import ray
from pydantic import ValidationError
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from diffinstruct import tracking
from diffinstruct.cluster.rewards import reward_pool, stand_in
from diffinstruct.cluster.train import attached, check_fits, final_error, fit
from diffinstruct.experiment import Experiment, UserError, did_you_mean

DRIVER = {"node:__internal_head__": 0.001}
"""What a trial's own process asks for: a slot that every cluster has, on its head. If it took a CPU, trials could hold all of
them and wait for ever for their workers'."""


class SweepError(RuntimeError):
    """Trials that failed, one line each; the others are in the sweep's folder, whole."""


def sweep(base: Experiment, space: Mapping[str, Sequence[Any]], folder: Path) -> pd.DataFrame:
    """Run `base` once for each combination of `space` (dotted key -> values), as child runs of one MLflow run.

    Returns one row a trial: the values, "run" (its folder, below `folder`), and its last metrics. All trials are checked
    before the first one starts, and share the reward actors of `base`, so `space` varies neither rewards nor reference.model.
    Raises SweepError if any trial failed, after all have ended.
    """
    folder = folder.absolute()
    fixed = [key for key in space if key.split(".")[0] in ("rewards", "cluster") or key == "reference.model"]
    if fixed:
        raise UserError(f"{fixed[0]}: is the same in all trials of a sweep, because they share their reward actors")
    uri = tracking.tracking_uri(base.tracking.uri, folder.parent)
    base = changed(base, {"tracking.uri": uri})
    points = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    trials = [changed(base, point) for point in points]
    folders = [folder / f"{i:03d}" for i in range(len(trials))]
    started_in = os.getcwd()

    with attached() as where:
        check_fits(base)
        values = {key: list(values) for key, values in space.items()}
        parent = tracking.start_parent(uri, base.tracking.experiment, folder.name, values, {"sweep": str(folder)})
        print(f"sweep {folder}  {len(trials)} trials  tracking {uri}  {where}", flush=True)
        with reward_pool(base) as pool:

            def trial(config: dict[str, int]) -> None:
                i = config["trial"]
                stand_in(started_in)
                fit(trials[i], folders[i], pool, where, parent, callbacks=[TuneReportCallback()])

            os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # no tables of Tune's
            results = tune.Tuner(
                tune.with_resources(trial, DRIVER),
                param_space={"trial": tune.grid_search(list(range(len(trials))))},
                tune_config=tune.TuneConfig(max_concurrent_trials=at_once(base)),
                run_config=tune.RunConfig(
                    name=uuid.uuid4().hex, storage_path=str(folder / "ray"), verbose=0, callbacks=[Progress(points)]
                ),
            ).fit()
        errors = {str(point): final_error(r.error) or r.error for point, r in zip(points, results, strict=True) if r.error}
        failed = "\n".join(f"{point}: {error}" for point, error in errors.items())
        tracking.finish_parent(uri, parent, "FAILED" if failed else "FINISHED", failed or None)
    if failed:
        raise SweepError(failed)
    return table(points, folders)


class Progress(tune.Callback):
    """A line for each trial that ends."""

    def __init__(self, points: Sequence[Mapping[str, Any]]) -> None:
        self.points, self.ended = points, 0

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "done")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed")

    def _say(self, trial: Any, how: str) -> None:
        self.ended += 1
        print(f"trial {self.ended}/{len(self.points)} {how}  {self.points[trial.config['trial']]}", flush=True)


def table(points: Sequence[Mapping[str, Any]], folders: Sequence[Path]) -> pd.DataFrame:
    """One row a run: its point in the space, its folder, its last metrics."""
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    return pd.DataFrame(
        {**point, "run": str(folder), **last} for point, folder, last in zip(points, folders, metrics, strict=True)
    )


def at_once(experiment: Experiment) -> int:
    """How many trials the cluster has workers for, beside the reward actors; at least one."""
    asked, total = experiment.cluster, ray.cluster_resources()
    fits = [(total.get("CPU", 0) - asked.reward_replicas * asked.reward_cpus) // (asked.workers * asked.cpus_per_worker)]
    if asked.use_gpu:
        fits.append((total.get("GPU", 0) - asked.reward_replicas * asked.reward_gpus) // asked.workers)
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
