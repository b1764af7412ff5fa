"""Kills and stops a run's reward actor, and looks whether the run has noticed: it must not, to the last bit.

    python tests/chaos/rewards.py [--kills 20] [--stops 5] [--seed 0]

Two runs on the tiny pipeline, one undisturbed; in the other one the actor's process gets SIGKILL and SIGSTOP at moments
drawn by the seed. Final checkpoint and all metrics but the times are compared. Exit status 1 if they differ, or if a
disturbance that was planned has not come about.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parents[1]
APART = 3
"""Mean rounds between two disturbances."""


def chaos(folder: Path, kills: int, stops: int, seed: int = 0) -> tuple[str, bool]:
    """Both runs, in `folder`, in the Ray session that there is. Returns the line that says it all, and whether all is
    well."""
    from tiny import pipelines

    from diffinstruct.cluster.reward_pool import reward_pool
    from diffinstruct.cluster.train import fit

    steps = 10 + APART * (kills + stops)
    experiment = pipelines.experiment(
        folder,
        steps=steps,
        logging={"every": 1, "grid_every": steps, "checkpoint_every": steps},
        cluster={"rewards": {"placement": "actor", "deadline_s": 5.0}},
    )
    done: list[str] = []
    began = time.monotonic()
    with reward_pool(experiment) as pool:
        (actor,) = pool.actors()
        fit(experiment, folder / "calm", pool, "")
        calm = time.monotonic() - began
        plan = random.Random(seed)
        signals = [signal.SIGKILL] * kills + [signal.SIGSTOP] * stops
        plan.shuffle(signals)
        moments = sorted(plan.sample(range(1, steps - 3), len(signals)))
        delays = [plan.uniform(0, 0.1) for _ in signals]

        def disturb() -> None:
            for number, moment, delay in zip(signals, moments, delays, strict=True):
                while len(metrics(folder / "wild")) < moment:
                    time.sleep(0.005)
                time.sleep(delay)
                while not (before := signalled(actor, number)):
                    time.sleep(0.005)
                done.append(number.name)
                while process(actor) in (before, 0):  # Ray sees that it is killed; that it is stopped, the run has to find out
                    time.sleep(0.05)

        disturber = threading.Thread(target=disturb, daemon=True)
        disturber.start()
        fit(experiment, folder / "wild", pool, "")
        disturber.join(30)
        restarts = table(actor)["NumRestarts"]
    came = (done.count("SIGKILL"), done.count("SIGSTOP"))
    differences = compare(folder / "calm", folder / "wild")
    good = came == (kills, stops) and restarts >= kills + stops and not differences
    took = time.monotonic() - began
    return (
        f"{steps} rounds, reward actor killed {came[0]} of {kills} times, stopped {came[1]} of {stops} times, "
        f"{restarts} restarts, {took:.0f} s ({calm:.0f} s of them undisturbed): "
        f"{'DIFFERENT: ' + ', '.join(differences[:5]) if differences else 'checkpoint, metrics equal to the last bit'}"
        f"{'' if good or differences else ', but DISTURBED TOO LITTLE'}"
    ), good


def table(actor: Any) -> dict[str, Any]:
    from diffinstruct.cluster.ray_private import state

    return state.actor_table(actor._actor_id.hex(), None, None)


def process(actor: Any) -> int:
    """Its process id, 0 while it is being restarted."""
    found = table(actor)
    return found["Pid"] if found["State"] == "ALIVE" else 0


def signalled(actor: Any, number: signal.Signals) -> int:
    """The process that got the signal, 0 if there was none."""
    found = process(actor)
    try:
        if found:
            os.kill(found, number)
        return found
    except ProcessLookupError:
        return 0


def metrics(folder: Path) -> dict[int, str]:
    """What the journal says of each step, times excepted; as text, in which NaN equals NaN."""
    path = folder / "journal.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    records = [json.loads(line) for line in lines if line]
    return {
        r["step"]: json.dumps({k: v for k, v in r["metrics"].items() if not k.startswith(("time/", "throughput/"))})
        for r in records
        if "metrics" in r
    }


def compare(one: Path, other: Path) -> list[str]:
    """Where two runs differ."""
    from diffinstruct.run_folder.checkpoint import CheckpointStore

    found = [CheckpointStore(folder / "checkpoints").latest() for folder in (one, other)]
    theirs = metrics(other)
    different = [f"metrics of step {step}" for step, said in metrics(one).items() if theirs.get(step) != said]
    assert found[0] and found[1] and len(metrics(one)) > 0
    kept = [path for path in unequal(found[0], found[1]) if "/time/" not in path and "/throughput/" not in path]
    return different + [f"checkpoint {path}" for path in kept]


def unequal(one: Any, other: Any, path: str = "") -> list[str]:
    """Places where two states are not the same, bit for bit."""
    if type(one) is not type(other):
        return [path]
    if isinstance(one, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [path]
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [place for key in one for place in unequal(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [path]
        return [place for i, pair in enumerate(zip(one, other, strict=True)) for place in unequal(*pair, f"{path}/{i}")]
    return [] if repr(one) == repr(other) else [path]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"  # Ray's workers inherit it
    sys.path.insert(0, str(TESTS))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with tempfile.TemporaryDirectory() as temporary:
        line, good = chaos(Path(temporary), asked.kills, asked.stops, asked.seed)
    print(line)
    sys.exit(not good)
