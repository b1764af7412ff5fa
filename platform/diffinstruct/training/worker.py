"""One training process among equals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from diffinstruct.method.step import Metrics


@dataclass(frozen=True)
class Worker:
    """One training process among equals, and what it does differently from a lonely one."""

    rank: int = 0
    world: int = 1
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # data parallelism
    mesh: DeviceMesh | None = None  # over which all networks are sharded, where they are
    average: Callable[[Metrics], Metrics] = lambda metrics: metrics  # over the workers
    least: Callable[[int], int] = lambda value: value  # of all workers
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # of all workers, by rank
    leaving: Callable[[], bool] = lambda: False  # whether a worker's machine is about to go; the same for all workers
    where: str = ""  # the cluster's address, for the first and the last line
