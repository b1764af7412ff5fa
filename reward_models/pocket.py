"""The pocket world's two preference models, of PickScore's form; they lie in the trainer's package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .clip import load_tower, shared_tower
from .pickscore import PickScore


def pocket_preference() -> PickScore:
    """The one to train on."""
    return PickScore(shared_tower(load_tower, _pocket("preference")))


def pocket_judge() -> PickScore:
    """The second, of other data and seed: held out."""
    return PickScore(shared_tower(load_tower, _pocket("judge")))


def _pocket(name: str) -> Path:
    """The package is located, never imported: rewards stand alone."""
    spec = importlib.util.find_spec("diffinstruct")
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError("the pocket rewards lie in the package diffinstruct, which is not installed here")
    folder = Path(next(iter(spec.submodule_search_locations)), "pocket", name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; experiments/build_pocket_world.py builds it")
    return folder
