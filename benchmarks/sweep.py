"""What a sweep costs beside the runs in it, what a scheduler saves, and whether MLflow keeps up.

    python benchmarks/sweep.py [all | overhead asha tracking] [-s key=value ...]

    overhead  three trials one after the other under Tune, and three plain runs in a row in the same Ray, in turn:
    seconds
              each. They are as short as can be, and equal to the last digit; a plain run makes its own reward actor,
              the trials share one
    asha      a grid of regularization weights and reward scales to its end, and the same grid under ASHA: steps of all
    trials
              until the held-out reward (score of the default criterion) is as high as the grid's best, over the grid's steps
    tracking  eight trials at once, each logging every round, into one sqlite file: is every value of every journal in
    MLflow,
              once, and has nobody found the database locked?

-s changes the recipe, pocket_study.yaml. Intervals are 95 %, Student's, over turns.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there; Ray's workers inherit it

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import ray
from ray.tune.schedulers import ASHAScheduler

from diffinstruct.cluster.attach import attached
from diffinstruct.cluster.train import run
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.statistics import over_seeds
from diffinstruct.sweeps.criterion import SelectionCriterion
from diffinstruct.sweeps.points import changed, grid
from diffinstruct.sweeps.tune import sweep
from diffinstruct.tracking.records import read_journal

RECIPE = Path(__file__).parents[1] / "experiments/recipes/pocket_study.yaml"
WEIGHT, SCALE = "objective.regularization_weight", "objective.reward_scale"
TURNS, TRIALS, AT_ONCE = 4, 3, 8
STEPS = 0.5  # of the grid's


def overhead(base: Experiment, folder: Path) -> bool:
    everything = int(ray.cluster_resources()["CPU"])  # so one trial at a time
    short = {"steps": 2, "global_batch_size": 8, "logging.every": 1, "logging.grid_prompts": 2}
    base = changed(base, {**short, "cluster.rewards.placement": "actor", "cluster.cpus_per_worker": everything})
    points = grid({"seed": list(range(TRIALS))})

    def plain(folder: Path) -> None:
        for point in points:
            experiment = changed(base, point)
            run(experiment, folder / experiment.config_hash)

    work: dict[str, Callable[[Path], object]] = {"plain": plain, "swept": lambda folder: sweep(base, points, folder)}
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(TURNS):
        for name in sorted(work, reverse=bool(turn % 2)):
            began = time.perf_counter()
            work[name](folder / f"{name}-{turn}")
            seconds[name].append((time.perf_counter() - began) / TRIALS)
    equal = all(figures(folder / "plain-0" / run) == figures(folder / "swept-0" / run) for run in runs(folder / "swept-0"))
    for name, of in seconds.items():
        print(f"overhead: {name}, seconds a trial: {over_seeds(of)}, n {TURNS} turns of {TRIALS}")
    more = over_seeds([ours - theirs for ours, theirs in zip(seconds["swept"], seconds["plain"], strict=True)])
    print(f"overhead: a trial of a sweep takes {more} s more than a plain run; their figures are equal: {equal}", flush=True)
    return equal


def asha(base: Experiment, folder: Path) -> bool:
    points, criterion = grid({WEIGHT: [0.25, 1, 4], SCALE: [0.5, 2, 8]}), SelectionCriterion()
    started = time.perf_counter()
    sweep(base, points, folder / "grid", criterion=criterion)
    between = time.perf_counter()
    scheduler = ASHAScheduler(time_attr="step", max_t=base.steps, grace_period=base.overoptimization.every, reduction_factor=3)
    sweep(base, points, folder / "asha", scheduler=scheduler, criterion=criterion)
    print(f"asha: the grid took {between - started:.0f} s, under ASHA it took {time.perf_counter() - between:.0f} s")
    full, halved = looks(folder / "grid", criterion), looks(folder / "asha", criterion)
    best = full["score"].max()
    whole, spent = (of.groupby("run")["step"].max().sum() for of in (full, halved))
    print(f"asha: the grid's best look {best:.3f} after {whole} steps, ASHA's {halved['score'].max():.3f} after {spent}")
    reached = halved[halved["score"] >= best]
    if reached.empty:
        print("asha: never as high: MISSED", flush=True)
        return False
    until = reached["time"].min()
    share = halved[halved["time"] <= until].groupby("run")["step"].max().sum() / whole
    good = bool(share <= STEPS)
    print(f"asha: as high after {share:.1%} of the grid's steps, {spent / whole:.1%} in all, ", end="")
    print(f"bound <= {STEPS:.0%}: {'ok' if good else 'MISSED'}", flush=True)
    return good


def tracking(base: Experiment, folder: Path) -> bool:
    logged = {"steps": 30, "global_batch_size": 2, "logging.every": 1, "logging.grid_prompts": 2, "overoptimization.every": 0}
    base = changed(base, {**logged, "name": "tracking", "cluster.rewards.placement": "process"})
    sweep(base, grid({"seed": list(range(AT_ONCE))}), folder / "tracking")
    return delivered(folder)


def delivered(folder: Path) -> bool:
    """Whether MLflow has each number of each journal below `folder` once, and nothing else."""
    from mlflow import MlflowClient

    client, good, numbers = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}"), True, 0
    tracked = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    by_id = {run.data.tags.get("diffinstruct.experiment_id"): run.info.run_id for run in tracked}
    for name in runs(folder / "tracking"):
        there: list[tuple[str, int, float]] = []
        for record in read_journal(folder / "tracking" / name):
            there += [(key, record["step"], value) for key, value in record.get("metrics", {}).items()]
        metrics = client.get_run(by_id[run]).data.metrics
        found = [(key, m.step, m.value) for key in metrics for m in client.get_metric_history(by_id[run], key)]
        good &= sorted(there) == sorted(found)
        numbers += len(there)
    text = "".join(path.read_text() for path in folder.rglob("output.txt"))
    locked = text.count("database is locked")
    whole = len(tracked) == AT_ONCE + 1 and good and not locked
    print(
        f"tracking: {AT_ONCE} trials at once, {numbers} values: {'each' if good else 'NOT each'} in MLflow once; "
        f"{len(tracked)} runs; 'database is locked' {locked} times: {'ok' if whole else 'MISSED'}",
        flush=True,
    )
    return whole


def runs(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in folder.glob("*/experiment.yaml"))


def figures(run: Path) -> dict[str, float]:
    """Its last metrics but the times."""
    found = json.loads((run / "metrics.json").read_text())
    return {key: value for key, value in found.items() if not key.startswith(("time/", "throughput/"))}


def looks(folder: Path, criterion: SelectionCriterion) -> pd.DataFrame:
    """Every look of every run: when it was, at which step, what the criterion gives for it."""
    found = []
    for name in runs(folder):
        for record in read_journal(folder / name):
            if criterion.maximize in (metrics := record.get("metrics", {})):
                found.append({"run": name, "time": record["time"], "step": record["step"], "score": criterion.score(metrics)})
    return pd.DataFrame(found)


PARTS = {"overhead": overhead, "asha": asha, "tracking": tracking}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["all"], choices=["all", *PARTS])
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--keep", type=Path, help="leave the runs in this folder")
    asked = parser.parse_args()
    good = []
    for name in PARTS if "all" in asked.parts else asked.parts:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (asked.keep or Path(temporary)).absolute() / name
            folder.mkdir(parents=True, exist_ok=True)
            if name == "tracking":  # whatever this machine has
                ray.init(address="local", num_cpus=AT_ONCE, include_dashboard=False)
            with attached():
                good.append(PARTS[name](load(RECIPE, asked.overrides), folder))
            ray.shutdown()
    sys.exit(not all(good))
