"""A run without Ray: one process, rewards in it. For a debugger, for GPU machines without Ray, for tests."""

from __future__ import annotations

from pathlib import Path

from diffinstruct import orders
from diffinstruct.experiment import Experiment
from diffinstruct.run import Result, missing_embeddings, store_embeddings, train
from diffinstruct.tracking import Parent


def run(experiment: Experiment, folder: Path, parent: Parent | None = None) -> Result:
    """Train `experiment` in `folder` (absolute), or go on with what is there."""
    orders.withdraw(folder)
    if missing := missing_embeddings(experiment):
        print(f"prompt embeddings: {len(missing)} to make in {experiment.prompts.embeddings}", flush=True)
        store_embeddings(experiment, missing)
    with orders.on_sigterm(lambda: orders.give(folder, orders.PAUSE)):
        result = train(experiment, folder, parent=parent)
    assert result is not None  # this process is rank 0
    return result
