"""What is read from elsewhere: prompts and modules that a run names, looked for before anything heavy is imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from diffinstruct.config.addresses import redact
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import POCKET
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.errors import NOT_SENT, UserError, did_you_mean, in_job_copy, left_behind

WEIGHT_FILES = (".safetensors", ".ckpt", ".bin", ".pt", ".pth")
SHARED_PATH = "give an absolute path that all machines see, as /mnt/shared/..."


def check_inputs(experiment: Experiment) -> None:
    """Raises UserError for prompts that cannot be read, modules of rewards or stores that are not there, and paths that
    mean nothing in a job."""
    _check_job(experiment)
    for key in ("train", "grid"):
        try:
            read_prompt_set(getattr(experiment.prompts, key), experiment.prompts.column)
        except UserError as error:
            raise UserError(f"prompts.{key}: {error}") from None
    if experiment.mirror:
        _check_store(experiment.mirror)
    if "RAY_ADDRESS" in os.environ:  # a cluster that is elsewhere may have what is not here
        return
    apart = experiment.cluster.rewards.apart  # their environments may have it, too
    for name in experiment.rewards.names:
        if ":" in name and name not in apart and (missing := _missing_module(name.partition(":")[0])):
            raise UserError(
                f"rewards: {name!r}: there is no module {missing!r}, neither in this folder nor installed{left_behind()}"
            )


def names_a_file(name: str) -> bool:
    """Whether a model's name can only be a file's or a folder's, not a hub id."""
    return Path(name).suffix in WEIGHT_FILES or name.startswith((".", "~", "/")) or name.count("/") > 1


def relative_paths(experiment: Experiment) -> dict[str, str]:
    """Keys that name a file or a folder which is read, by a relative path -> that path."""
    prompts, paths = experiment.prompts, dict[str, str]()
    for key, name in (("reference.model", experiment.reference.model), ("generator.init_from", experiment.generator.init_from)):
        if names_a_file(name) or ("/" in name and Path(name).exists()):
            paths[key] = name
    for key, source in (("prompts.train", prompts.train), ("prompts.grid", prompts.grid)):
        if source.partition(":")[0] not in (POCKET, "datasets"):
            paths[key] = source
    if prompts.embeddings:
        paths["prompts.embeddings"] = prompts.embeddings
    return {key: path for key, path in paths.items() if not Path(path).is_absolute()}


def refuse_passing_copy(key: str, path: Path) -> None:
    """Raises UserError for what would be written into a job's working directory: a copy that Ray clears away, one on
    each machine."""
    if in_job_copy(path):
        raise UserError(f"{key}: {path} lies in Ray's passing copy of the job's folder and would be lost; {SHARED_PATH}")


def _check_job(experiment: Experiment) -> None:
    """Raises UserError for a relative path that is to be written in a job's copy of its folder, or has not come with it."""
    if not in_job_copy(Path.cwd()):
        return
    for key, path in relative_paths(experiment).items():
        if key == "prompts.embeddings":
            refuse_passing_copy(key, Path(path).absolute())
        if not Path(path).exists():
            raise UserError(f"{key}: {path} {NOT_SENT}; {SHARED_PATH}")


def import_named(key: str, path: str) -> Any:
    """What `module:attribute` names. Raises UserError, one line that begins with `key`, where nothing has this name."""
    module, _, attribute = path.partition(":")
    try:
        namespace = importlib.import_module(module)
    except Exception as error:  # whatever stands in somebody's module
        hint = left_behind() if isinstance(error, ModuleNotFoundError) else ""
        raise UserError(f"{key}: cannot import {path!r}: {' '.join(str(error).split())}{hint}") from None
    if not hasattr(namespace, attribute):
        raise UserError(f"{key}: {path!r}: {module} has no {attribute!r}{did_you_mean(attribute, vars(namespace))}")
    return getattr(namespace, attribute)


def _check_store(url: str) -> None:
    import fsspec

    if url.startswith("memory:"):
        raise UserError(f"mirror: {url}: is gone with the process")
    try:
        fsspec.get_filesystem_class(url.partition("://")[0])
    except ImportError as error:
        raise UserError(f"mirror: {redact(url)}: {error}") from None


def _missing_module(path: str) -> str | None:
    """A dotted module that is not there, for all that can be told without importing anything."""
    first, *others = parts = path.split(".")
    found = importlib.util.find_spec(first)
    for i in range(len(others)):
        if found is None or found.submodule_search_locations is None:
            break
        found = PathFinder.find_spec(".".join(parts[: i + 2]), found.submodule_search_locations)
    return path if found is None else None
