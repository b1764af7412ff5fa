"""The pocket world's two preference models, of PickScore's form; they lie in the trainer's package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from .clip import load_tower, shared_tower
from .pickscore import PickScore

ENTRIES = {
    "pocket_preference": {
        "line": "the pocket world's simulated annotator, the one to train on",
        "range": "about 3.3 to 5.3 on average over the world's prompts",
        "paper": "-",
        "weights": "in the package",
        "licences": "Apache-2.0",
    },
    "pocket_judge": {
        "line": "the pocket world's simulated annotator, of other data and seed: held out",
        "range": "about 2.8 to 3.2 on average over the world's prompts",
        "paper": "-",
        "weights": "in the package",
        "licences": "Apache-2.0",
    },
}


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
