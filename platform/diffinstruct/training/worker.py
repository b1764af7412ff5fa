"""What sets one rank of a run on several processes apart from a run in a single process."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from diffinstruct.ranks import SINGLE_PROCESS, Ranks


@dataclass(frozen=True)
class Worker:
    """One training process; the default is a run in one process."""

    ranks: Ranks = SINGLE_PROCESS
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module  # wraps a trained module for data parallelism
    mesh: DeviceMesh | None = None  # the mesh over which all networks are sharded, where they are
    preempted: Callable[[], bool] = lambda: False
    """Whether a machine of the run is about to go; a collective call with the same answer on all ranks."""
    where: str = ""  # the cluster's address, for the run's first and last line
