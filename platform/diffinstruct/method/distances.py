"""Distances between two scores: a pair (d, d'), the divergence's integrand and what its gradient needs (arXiv
2410.20898).

Shapes: y [B, ...]; d(y) [B], d'(y) [B, ...], the gradient of d at y. Norms run over a whole sample.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import NamedTuple

from torch import Tensor


class Distance(NamedTuple):
    """Any pair of callables of these shapes is a distance, as long as `gradient` is differentiable in y: DI* needs
    that."""

    value: Callable[[Tensor], Tensor]  # d, [B, ...] -> [B]; recorded, never differentiated
    gradient: Callable[[Tensor], Tensor]  # d', [B, ...] -> [B, ...]


def pseudo_huber(c: float) -> Distance:
    """d(y) = sqrt(||y||^2 + C^2) - C and d'(y) = y / sqrt(||y||^2 + C^2), with C^2 = c^2 * dimensions (the paper's
    choice).

    `c` is per square root of a dimension, so one value serves samples of any size; it is in the units of y. Gradient
    flows through the denominator too: without it this is another objective.
    """

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


def distance(name: str, huber_c: float) -> Distance:
    """The distance of a configuration: "pseudo_huber", "squared", or the import path `module:attribute` of a
    Distance."""
    if name == "pseudo_huber":
        return pseudo_huber(huber_c)
    if name == "squared":
        return squared
    module, _, attribute = name.partition(":")
    return Distance(*getattr(import_module(module), attribute))
