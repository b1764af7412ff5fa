"""Ten thousand steps of a tiny run: does it take more and more of anything?

    python tests/chaos/endurance.py [--steps 10000]

Without Ray, with looks, rows of metrics, picture grids and checkpoints as often as a run of that length has them. After
a tenth of the steps as a warm-up resident memory may grow by no more than 1 %, open files not at all, and there may be
one checkpoint more than are kept. Exit status 1 if not.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
LOOKS = 100  # how often all is measured
KEEP = 2  # and the best one


def chaos(folder: Path, steps: int) -> tuple[str, bool]:
    """All of it, in `folder`. Returns the line that says it all, and whether all is well."""
    import numpy as np
    import psutil
    import torch
    from tiny import pipelines

    from diffinstruct.method.step import alternating_round
    from diffinstruct.training import local, loop

    torch.set_num_threads(1)
    often = {"every": 5, "grid_every": 500, "grid_prompts": 2, "checkpoint_every": 50}
    experiment = pipelines.experiment(folder, steps=steps, global_batch_size=2, overoptimization={"every": 200}, logging=often)
    process, seen, checkpoints = psutil.Process(), list[tuple[int, int]](), 0

    def watched(train_state: Any, settings: Any, schedule: Any, draws: Any, *rest: Any) -> Any:
        nonlocal checkpoints
        checkpoints = max(checkpoints, len(list((folder / "run/checkpoints").glob("step-????????"))))
        if draws.step % max(1, steps // LOOKS) == 0:
            seen.append((process.memory_info().rss, process.num_fds()))
        return alternating_round(train_state, settings, schedule, draws, *rest)

    loop.alternating_round = watched
    began = time.monotonic()
    local.run(experiment, folder / "run")
    memory, files = np.array(seen[len(seen) // 10 :]).T
    edge = len(memory) // 5  # single readings go up and down with what the tracker is at
    growth = np.median(memory[-edge:]) / np.median(memory[:edge]) - 1
    more_files = int(np.median(files[-edge:]) - np.median(files[:edge]))
    good = growth <= 0.01 and more_files <= 0 and checkpoints <= KEEP + 1
    return (
        f"{steps} steps, {time.monotonic() - began:.0f} s: memory {np.median(memory[:edge]) / 2**20:.0f} MiB, "
        f"{growth:+.2%} in the end (at most {memory.max() / np.median(memory[:edge]) - 1:+.2%}), "
        f"{int(np.median(files[:edge]))} files, {more_files:+d}; at most {checkpoints} checkpoints: "
        + ("nothing grows" if good else "IT GROWS")
    ), bool(good)


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(TESTS))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        line, good = chaos(Path(temporary), asked.steps)
    print(line)
    sys.exit(not good)
