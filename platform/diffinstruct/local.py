"""A run without Ray: one process, rewards in it. For a debugger, for GPU machines without Ray, for tests."""

from __future__ import annotations

from pathlib import Path

from diffinstruct.experiment import Experiment
from diffinstruct.run import Result, train


def run(experiment: Experiment, folder: Path, parent_run_id: str | None = None) -> Result:
    """Train `experiment` in `folder` (absolute), or go on with what is there."""
    result = train(experiment, folder, parent_run_id=parent_run_id)
    assert result is not None  # this process is rank 0
    return result
