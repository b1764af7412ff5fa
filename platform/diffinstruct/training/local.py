"""A run without Ray: one process, rewards in it. For a debugger, for GPU machines without Ray, for tests."""

import os
from pathlib import Path

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.memory import allocator_settings
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.signals import Signal
from diffinstruct.tracking.journal import Parent, deliver_rest
from diffinstruct.training.build import missing_embeddings, store_embeddings
from diffinstruct.training.loop import Result, train


def run(experiment: Experiment, folder: Path, parent: Parent | None = None) -> Result:
    """Train `experiment` in `folder` (absolute), or go on with what is there."""
    os.environ.update(allocator_settings())
    signals.clear(folder)
    missing, line = missing_embeddings(experiment)
    if missing:
        print(line, flush=True)
        store_embeddings(experiment, missing)
    with signals.on_sigterm(lambda: signals.request(folder, Signal.PAUSE)):
        result = train(experiment, folder, parent=parent)
    assert result is not None  # this process is rank 0
    if experiment.tracking.log_model:
        deliver_rest(folder, experiment.tracking, result.export)
    return result
