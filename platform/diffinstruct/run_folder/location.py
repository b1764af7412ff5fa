"""Where a run's folder lies."""

from pathlib import Path

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError


def folder_of_run(experiment: Experiment) -> Path:
    """The absolute path of a configuration's run, <output_dir>/<name>-<hash>: the same command finds it again."""
    try:
        output_dir = Path(experiment.output_dir).expanduser()
    except RuntimeError:  # not checked with the other keys: a run's own experiment.yaml may come from elsewhere
        raise UserError(f"output_dir: the home directory in {experiment.output_dir!r} does not exist on this machine") from None
    return output_dir.absolute() / f"{experiment.name}-{experiment.config_hash}"
