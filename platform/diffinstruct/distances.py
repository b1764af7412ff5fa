"""Distances d between two scores, given as d'(y): all that the objective's gradient needs (arXiv 2410.20898).

A distance maps y [B, ...] to d'(y) [B, ...]; norms run over a whole sample. Any callable of that shape is a distance.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

Distance = Callable[[Tensor], Tensor]


def pseudo_huber(y: Tensor, c: float) -> Tensor:
    """d'(y) = y / sqrt(||y||^2 + C^2) of d(y) = sqrt(||y||^2 + C^2) - C, with C^2 = c^2 * dimensions (the paper's choice).

    `c` is per square root of a dimension, so one value serves samples of any size; it is in the units of y. Gradient
    flows through the denominator too: without it this is another objective.
    """
    flat = y.flatten(1)
    norm = (flat.pow(2).sum(1) + c * c * flat.shape[1]).sqrt()
    return y / norm.view(-1, *(1,) * (y.dim() - 1))


def squared(y: Tensor) -> Tensor:
    """d'(y) = 2 y of d(y) = ||y||^2 (SIM-L2, SiD with alpha 1)."""
    return 2 * y


def distance(name: str, huber_c: float) -> Distance:
    """The distance of a configuration."""
    known: dict[str, Distance] = {"pseudo_huber": partial(pseudo_huber, c=huber_c), "squared": squared}
    return known[name]
