"""How much of a reward's latency a round hides.

    python benchmarks/reward_overlap.py [-s key=value ...]

A Ray Train worker, a reward actor with the recipe's rewards, and a sleep in the actor that stretches each answer to a share
of the window: the time between the sample's departure and the moment its gradient is needed, measured in rounds without the
sleep. Shares take turns, round by round. Hidden is 1 - exposed / latency, over all rounds of a share.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is there; Ray's workers inherit it

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import ray
from torch import Tensor

from diffinstruct.cluster.rewards import Answer, RewardActor, RewardPool
from diffinstruct.cluster.train import attached, fit
from diffinstruct.experiment import load
from diffinstruct.rewards import Collect, Scores

SHARES = (0.0, 0.25, 0.5, 1.0)
ROUNDS, WARM_UP = 30, 5  # of each share; rounds before the first
BOUND = 0.9


class SlowActor(RewardActor):
    """Answers when `latency` seconds have passed since it was asked, if its models do not take longer."""

    latency = 0.0

    def answer_in(self, seconds: float) -> None:
        self.latency = seconds

    def score(self, latents: np.ndarray, prompts: Sequence[str]) -> Answer:
        began = time.perf_counter()
        answer = super().score(latents, prompts)
        time.sleep(max(0.0, self.latency - (time.perf_counter() - began)))
        return answer


@dataclass(frozen=True)
class SlowPool(RewardPool):
    """Sets each round's latency, and keeps its share, latency, window and exposed seconds."""

    path: Path = Path()
    rows: list[tuple[float, float, float, float]] = field(default_factory=list)

    def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        share = SHARES[(len(self.rows) - WARM_UP) % len(SHARES)] if len(self.rows) >= WARM_UP else 0.0
        windows = [window for undisturbed, _, window, _ in self.rows if undisturbed == 0]
        latency = share * float(np.median(windows[-ROUNDS:] or [0.0]))
        self.replicas[0].answer_in.remote(latency)  # an actor's calls keep their order
        collect, sent = RewardPool.send(self, latents, prompts), time.perf_counter()

        def measured() -> Scores:
            wanted = time.perf_counter()
            answer = collect()
            self.rows.append((share, latency, wanted - sent, time.perf_counter() - wanted))
            self.path.write_text(json.dumps(self.rows))
            return answer

        return measured


def main(overrides: list[str]) -> bool:
    """Print the table; whether every share is within the bound."""
    recipe = Path(__file__).parents[1] / "experiments/recipes/pocket.yaml"
    with tempfile.TemporaryDirectory() as temporary, attached() as where:
        steps = [f"steps={WARM_UP + ROUNDS * len(SHARES)}", "logging.grid_every=1000", "logging.checkpoint_every=1000"]
        experiment = load(recipe, [*steps, f"tracking.uri=sqlite:///{temporary}/mlflow.db", *overrides])
        folder, path = Path(temporary) / "run", Path(temporary) / "rows.json"
        folder.mkdir()
        actor = ray.remote(SlowActor).options(num_cpus=experiment.cluster.reward_cpus).remote(experiment, os.getcwd())
        micro_batch = ray.get(actor.micro_batch.remote())
        fit(experiment, folder, SlowPool((actor,), micro_batch, experiment.cluster.reward_deadline_s, path=path), where)
        rows = np.array(json.loads(path.read_text()))[WARM_UP:]
    good = True
    for share in SHARES:
        _, latency, window, exposed = rows[rows[:, 0] == share].T
        line = (
            f"share {share:4.2f}: {len(latency)} rounds, window {np.median(window):.3f} s, latency {np.median(latency):.3f} s, "
        )
        line += f"exposed median {np.median(exposed) * 1e3:.1f} ms, largest {exposed.max() * 1e3:.1f} ms"
        if share:
            hidden = 1 - exposed.sum() / latency.sum()
            drawn = np.random.default_rng(0).integers(len(latency), size=(10_000, len(latency)))
            low, high = np.percentile(1 - exposed[drawn].sum(1) / latency[drawn].sum(1), [2.5, 97.5])
            good &= bool(low >= BOUND)
            line += f", hidden {hidden:.1%}  95 % [{low:.1%}, {high:.1%}]"
        print(line)
    print(f"bound {BOUND:.0%}: {'ok' if good else 'MISSED'}")
    return good


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-s", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    sys.exit(not main(parser.parse_args().overrides))
