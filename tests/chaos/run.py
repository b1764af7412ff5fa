"""Kills a run again and again, and goes on with the same call: it must end as if nothing had been, to the last bit.

    python tests/chaos/run.py [--kills 50] [--mirror] [--seed 0]

Two runs on the tiny pipeline without Ray, one undisturbed; the other one's process gets SIGKILL at moments drawn by the
seed, before, within and after rounds, looks and saves. Runs that end before their time is up are followed by another
one, until there have been so many kills. Final checkpoint, all metrics but the times, exported weights and what the
tracker has are compared. With --mirror the run's whole folder goes with its process each time, and what is left is its
copy in a store; then the tracker may have values twice, and those of a run that was lost before its first checkpoint.
Exit status 1 if they differ.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
STEPS = 20


def chaos(folder: Path, kills: int, seed: int = 0, mirror: bool = False) -> tuple[str, bool]:
    """All of it, in `folder`. Returns the line that says it all, and whether all is well."""
    import torch
    from chaos.rewards import compare
    from safetensors.torch import load_file
    from tiny import pipelines

    torch.set_num_threads(1)
    logging = {"every": 1, "grid_every": 7, "checkpoint_every": 3}
    store = (folder / "store").as_uri() if mirror else None
    experiment = pipelines.experiment(folder, steps=STEPS, overoptimization={"every": 5}, logging=logging, mirror=store)

    def life(run: Path, seconds: float | None) -> bool:
        """The run's call in a process of its own, killed after so many; whether it has come to the run's end."""
        child = os.fork()
        if child == 0:
            from diffinstruct.training import local

            status = 1
            with (folder / "output.txt").open("a") as output:
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                try:
                    local.run(experiment, run)
                    status = 0
                finally:
                    os._exit(status)
        if seconds is not None:
            time.sleep(seconds)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status):
            raise RuntimeError((folder / "output.txt").read_text()[-2000:])
        return os.WIFEXITED(status)

    began = time.monotonic()
    assert life(folder / "calm", None)
    calm = time.monotonic() - began
    plan, killed, runs, differences = random.Random(seed), 0, 0, list[str]()
    places: Counter[str] = Counter()
    while killed < kills:
        run = folder / f"wild-{runs}"
        while killed < kills and not life(run, plan.uniform(0, calm)):
            killed += 1
            places[newest(folder / "store" / run.name if mirror else run)] += 1
            if mirror:
                shutil.rmtree(run)
        life(run, None)
        runs += 1
        differences += compare(folder / "calm", run)
        exported = [load_file(path / "export/unet/diffusion_pytorch_model.safetensors") for path in (folder / "calm", run)]
        differences += [f"export {name}" for name, one in exported[0].items() if not torch.equal(one, exported[1][name])]
        differences += tracked(experiment.tracking.uri, run.name, mirror)
    took = time.monotonic() - began
    at = ", ".join(f"{n} at {place}" for place, n in sorted(places.items()))
    return (
        f"{killed} kills in {runs} runs of {STEPS} rounds ({at}), {took:.0f} s (undisturbed {calm:.1f} s): "
        + (f"DIFFERENT: {', '.join(differences[:5])}" if differences else "all runs equal the undisturbed one to the last bit")
    ), not differences


def newest(run: Path) -> str:
    steps = [path.parent.name for path in (run / "checkpoints").glob("step-" + 8 * "[0-9]" + "/manifest.json")]
    return max(steps, default="no checkpoint").replace("step-000000", "step ")


def tracked(uri: Any, name: str, lost: bool) -> list[str]:
    """What the tracker has of a run and of the undisturbed one that is not the same: each value once, times excepted;
    of a run whose journal was lost at times at least once, in the last of its runs."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    found = []
    for wanted in ("calm", name):
        named = [run for run in runs if run.info.run_name == wanted]
        if (len(named) != 1 and not lost) or named[0].info.status != "FINISHED":
            return [f"tracker: {[run.info.status for run in named]} for {wanted}"]
        keys = [key for key in named[0].data.metrics if not key.startswith(("time/", "throughput/"))]
        histories = {key: client.get_metric_history(named[0].info.run_id, key) for key in keys}
        values = {key: [(value.step, repr(value.value)) for value in of] for key, of in histories.items()}
        found.append({key: sorted(set(of) if lost else of) for key, of in values.items()})
    return [f"tracker {key}" for key in found[0] | found[1] if found[0].get(key) != found[1].get(key)]


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(TESTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--mirror", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        line, good = chaos(Path(temporary), asked.kills, asked.seed, asked.mirror)
    print(line)
    sys.exit(not good)
