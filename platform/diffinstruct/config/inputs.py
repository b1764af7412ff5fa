"""What a run reads from elsewhere, looked for before anything heavy is imported: its prompts, the modules of its
rewards."""

from __future__ import annotations

import importlib.util
import os
from importlib.machinery import PathFinder

from diffinstruct.config.addresses import redact
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompt_set
from diffinstruct.errors import UserError


def check_inputs(experiment: Experiment) -> None:
    """Raises UserError for prompts that cannot be read, a reward whose module is nowhere, a mirror whose package is
    missing."""
    for key in ("train", "grid"):
        try:
            read_prompt_set(getattr(experiment.prompts, key), experiment.prompts.column)
        except UserError as error:
            raise UserError(f"prompts.{key}: {error}") from None
    if experiment.mirror:
        _check_store(experiment.mirror)
    if "RAY_ADDRESS" in os.environ:  # a cluster that is elsewhere may have what is not here
        return
    apart = {name for environment in experiment.cluster.rewards.environments for name in environment.rewards}  # so may these
    for name in experiment.rewards.names:
        if ":" in name and name not in apart and (missing := _missing_module(name.partition(":")[0])):
            raise UserError(f"rewards: {name!r}: there is no module {missing!r}, neither in this folder nor installed")


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
