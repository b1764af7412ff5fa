"""A sweep whose driver is killed at random points is finished by the same command, and its table is the undisturbed
one's.

    python tests/chaos/sweep.py [--kills 5] [--seed 0] [--keep FOLDER]

Six trials of the tiny pipeline, two at a time, rounds slowed down by their reward. Each life of the driver is killed
(SIGKILL, and with it its Ray) a random while after its first trial has begun or gone on. Then: no finished trial has
been started again, every trial has one run in MLflow, and all of the table's figures but the times are equal.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import psutil

ROOT = Path(__file__).parents[2]
DRIVER = """
import sys
from pathlib import Path
from diffinstruct.sweeps.points import changed, grid
from diffinstruct.sweeps.tune import sweep
from diffinstruct.config.reading import load
folder = Path(sys.argv[1])
sweep(load(folder.parent / "base.yaml"), grid({"objective.reward_scale": [0.3, 1.0, 3.0], "seed": [1, 2]}), folder)
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="leave everything in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        return chaos(asked.keep or Path(temporary), asked.kills, random.Random(asked.seed))


def chaos(folder: Path, kills: int, chance: random.Random) -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import pipelines

    folder.mkdir(parents=True, exist_ok=True)
    base = pipelines.experiment(
        folder,
        steps=60,
        rewards={"trained": [{"name": "tiny.rewards:Slow"}], "held_out": ["tiny.rewards:Calm"]},
        logging={"every": 4, "grid_every": 1000, "grid_prompts": 2, "checkpoint_every": 6},
        cluster={"rewards": {"cpus": 0.0}},
    )
    (folder / "base.yaml").write_text(base.to_yaml())

    began = time.monotonic()
    undisturbed = start(folder / "undisturbed")
    assert undisturbed.wait() == 0, "the undisturbed sweep has failed"
    print(f"undisturbed: {time.monotonic() - began:.0f} s", flush=True)
    lives = 0
    for _ in range(kills):
        before = starts(folder / "killed")
        driver = start(folder / "killed")
        lives += 1
        while starts(folder / "killed") == before and driver.poll() is None:
            time.sleep(0.05)
        wait = chance.uniform(0, 60)
        time.sleep(wait)
        if driver.poll() is not None:
            print(f"life {lives}: ended by itself, status {driver.returncode}")
            break
        kill(driver)
        print(f"life {lives}: killed {wait:.1f} s later; {finished(folder / 'killed')} of 6 have finished", flush=True)
    status = start(folder / "killed").wait()
    print(f"life {lives + 1}: ended by itself, status {status}")
    return judge(folder, status)


def start(sweep: Path) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "platform", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    with (sweep.parent / f"{sweep.name}.txt").open("a") as output:
        return subprocess.Popen([sys.executable, "-c", DRIVER, sweep], env=environment, stdout=output, stderr=output)


def kill(driver: subprocess.Popen[bytes]) -> None:
    """The driver first; what of its Ray outlives it by more than a moment, after it."""
    family = psutil.Process(driver.pid).children(recursive=True)
    driver.kill()
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    for process in alive:
        process.kill()
    psutil.wait_procs(alive)


def records(run: Path) -> list[dict[str, object]]:
    lines = (run / "journal.jsonl").read_text().splitlines() if (run / "journal.jsonl").exists() else []
    found = []
    for line in filter(None, lines):
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # torn by a kill
    return found


def runs(sweep: Path) -> list[Path]:
    return sorted(path.parent for path in sweep.glob("*/experiment.yaml"))


def starts(sweep: Path) -> int:
    return sum("start" in record for run in runs(sweep) for record in records(run))


def finished(sweep: Path) -> int:
    return sum((run / "metrics.json").exists() for run in runs(sweep))


def judge(folder: Path, status: int) -> int:
    from mlflow import MlflowClient

    one, other = (pd.read_csv(folder / name / "table.csv") for name in ("undisturbed", "killed"))
    aside = [key for key in one if key == "run" or key.startswith(("time/", "throughput/"))]
    equal = one.drop(columns=aside).equals(other.drop(columns=aside))
    again = 0
    for run in runs(folder / "killed"):
        marks = [record for record in records(run) if record.keys() & {"start", "finish"}]
        ends = [i for i, record in enumerate(marks) if record.get("finish") == "FINISHED"]
        again += bool(ends) and len(marks) > ends[0] + 1
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    tracked = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    children = [run for run in tracked if run.data.tags.get("mlflow.parentRunId") and run.info.status == "FINISHED"]
    print(f"table equal: {equal}; finished trials begun again: {again}; MLflow: {len(tracked)} runs, {len(children)} trials")
    good = status == 0 and equal and not again and len(tracked) == 14 and len(children) == 12
    print("ok" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
