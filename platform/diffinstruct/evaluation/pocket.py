"""The built-in world's evaluation, for the experiments on it.

756 prompts: 500 of held-out combinations with the face named, 256 with the face left open. Distances are measured to
378 pictures that the reference made of every second prompt, 50 guided steps, other noise.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffinstruct.evaluation.world import evaluate_in, stored_evaluation
from diffinstruct.metrics import find_metric
from diffinstruct.models.export import load_export
from diffinstruct.models.world import POCKET, read_world
from diffinstruct.reports.frames import flat

if TYPE_CHECKING:
    from diffinstruct.config.experiment import Experiment

WORLD = read_world(POCKET)
TITLES = {name: metric.title for name in WORLD.table if (metric := find_metric(name, WORLD.metrics()))}
"""Metric -> what tables call it."""
evaluate_generator = partial(evaluate_in, WORLD)
reference_evaluation = partial(stored_evaluation, WORLD)
"""The reference at 50 guided steps; experiments/build_pocket_world.py made it."""


def evaluate_run(experiment: Experiment, folder: Path, every: int = 1) -> dict[str, float]:
    """Every metric of a finished run's generator, as columns of a sweep's table; `every` as in `evaluate_in`."""
    reference, generator = load_export(folder / "export")
    return flat(evaluate_generator(reference.sampler(generator), every=every).summary())
