"""How long a checkpoint stops the training: a blocking save beside one that a thread writes.

    python benchmarks/checkpoint.py [--pairs 24] [--mib 64 256]

The state is that of a run: two networks, an average, two Adams, in fp32 tensors of a U-Net's sizes. Both ways take
turns, and rounds of arithmetic (matrix products in this process) follow until the checkpoint is there. Judged is the
wall time for which
the training is held: by `save`, or by `start_save` and each `finish_save`; median of the ratio over pairs, 95 % bootstrap
interval. What
the rounds meanwhile take longer than undisturbed ones is told beside it: thread and rounds share the machine's cores.
Exit status 1 where the bound is exceeded.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffinstruct.run_folder.checkpoint import CheckpointStore

BOUND = 0.10
UNDISTURBED = 100
"""Rounds, after each checkpoint."""


def state(mib: int) -> dict[str, Any]:
    """Seven copies of a network's weights, as a run has: two networks, an average, two moments of each."""
    sizes, left = [], mib * 2**20 // 4 // 7
    while left > 0:
        sizes.append(min(left, 512 * 512 * 9))
        left -= sizes[-1]
    names = ("generator", "score_network", "ema", "exp_avg", "exp_avg_sq", "score_exp_avg", "score_exp_avg_sq")
    return {name: {f"layer.{i}.weight": torch.randn(size) for i, size in enumerate(sizes)} for name in names}


def work() -> float:
    """A round; its seconds."""
    began, one = time.perf_counter(), torch.randn(256, 256)
    for _ in range(20):
        one = one @ one / 256
    return time.perf_counter() - began


def lost(store: CheckpointStore, step: int, content: dict[str, Any], blocking: bool) -> tuple[float, float]:
    """Seconds for which the training was held for one checkpoint, and those by which its rounds were slower."""
    began = time.perf_counter()
    (store.save if blocking else store.start_save)(step, content)
    stood, beside = time.perf_counter() - began, list[float]()
    while not (store.folder / f"step-{step:08d}").exists():
        beside.append(work())
        began = time.perf_counter()
        store.finish_save()
        stood += time.perf_counter() - began
    return stood, sum(beside) - len(beside) * float(np.mean([work() for _ in range(UNDISTURBED)]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--mib", type=int, nargs="+", default=[64, 256], help="of the state")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    good, random = True, np.random.default_rng(0)
    for mib in asked.mib:
        content = state(mib)
        with tempfile.TemporaryDirectory() as folder:
            store = CheckpointStore(Path(folder))
            store.save(0, content)
            pairs = []
            for pair in range(asked.pairs):
                order = (True, False) if pair % 2 else (False, True)
                times = {blocking: lost(store, 1 + 2 * pair + i, content, blocking) for i, blocking in enumerate(order)}
                pairs.append((times[False][0], times[True][0], times[False][1]))
        threads, saves, slower = np.array(pairs).T
        ratios = threads / saves
        drawn = np.median(random.choice(ratios, (2000, len(ratios))), axis=1)
        low, high = np.quantile(drawn, [0.025, 0.975])
        ratio = float(np.median(ratios))
        good = good and ratio <= BOUND
        print(
            f"{mib} MiB: a save holds the training for {np.median(saves):.3f} s, one by a thread for {np.median(threads):.3f} "
            f"s (rounds meanwhile {np.median(slower):+.3f} s); ratio {ratio:.3f} [{low:.3f}, {high:.3f}], {asked.pairs} pairs "
            f"(at most {BOUND}): {'kept' if ratio <= BOUND else 'MISSED'}",
            flush=True,
        )
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
