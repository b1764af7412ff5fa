"""What the platform costs: CPU time of a real run's rounds beside a plain loop of the same mathematics.

    python benchmarks/step.py [local] [ray] [-s key=value ...]

`run.train` runs as it always does, with journal, MLflow, pictures and checkpoints. Where a round hands its sample to the
rewards it is stopped, and every other time the plain loop does two rounds of its own from there to there: ours, plain, plain,
ours. Ours is charged with what any other thread burns (delivery to MLflow, Ray), even while the plain loop has its turn, and
with the reward actor's process; the plain loop is charged with its own thread.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there; Ray's workers inherit it

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import plain
from torch import Tensor

from diffinstruct import tracking
from diffinstruct.experiment import Experiment, load
from diffinstruct.pretrained import load_reference
from diffinstruct.rewards import Collect
from diffinstruct.run import make_rewards, train

PAIRS, WARM_UP = 60, 10
BOUND = {"local": 1.03, "ray": 1.10}
TRACKING_BOUND = 0.02


class Meter:
    """Called at each hand-over of a run. CPU seconds of round k: `ours[k]`, `plain[k]`, and `beside[k]`, which other threads
    burnt meanwhile; `tracked[k]` is what the tracker had burnt before. Made in the driver, used in the process that trains."""

    def __init__(self, experiment: Experiment, folder: Path, actors: Sequence[int] = ()) -> None:
        self.experiment, self.folder, self.actors = experiment, folder, actors
        self.ours: list[float] = []
        self.plain: list[float] = []
        self.beside: list[float] = []
        self.tracked: list[float] = []
        self.losses: list[dict[str, float]] = []
        self.journaling = self.began = 0.0
        self.loop: Iterator[None] | None = None

    def __call__(self) -> None:
        if self.loop is None:
            self.loop = plain(self.experiment, self.losses)
            next(self.loop)
            tracking.Tracker.metrics = self.timed(tracking.Tracker.metrics)  # type: ignore[method-assign]
            tracking.Tracker.image = self.timed(tracking.Tracker.image)  # type: ignore[method-assign]
        else:
            self.ours.append(self.burnt() - self.began)
        if len(self.ours) % 2:
            for _ in range(2):
                own, all_of_it = time.thread_time(), self.burnt()
                next(self.loop)
                self.plain.append(time.thread_time() - own)
                self.beside.append(self.burnt() - all_of_it - self.plain[-1])
        if len(self.ours) == WARM_UP:
            self.wait_for_tracker()
        self.tracked.append(self.tracker())
        if len(self.ours) == WARM_UP + PAIRS:
            kept = {k: v for k, v in vars(self).items() if k in ("ours", "plain", "beside", "tracked", "losses")}
            (self.folder / "pairs.json").write_text(json.dumps(kept))
        self.began = self.burnt()

    def burnt(self) -> float:
        """CPU seconds of this process and the actors'; ~pid << 3 | 2 is Linux' name of another process' clock."""
        return time.process_time() + sum(time.clock_gettime(~pid << 3 | 2) for pid in self.actors)

    def tracker(self) -> float:
        """CPU seconds of the thread that delivers, and of journaling."""
        thread = next(thread for thread in threading.enumerate() if thread.name == "tracking")
        assert thread.ident
        return self.journaling + time.clock_gettime(time.pthread_getcpuclockid(thread.ident))

    def timed(self, method: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any) -> None:
            began = time.thread_time()
            method(*args)
            self.journaling += time.thread_time() - began

        return call

    def wait_for_tracker(self) -> None:
        """MLflow's import and the making of its tables are paid once a run, not once a step."""
        journal, confirmed = self.folder / "journal.jsonl", self.folder / "journal.ack"
        while not confirmed.exists() or json.loads(confirmed.read_text())["offset"] < journal.stat().st_size:
            time.sleep(0.1)


