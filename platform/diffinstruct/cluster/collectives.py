"""Collective calls of torch.distributed between the training processes; each rank makes them in the same order."""

from __future__ import annotations

from typing import Any

import ray
import ray.train
import torch
import torch.distributed

from diffinstruct.method.step import Metrics
from diffinstruct.ranks import Ranks


def distributed_ranks(rank: int, world: int) -> Ranks:
    """The ranks of the process group that is initialised; of one process there is none to call."""
    return Ranks(rank, world, all_reduce_min, all_reduce_mean, gather) if world > 1 else Ranks()


def all_reduce_mean(metrics: Metrics) -> Metrics:
    """The mean of each metric over the ranks."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=collective_device())
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / torch.distributed.get_world_size()).tolist(), strict=True))


def all_reduce_min(value: int) -> int:
    """The least of all ranks' values."""
    values = torch.tensor(value, device=collective_device())
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def gather(value: Any) -> list[Any]:
    """All ranks' values, by rank."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def preempted() -> bool:
    """Whether a node of the run has been told to go, as spot machines are. A collective call of Ray's alpha API."""
    return ray.train.get_preemption_info() is not None


def collective_device() -> str:
    """The device that the process group's backend takes."""
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"
