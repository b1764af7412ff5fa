"""Footprints that have been counted before, kept beside what is downloaded: at full size counting takes minutes.

A footprint is found by all that it depends on: the configuration, the pipeline's configuration files, the rewards, this
package's code and the libraries' versions.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HUB_CACHE
from pydantic import TypeAdapter, ValidationError

import diffinstruct
from diffinstruct.config.experiment import Experiment
from diffinstruct.method.distances import DISTANCES
from diffinstruct.method.objectives import OBJECTIVES
from diffinstruct.method.rewards import RewardModel
from diffinstruct.models.pipeline import Reference
from diffinstruct.planning.footprint import Footprint
from diffinstruct.reward_service.reward_digest import reward_digest

FOLDER = Path(HF_HUB_CACHE, "diffinstruct", "footprints")
WITHOUT_MEMORY = {
    "name", "seed", "steps", "prompts", "overoptimization", "logging", "tracking", "export", "output_dir", "mirror",
}  # fmt: skip
"""Keys of an experiment on which no footprint depends; `prompts` are counted beside it."""
LIBRARIES = ("torch", "diffusers", "transformers", "peft")
FOOTPRINT = TypeAdapter(Footprint)


def remembered(
    count: Callable[[], Footprint],
    title: str,
    experiment: Experiment,
    reference: Reference,
    rewards: Mapping[str, RewardModel] | None,
) -> Footprint:
    """The footprint that `count` counts, from its file if it has been counted before. `title` says which one of the
    experiment's it is. Not remembered where code of the user's own takes part that has no digest."""
    key = _key(title, experiment, reference, rewards)
    if key is None:
        return count()
    file = FOLDER / f"{key}.json"
    with suppress(OSError, ValidationError):
        return FOOTPRINT.validate_json(file.read_bytes())
    footprint = count()
    with suppress(OSError):  # without a place to keep it, it is counted again next time
        file.parent.mkdir(parents=True, exist_ok=True)
        written = file.with_name(f".{key}-{os.getpid()}")
        written.write_bytes(FOOTPRINT.dump_json(footprint))
        written.rename(file)
    return footprint


def _key(title: str, experiment: Experiment, reference: Reference, rewards: Mapping[str, RewardModel] | None) -> str | None:
    objective = experiment.objective
    if objective.name not in OBJECTIVES or objective.distance not in DISTANCES:
        return None
    digests = {name: reward_digest(reward, True, ()) for name, reward in (rewards or {}).items()}
    if None in digests.values():
        return None
    content: dict[str, Any] = {
        "footprint": title,
        "experiment": experiment.model_dump(mode="json", exclude=WITHOUT_MEMORY),
        "pipeline": [reference.index, *(reference.configured(part)[1] for part in (reference.family.part, "vae"))],
        "conditions": {name: list(value.shape) for name, value in reference.blank_conditions().items()},
        "settings": [str(reference.dtype), str(reference.decoder_dtype), reference.activation_checkpointing],
        "rewards": None if rewards is None else digests,
        "code": _code(),
        "versions": {name: version(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:32]


@cache
def _code() -> str:
    """A digest of this package's code."""
    sha256 = hashlib.sha256()
    for file in sorted(Path(diffinstruct.__file__).parent.rglob("*.py")):
        sha256.update(file.read_bytes())
    return sha256.hexdigest()