def local(experiment: Experiment, folder: Path) -> None:
    """`local.run`, its rewards stopped at the door."""
    torch.set_num_threads(1)
    device = torch.device("cpu")
    rewards = make_rewards(experiment, load_reference(experiment.reference.model, device=device).decode, device)
    meter = Meter(experiment, folder)

    def send(latents: Tensor, prompts: Sequence[str]) -> Collect:
        meter()
        return rewards.send(latents, prompts)

    with (folder / "output.txt").open("w") as output, redirect_stdout(output):
        train(experiment, folder, send)


def ray(experiment: Experiment, folder: Path) -> None:
    """`cluster.train.run`, with one worker and one reward actor, its pool stopped at the door."""
    import ray

    from diffinstruct.cluster.rewards import RewardPool, reward_pool
    from diffinstruct.cluster.train import attached, fit

    @dataclass(frozen=True)
    class MeteredPool(RewardPool):
        meter: Callable[[], None] = lambda: None

        def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
            self.meter()
            return RewardPool.send(self, latents, prompts)

    with attached() as where, reward_pool(experiment) as pool:
        actors = ray.get([replica.__ray_call__.remote(lambda _: os.getpid()) for replica in pool.replicas])
        fit(experiment, folder, MeteredPool(**vars(pool), meter=Meter(experiment, folder, actors)), where)


def interval(statistic: Callable[[np.ndarray], np.ndarray], pairs: np.ndarray) -> tuple[float, float, float]:
    """The statistic of pairs [n, 2] and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    low, high = np.percentile(statistic(pairs[drawn]), [2.5, 97.5])
    return statistic(pairs[None])[0], low, high


def report(name: str, experiment: Experiment, folder: Path) -> bool:
    """Print what a run's pairs say; whether it is within the bounds."""
    read = json.loads((folder / "pairs.json").read_text())
    ours, straight, beside = (np.array(read[key])[WARM_UP : WARM_UP + PAIRS] for key in ("ours", "plain", "beside"))
    pairs = np.stack([ours + beside, straight], axis=1)
    journal = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    worst, every = 0.0, experiment.logging.every
    for row in journal:
        if "metrics" in row and row["step"] <= len(read["losses"]):
            window = read["losses"][row["step"] - every : row["step"]]
            for key in window[0]:
                mean = sum(losses[key] for losses in window) / every
                worst = max(worst, abs(row["metrics"][key] - mean) / abs(mean))
    median, low, high = interval(lambda p: np.median(p[..., 0] / p[..., 1], axis=1), pairs)
    whole, whole_low, whole_high = interval(lambda p: p[..., 0].sum(1) / p[..., 1].sum(1), pairs)
    share = (read["tracked"][-1] - read["tracked"][WARM_UP]) / pairs[:, 0].sum()
    good = high <= BOUND[name] and worst <= 1e-6 and share <= TRACKING_BOUND
    print(
        f"{name}: {len(pairs)} pairs, plain {np.median(straight):.3f} CPU s a round\n"
        f"  median ratio {median:.4f}  95 % [{low:.4f}, {high:.4f}]  (bound {BOUND[name]:.2f})\n"
        f"  ratio of sums {whole:.4f}  95 % [{whole_low:.4f}, {whole_high:.4f}], with pictures and checkpoints\n"
        f"  tracking {share:.2%} of a step  (bound {TRACKING_BOUND:.0%})\n"
        f"  losses differ by at most {worst:.1e} of their value, {len(read['losses'])} rounds  {'ok' if good else 'MISSED'}"
    )
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runners", nargs="*", default=["local", "ray"], choices=["local", "ray"])
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    recipe = Path(__file__).parents[1] / "experiments/recipes/pocket.yaml"
    good = []
    for name in asked.runners:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            own = [f"steps={WARM_UP + PAIRS + 1}", f"tracking.uri=sqlite:///{temporary}/mlflow.db"]
            e = load(recipe, [*own, *asked.overrides])
            {"local": local, "ray": ray}[name](e, folder)
            good.append(report(name, e, folder))
    sys.exit(not all(good))
