"""What the platform costs: CPU time of a real run's rounds beside plain loops (`plain.py`).

    python benchmarks/step.py [all | local ray actor] [-s key=value ...]

    local   `run.train` as `local.py` calls it, beside a loop of the same mathematics, and beside the textbook's
    ray     in a Ray Train worker, rewards in the worker as in the plain loop
    actor   in a Ray Train worker, rewards in a reward actor, whose process is charged too

`run.train` runs as ever, with journal, MLflow, pictures and checkpoints. Where a round hands its sample to the rewards
it is stopped, and every other time each loop does two rounds of its own from there to there: ours, plain, plain, ours.
Ours is charged with all that the process burns in its turn, and with the tracker's thread in anybody's (it delivers
late); a loop with its own thread. The textbook's generator is evaluated beside ours after as many rounds of the same
prompts.
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
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plain import Parts, plain, textbook
from torch import Tensor

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.evaluation.evaluate import Evaluation, compare
from diffinstruct.evaluation.pocket import evaluate_generator
from diffinstruct.method.rewards import Collect, RewardRequest
from diffinstruct.models.pipeline import load_reference
from diffinstruct.reward_service.client import LocalRewards, RewardBackend, make_rewards
from diffinstruct.reward_service.reward_validation import Report
from diffinstruct.tracking.journal import Journal
from diffinstruct.training.loop import train

PAIRS, WARM_UP = 48, 8
BOUND = {"local": 1.03, "ray": 1.10, "actor": 1.10}
TRACKING_BOUND = 0.02
LOOPS = {"plain": plain, "textbook": textbook}


class Meter:
    """Called at each hand-over of a run. CPU seconds of round k: `ours[k]`, those of each loop, and `beside[k]`, the
    tracker's during the latter; `tracked[k]` is what the tracker had burnt before. Made in the driver, used in the
    process that trains."""

    def __init__(self, experiment: Experiment, folder: Path, loops: Sequence[str], actors: Sequence[int] = ()) -> None:
        self.experiment, self.folder, self.loops, self.actors = experiment, folder, loops, actors
        self.ours: list[float] = []
        self.theirs: dict[str, list[float]] = {name: [] for name in loops}
        self.beside: list[float] = []
        self.tracked: list[float] = []
        self.journaling = self.began = 0.0
        self.parts: dict[str, Parts] = {}
        self.running: dict[str, Iterator[None]] = {}

    def __call__(self) -> None:
        if not self.running:
            self.parts = {name: Parts(self.experiment) for name in self.loops}
            self.running = {name: LOOPS[name](parts) for name, parts in self.parts.items()}
            for loop in self.running.values():
                next(loop)
            Journal.metrics = self.timed(Journal.metrics)  # type: ignore[method-assign]
            Journal.image = self.timed(Journal.image)  # type: ignore[method-assign]
        else:
            self.ours.append(self.burnt() - self.began)
        if len(self.ours) % 2:
            self.beside += [0.0, 0.0]
            for i in (-2, -1):
                for name, loop in self.running.items():
                    own, tracker = time.thread_time(), self.tracker()
                    next(loop)
                    self.theirs[name].append(time.thread_time() - own)
                    self.beside[i] += self.tracker() - tracker
        if len(self.ours) == WARM_UP:
            self.wait_for_tracker()
        self.tracked.append(self.tracker())
        if len(self.ours) == WARM_UP + PAIRS:
            kept = {k: v for k, v in vars(self).items() if k in ("ours", "theirs", "beside", "tracked")}
            kept["losses"] = self.parts["plain"].rounds
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


@dataclass
class Metered:
    """The rewards, in actors or in the process that asks; each round's question stops at the door first."""

    meter: Meter
    made: RewardBackend | None = None

    @property
    def service(self) -> RewardBackend:
        if self.made is None:  # where it is used; it cannot travel
            decode = load_reference(self.meter.experiment.reference.model).decode
            self.made = LocalRewards(make_rewards(self.meter.experiment.rewards.names, decode, "cpu"))
        return self.made

    def ask(self, latents: Tensor, prompts: Sequence[str], request: RewardRequest) -> Collect:
        self.meter()
        return self.service.ask(latents, prompts, request)

    def validate(
        self, latents: Tensor, prompts: Sequence[str], trained: Collection[str], known: Collection[str] = ()
    ) -> list[Report]:
        return self.service.validate(latents, prompts, trained)


def local(experiment: Experiment, folder: Path) -> None:
    """`local.run`, its rewards stopped at the door; then what came of its generator and of the textbook's."""
    torch.set_num_threads(1)
    meter = Meter(experiment, folder, [*LOOPS])
    with (folder / "output.txt").open("w") as output, redirect_stdout(output):
        result = train(experiment, folder, Metered(meter))
    assert result
    meter.parts["textbook"].ema.save_pretrained(folder / "textbook")
    reference, of = load_reference(experiment.reference.model), experiment.generator

    def evaluated(start: Path) -> Evaluation:
        return evaluate_generator(reference.sampler(reference.generator(of.timestep, str(start), of.input_scale)))

    ours, theirs = evaluated(result.export), evaluated(folder / "textbook")
    differences = compare(ours, theirs)
    for name in (f"reward/{held_out}" for held_out in experiment.rewards.held_out):
        print(
            f"after {experiment.steps} rounds {name}: ours {ours.summary()[name]}, textbook {theirs.summary()[name]}, "
            f"ours minus textbook, paired over {differences[name].n} prompts: {differences[name]}"
        )


