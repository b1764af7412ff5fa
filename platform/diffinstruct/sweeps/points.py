"""The points of a sweep: what each trial changes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import ValidationError
from ray.tune.search.sample import Categorical, Domain

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import nearest_key
from diffinstruct.config.sections import ARGUMENTS, drop_arguments
from diffinstruct.errors import UserError

DRAWN = 30  # points by which a space is checked

Point = Mapping[str, Any]  # what one trial changes: dotted key -> value

Space = Mapping[str, Domain]
"""Dotted key -> where its values come from: `tune.loguniform(0.1, 10)`, `tune.choice([...])`."""


def grid(space: Mapping[str, Sequence[Any] | np.ndarray]) -> list[Point]:
    """Every combination of the values of dotted keys. Raises UserError where the values of a key are no list."""
    space = {key: values.tolist() if isinstance(values, np.ndarray) else values for key, values in space.items()}
    for key, values in space.items():
        if isinstance(values, str) or not isinstance(values, Sequence):
            raise UserError(f"{key}: a grid takes a list of values, got {values!r}")
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def random_points(space: Space, n: int, seed: int = 0) -> list[Point]:
    """`n` different points by chance, the same ones for the same seed. Raises UserError where there are not so many."""
    check_domains(space)
    random, points = np.random.RandomState(seed), list[Point]()
    for _ in range(100 * n):
        if len(points) == n:
            break
        if (point := {key: domain.sample(random_state=random) for key, domain in space.items()}) not in points:
            points.append(point)
    if len(points) < n or n < 1:
        raise UserError(f"sample: asked for {n} points, found {len(points)} that differ")
    return points


def check_domains(space: Space) -> None:
    for key, domain in space.items():
        if not isinstance(domain, Domain):
            raise UserError(f"{key}: should be a domain of Tune's, as tune.uniform(0, 1) or tune.choice([...]), got {domain!r}")


@dataclass(frozen=True)
class Optuna:
    """`trials` points that Optuna's TPE sampler asks for, each knowing the results before it, for the two objectives of
    the criterion within its bounds. With one trial at a time the same seed gives the same points, interrupted or not;
    with several they depend on which ends first."""

    space: Space
    trials: int
    seed: int = 0


def values_of(domain: Any) -> list[Any]:
    """Values of a domain, a list or a function without arguments, as many as DRAWN or all."""
    if isinstance(domain, list | tuple):
        return list(domain)
    if isinstance(domain, Categorical):
        return list(domain.categories)
    random = np.random.RandomState(0)
    return [domain.sample(random_state=random) if isinstance(domain, Domain) else domain() for _ in range(DRAWN)]


def changed(base: Experiment, values: Mapping[str, Any]) -> Experiment:
    """`base` with the values of dotted keys; raises UserError, a line for each that does not fit."""
    content = base.without_secrets().model_dump()
    for key, value in values.items():
        drop_arguments(content, key, value)
    for key, value in values.items():
        *parents, last = key.split(".")
        section: Any = content
        for parent in parents:
            section = section.get(parent) if isinstance(section, dict) else None
        argument = parents[:1] == ["objective"] and parents[1:] in [[key] for key in ARGUMENTS.values()]
        if not isinstance(section, dict) or (last not in section and not argument):
            raise UserError(f"{key}: unknown key{nearest_key(key, base.to_params())}")
        section[last] = value
    try:
        experiment = Experiment.model_validate(content)
        return experiment if "tracking.uri" in values else experiment.tracked_at(base.tracking.uri)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}, got {e['input']!r}" for e in error.errors()]
        raise UserError("\n".join(lines)) from None
