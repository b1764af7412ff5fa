"""Distances between two scores: a pair (d, d'), the divergence's integrand and what its gradient needs (arXiv
2410.20898).

Shapes: y [B, ...]; d(y) [B], d'(y) [B, ...], the gradient of d at y. Norms run over a whole sample.

A new distance is a pair, or a function from parameters to a pair, and one row of `DISTANCES`; or the same in a file of
your own, named `module:attribute` in the recipe. Its parameters come from `objective.distance_args`.
`objective_validation.validate_distance` tries your own before the first step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from diffinstruct.method.arguments import complete_arguments, import_attribute, parameters

if TYPE_CHECKING:  # the configuration reads DISTANCES before torch is there, and answers in half a second
    from torch import Tensor


class Distance(NamedTuple):
    """Any pair of callables of these shapes. `gradient` has to be differentiable in y: DI* needs that."""

    value: Callable[[Tensor], Tensor]  # d, [B, ...] -> [B]; recorded, never differentiated
    gradient: Callable[[Tensor], Tensor]  # d', [B, ...] -> [B, ...]


def pseudo_huber(c: float = 0.1) -> Distance:
    """d(y) = sqrt(||y||^2 + C^2) - C and d'(y) = y / sqrt(||y||^2 + C^2), with C^2 = c^2 * dimensions (the paper's
    choice).

    `c` is per square root of a dimension, so one value serves samples of any size; it is in the units of y. Gradient
    flows through the denominator too: without it this is another objective.
    """
    if not 0 < c <= 1e6:
        raise ValueError("c should be greater than 0 and at most 1000000")

    def norm(y: Tensor) -> Tensor:
        flat = y.flatten(1)
        return (flat.pow(2).sum(1) + c * c * flat.shape[1]).sqrt()

    def value(y: Tensor) -> Tensor:
        return norm(y) - c * y[0].numel() ** 0.5

    def gradient(y: Tensor) -> Tensor:
        return y / norm(y).view(-1, *(1,) * (y.dim() - 1))

    return Distance(value, gradient)


squared = Distance(value=lambda y: y.flatten(1).pow(2).sum(1), gradient=lambda y: 2 * y)
"""d(y) = ||y||^2 and d'(y) = 2 y (SIM-L2; SiD with alpha 1 but for its normaliser)."""

DISTANCES: dict[str, Distance | Callable[..., Distance]] = {"pseudo_huber": pseudo_huber, "squared": squared}
"""The built-in distances by their name in a recipe: pairs, and functions that make one of parameters."""


def distance_arguments(name: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """`objective.distance_args` with defaults filled in. Raises ArgumentError; what a module of yours raises."""
    pair = _pair(name)
    return complete_arguments(name, parameters(pair) if callable(pair) else {}, args)


def distance(name: str, args: Mapping[str, Any]) -> Distance:
    """The distance of a configuration: a row of `DISTANCES`, or the import path `module:attribute` of another."""
    pair, arguments = _pair(name), distance_arguments(name, args)
    return Distance(*(pair(**arguments) if callable(pair) else pair))


def _pair(name: str) -> Any:
    return DISTANCES[name] if name in DISTANCES else import_attribute(name)