def on_ray(experiment: Experiment, folder: Path, actor: bool) -> None:
    """`cluster.train.run` with one worker, its pool stopped at the door."""
    import ray

    from diffinstruct.cluster.attach import attached
    from diffinstruct.cluster.reward_pool import reward_pool
    from diffinstruct.cluster.train import fit

    with attached() as where, reward_pool(experiment) if actor else nullcontext() as pool:
        handles = pool.actors() if pool else ()
        pids = ray.get([handle.__ray_call__.remote(lambda _: os.getpid()) for handle in handles])
        fit(experiment, folder, Metered(Meter(experiment, folder, ["plain"], pids), pool), where)


def interval(statistic: Callable[[np.ndarray], np.ndarray], pairs: np.ndarray) -> tuple[float, float, float]:
    """The statistic of pairs [n, 2] and its 95 % bootstrap interval."""
    drawn = np.random.default_rng(0).integers(len(pairs), size=(10_000, len(pairs)))
    low, high = np.percentile(statistic(pairs[drawn]), [2.5, 97.5])
    return statistic(pairs[None])[0], low, high


def median_ratio(pairs: np.ndarray) -> np.ndarray:
    return np.median(pairs[..., 0] / pairs[..., 1], axis=1)


def report(name: str, experiment: Experiment, folder: Path) -> bool:
    """Print what a run's pairs say; whether it is within the bounds."""
    read = json.loads((folder / "pairs.json").read_text())
    ours, beside = (np.array(read[key])[WARM_UP : WARM_UP + PAIRS] for key in ("ours", "beside"))
    loops = {loop: np.array(times)[WARM_UP : WARM_UP + PAIRS] for loop, times in read["theirs"].items()}
    pairs = np.stack([ours + beside, loops["plain"]], axis=1)
    journal = map(json.loads, (folder / "journal.jsonl").read_text().splitlines())
    worst, every = 0.0, experiment.logging.every
    for row in journal:
        if "metrics" in row and row["step"] <= len(read["losses"]):
            window = read["losses"][row["step"] - every : row["step"]]
            for key in window[0]:
                mean = sum(losses[key] for losses in window) / every
                worst = max(worst, abs(row["metrics"][key] - mean) / abs(mean))
    median, low, high = interval(median_ratio, pairs)
    whole, whole_low, whole_high = interval(lambda p: p[..., 0].sum(1) / p[..., 1].sum(1), pairs)
    share = (read["tracked"][-1] - read["tracked"][WARM_UP]) / pairs[:, 0].sum()
    good = high <= BOUND[name] and worst <= 1e-6 and share <= TRACKING_BOUND
    print(
        f"{name}: {len(pairs)} pairs, plain {np.median(loops['plain']):.3f} CPU s a round\n"
        f"  median ratio {median:.4f}  95 % [{low:.4f}, {high:.4f}]  (bound {BOUND[name]:.2f})\n"
        f"  ratio of sums {whole:.4f}  95 % [{whole_low:.4f}, {whole_high:.4f}], with pictures and checkpoints\n"
        f"  tracking {share:.2%} of a step  (bound {TRACKING_BOUND:.0%})\n"
        f"  losses differ by at most {worst:.1e} of their value, {len(read['losses'])} rounds  {'ok' if good else 'MISSED'}"
    )
    if "textbook" in loops:
        faster = interval(median_ratio, np.stack([ours + beside, loops["textbook"]], axis=1))
        good &= faster[2] < 1
        print(f"  against the textbook's loop {faster[0]:.4f}  95 % [{faster[1]:.4f}, {faster[2]:.4f}]")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runners", nargs="*", choices=[*BOUND, "all"], default="all")
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    recipe = Path(__file__).parents[1] / "experiments/recipes/pocket.yaml"
    good = []
    for name in BOUND if "all" in asked.runners else asked.runners:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "run"
            folder.mkdir()
            # Without looks, which the loops beside it do not have, and without a choice of place: it asks once more.
            own = [
                "overoptimization.every=0",
                "cluster.rewards.placement=actor",
                f"steps={WARM_UP + PAIRS + 1}",
                f"tracking.uri=sqlite:///{temporary}/mlflow.db",
            ]
            e = load(recipe, [*own, *asked.overrides])
            local(e, folder) if name == "local" else on_ray(e, folder, actor=name == "actor")
            good.append(report(name, e, folder))
    sys.exit(not all(good))
