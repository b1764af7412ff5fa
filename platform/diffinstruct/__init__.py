"""Diff-Instruct*: one-step text-to-image generators aligned with human preference.

The public face. Each name is imported when it is first used, so `import diffinstruct` costs nothing:

    import diffinstruct

    experiment = diffinstruct.load("experiments/recipes/pocket.yaml", ["steps=60"])
    result = diffinstruct.train(experiment)                                   # on Ray; local=True: in this process
    pictures = diffinstruct.generate(result.export, ["a tulip in a yellow pot"])
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffinstruct.config.experiment import Experiment as Experiment
    from diffinstruct.config.reading import load as load
    from diffinstruct.errors import UserError as UserError
    from diffinstruct.evaluation.comparison import compare_runs as compare
    from diffinstruct.evaluation.generators import evaluate_generators as evaluate
    from diffinstruct.models.export import generate as generate
    from diffinstruct.reward_service.score_folder import validate_on_folder as validate_reward
    from diffinstruct.sweeps.criterion import SelectionCriterion as SelectionCriterion
    from diffinstruct.sweeps.points import Optuna as Optuna
    from diffinstruct.sweeps.points import grid as grid
    from diffinstruct.sweeps.points import random_points as random_points
    from diffinstruct.sweeps.tune import sweep as sweep
    from diffinstruct.training.run_log import Result as Result

__version__ = "0.2.0.dev0"

_HOMES = {
    "Experiment": "config.experiment:Experiment",
    "Optuna": "sweeps.points:Optuna",
    "Result": "training.run_log:Result",
    "SelectionCriterion": "sweeps.criterion:SelectionCriterion",
    "UserError": "errors:UserError",
    "compare": "evaluation.comparison:compare_runs",
    "evaluate": "evaluation.generators:evaluate_generators",
    "generate": "models.export:generate",
    "grid": "sweeps.points:grid",
    "load": "config.reading:load",
    "random_points": "sweeps.points:random_points",
    "sweep": "sweeps.tune:sweep",
    "validate_reward": "reward_service.score_folder:validate_on_folder",
}
"""Public name -> the module below this package, and the name there."""

__all__ = [
    "Experiment",
    "Optuna",
    "Result",
    "SelectionCriterion",
    "UserError",
    "compare",
    "evaluate",
    "generate",
    "grid",
    "load",
    "random_points",
    "sweep",
    "train",
    "validate_reward",
]


def train(experiment: Experiment, folder: Path | str | None = None, local: bool = False) -> Result:
    """Train `experiment`, or go on with the run that lies in its folder; returns the run's Result.

    Args:
        folder: the run's folder; None: the one that `diffinstruct train` would take, <output_dir>/<name>-<hash>.
        local: train in this process; otherwise on Ray, on the cluster of RAY_ADDRESS or on this machine.

    Raises UserError for a mistake that the user can mend, RewardError, NonFiniteGradient, CheckpointError or ClusterError where
    the run broke off, and Paused after SIGTERM; in all cases the same call goes on from the last checkpoint.
    """
    from diffinstruct.run_folder.location import folder_of_run

    place = folder_of_run(experiment) if folder is None else Path(folder).absolute()
    if local:
        from diffinstruct.training.local import run
    else:
        from diffinstruct.cluster.train import run
    return run(experiment, place)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), attribute)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
