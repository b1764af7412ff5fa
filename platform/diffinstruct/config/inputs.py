"""What is read from elsewhere: prompts and modules that a run names, looked for before anything heavy is imported."""

from __future__ import annotations

import importlib
import importlib.util
import os
from importlib.machinery import PathFinder
from typing import Any

from diffinstruct.config.addresses import redact
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.errors import UserError, did_you_mean


def check_inputs(experiment: Experiment) -> None:
    """Raises UserError for prompts that cannot be read, and modules of rewards or stores that are not there."""
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
            raise UserError(f"rewards: {name!r}: there is no module {missing!r}, neither in this folder nor installed")


def import_named(key: str, path: str) -> Any:
    """What `module:attribute` names. Raises UserError, one line that begins with `key`, where nothing has this name."""
    module, _, attribute = path.partition(":")
    try:
        namespace = importlib.import_module(module)
    except Exception as error:  # whatever stands in somebody's module
        raise UserError(f"{key}: cannot import {path!r}: {' '.join(str(error).split())}") from None
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
