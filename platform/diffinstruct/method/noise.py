"""The randomness of a round, a function of (seed, step, sample)."""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from diffinstruct.method.diffusion import TimestepDistribution


class Stream(IntEnum):
    """What is drawn in a round. The numbers enter the seeds: with others the same seed is another run."""

    GENERATOR_Z = 0
    REGULARIZER_T = 1
    REGULARIZER_EPS = 2
    PROMPTS = 4
    SCORE_T = 8
    SCORE_EPS = 9
    SCORE_Z = 10


SCORE_STREAMS = 3  # score update k draws from the SCORE streams plus SCORE_STREAMS * k
STREAMS_PER_ROUND = 1_024


@dataclass(frozen=True)
class NoiseStreams:
    """The randomness of one round, drawn for the *global* batch and then sliced: on any number of workers the same."""

    seed: int
    step: int
    global_batch: int
    shape: tuple[int, ...]  # of one sample
    rows: slice  # this worker's part of the global batch
    device: torch.device

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * STREAMS_PER_ROUND + stream)

    def normal(self, stream: int) -> Tensor:
        full = torch.randn(self.global_batch, *self.shape, generator=self._generator(stream))
        return full[self.rows].to(self.device)

    def t(self, stream: int, distribution: TimestepDistribution) -> Tensor:
        fraction = torch.rand(self.global_batch, generator=self._generator(stream))
        return distribution(fraction[self.rows]).to(self.device)

    def prompts(self, count: int) -> list[int]:
        """This worker's indices into `count` prompts."""
        full = torch.randint(count, (self.global_batch,), generator=self._generator(Stream.PROMPTS))
        return full[self.rows].tolist()
