"""The processes of a run, and the collective calls between them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffinstruct.method.step import Metrics


@dataclass(frozen=True)
class Ranks:
    """One process's view of all of them, with the collective calls, which every rank makes; by default there is one
    process. `cluster/collectives.py` has the calls of torch.distributed."""

    rank: int = 0
    world: int = 1
    min: Callable[[int], int] = lambda value: value  # the least of all ranks' values
    mean: Callable[[Metrics], Metrics] = lambda metrics: metrics  # the mean of each metric over the ranks
    gather: Callable[[Any], list[Any]] = lambda value: [value]  # all ranks' values, by rank

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which alone writes, apart from checkpoint shards, shows, and asks the rewards about
        probes."""
        return self.rank == 0


SINGLE_PROCESS = Ranks()
