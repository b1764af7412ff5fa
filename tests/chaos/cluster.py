"""Kills what a run on Ray consists of, and goes on with the same call: it must end as if nothing had been, to the last
bit.

    python tests/chaos/cluster.py [--only worker driver node notice]

Runs of two workers, each a driver of its own with a cluster of three nodes on this machine: a head, and two that have
place for one worker each, of which the second is not needed until the first is gone. Killed is, some steps after the
first checkpoint, one worker (SIGKILL), the driver and with it its cluster (SIGKILL), a worker's node (all its processes
at once), a worker's node after notice, as spot machines are taken away; and the worker again in a run with reward
actors. Checkpoint and metrics of each are compared with those of an undisturbed run, and what was killed after notice
may have lost no step. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
STEPS = 16
KINDS = ("worker", "driver", "node", "notice", "worker beside actors")
DRIVER = """
import json, sys, time, threading
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from diffinstruct.cluster.train import run
from diffinstruct.config.reading import load
folder, kind, place = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cluster = Cluster()
cluster.add_node(num_cpus=4, include_dashboard=False)
workers = [cluster.add_node(num_cpus=2, resources={"trainer": 1}) for _ in range(3)]
ray.init(address=cluster.address, log_to_driver=False)

def lose():
    while not (folder / "checkpoints/step-00000003").exists():
        time.sleep(0.02)
    time.sleep(1)
    from diffinstruct.cluster.ray_private import state
    actors = state.actor_table(None).values()
    there = {actor["Address"]["NodeID"] for actor in actors if actor["ActorClassName"] == "RayTrainWorker"}
    node = next(node for node in workers if node.node_id in there)
    if kind == "notice":
        from ray.core.generated.autoscaler_pb2 import DrainNodeReason
        from ray._raylet import GcsClient
        deadline = int(time.time() * 1000) + 60_000
        reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        drained = GcsClient(address=cluster.gcs_address).drain_node(node.node_id, reason, "spot", deadline)
        print("drained", drained, flush=True)
        while '"preemption"' not in (folder / "journal.jsonl").read_text(encoding="utf-8"):
            time.sleep(0.1)
        time.sleep(2)
    cluster.remove_node(node, allow_graceful=False)
    print("removed", flush=True)

if kind in ("node", "notice"):
    threading.Thread(target=lose, daemon=True).start()
run(load(folder.parent / f"{place}.yaml"), folder)
ray.shutdown()
cluster.shutdown()
"""


def start(folder: Path, kind: str, place: str) -> subprocess.Popen[bytes]:
    path = os.pathsep.join(map(str, (ROOT / "tests", ROOT / "platform", ROOT)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    environment["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] = "1" if kind == "notice" else "0"
    environment |= {"RAY_raylet_start_wait_time_s": "300", "RAY_worker_register_timeout_seconds": "300"}
    environment |= {"RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000"}
    with (folder.parent / f"{folder.name}.txt").open("a") as output:
        command = [sys.executable, "-c", DRIVER, str(folder), kind, place]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=output)


def kill(process: subprocess.Popen[bytes], kind: str) -> None:
    """One of the workers, or the driver and all that it has started."""
    family = psutil.Process(process.pid).children(recursive=True)
    if kind == "driver":
        process.kill()
        for each in family:
            each.kill()
        psutil.wait_procs(family)
        process.wait()
        return
    for each in family:
        if "RayTrainWorker" in " ".join(each.cmdline()):
            each.kill()
            return
    raise RuntimeError("there is no worker to kill")


def starts(folder: Path) -> int:
    lines = (folder / "output.txt").read_text().splitlines() if (folder / "output.txt").exists() else []
    return sum(line.startswith("run ") for line in lines)


def one(folder: Path, kind: str) -> list[str]:
    """A run and its mishap; what is not as in the undisturbed one."""
    from chaos.rewards import compare

    place = "actor" if "actors" in kind else "process"
    run = folder / kind.replace(" ", "-")
    process = start(run, kind, place)
    if kind not in ("node", "notice"):
        while not (run / "checkpoints/step-00000003").exists():
            assert process.poll() is None, (folder / f"{run.name}.txt").read_text()[-2000:]
            time.sleep(0.02)
        time.sleep(1)
        kill(process, kind)
        if kind == "driver":
            process = start(run, "again", place)
    if process.wait():
        return [f"status {process.returncode}: {(folder / f'{run.name}.txt').read_text()[-500:]}"]
    faults = compare(folder / f"calm-{place}", run)
    if starts(run) != 2:
        faults.append(f"{starts(run)} starts")
    if kind == "notice":
        records = [json.loads(line) for line in (run / "journal.jsonl").read_text().splitlines() if line]
        cut = [i for i, record in enumerate(records) if "start" in record][1]
        done = max(record["step"] for record in records[:cut] if "metrics" in record)
        begun = [line for line in (run / "output.txt").read_text().splitlines() if line.startswith("run ")][1]
        if not any(f"from step {step} " in begun for step in (done, done - 1)):  # the machine may go while one is saved
            faults.append(f"after notice step {done} was reached, and the run went on: {begun}")
    return faults


def chaos(folder: Path, kinds: tuple[str, ...] = KINDS) -> tuple[str, bool]:
    """All of it, in `folder`. Returns a line for each kind, and whether all is well."""
    from tiny import pipelines

    from diffinstruct.config.experiment import Experiment

    slow = {"trained": [{"name": "tiny.rewards:Slow"}], "held_out": ["tiny.rewards:Calm"]}
    often = {"every": 1, "grid_every": 100, "grid_prompts": 2, "checkpoint_every": 3}
    base = pipelines.experiment(folder, steps=STEPS, rewards=slow, overoptimization={"every": 5}, logging=often).model_dump()
    for place in ("process", "actor"):
        if any(("actors" in kind) == (place == "actor") for kind in kinds):
            cluster = {"workers": 2, "worker_resources": {"trainer": 1}, "rewards": {"placement": place, "cpus": 0.5}}
            (folder / f"{place}.yaml").write_text(Experiment.model_validate(base | {"cluster": cluster}).to_yaml())
            assert start(folder / f"calm-{place}", "nothing", place).wait() == 0, (folder / f"calm-{place}.txt").read_text()
    lines, good = [], True
    for kind in kinds:
        began = time.monotonic()
        faults = one(folder, kind)
        good = good and not faults
        said = f"DIFFERENT: {'; '.join(faults[:4])}" if faults else "equal to the last bit"
        lines.append(f"{kind} killed, {time.monotonic() - began:.0f} s: {said}")
        print(lines[-1], flush=True)
    return "\n".join(lines), good


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT / "tests"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--keep", type=Path, help="leave everything in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        where = asked.keep or Path(temporary)
        where.mkdir(parents=True, exist_ok=True)
        _, good = chaos(where, tuple(asked.only))
    sys.exit(not good)
