"""Where a run's folder lies."""

from pathlib import Path

from diffinstruct.config.experiment import Experiment


def folder_of_run(experiment: Experiment) -> Path:
    """The absolute path of a configuration's run, <output_dir>/<name>-<hash>: the same command finds it again."""
    return Path(experiment.output_dir).absolute() / f"{experiment.name}-{experiment.config_hash}"
