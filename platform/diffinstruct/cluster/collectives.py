"""Values over all training processes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed

from diffinstruct.method.step import Metrics

if TYPE_CHECKING:
    pass


def average(metrics: Metrics) -> Metrics:
    """The mean of each metric over the workers; a collective call."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=collective_device())
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / torch.distributed.get_world_size()).tolist(), strict=True))


def least(value: int) -> int:
    """Of all workers' values; a collective call."""
    values = torch.tensor(value, device=collective_device())
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def gather(value: Any) -> list[Any]:
    """All workers' values, by rank; a collective call."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leaving() -> bool:
    """Whether a node with a worker on it has been told to go, as spot machines are; a collective call, of Ray's alpha
    API."""
    return ray.train.get_preemption_info() is not None


def collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
