"""The randomness of a round, a function of (seed, step, stream, sample).

Each sample of a stream has a random generator of its own: NumPy's Philox (Salmon et al. 2011), whose key and counter
hold the four numbers as they are. So no two places of any two runs share numbers, the number of workers changes none,
and a worker draws its own samples alone. torch's CPU generator would fold all of it into 32 bits.
"""

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field, replace
from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from diffinstruct.method.diffusion import TimestepDistribution
from diffinstruct.method.memory import to_device


class Stream(IntEnum):
    """What is drawn in a round. With other numbers the same seed is another run."""

    GENERATOR_Z = 0
    REGULARIZER_T = 1
    REGULARIZER_EPS = 2
    PROMPTS = 4
    SCORE_T = 8
    SCORE_EPS = 9
    SCORE_Z = 10


SCORE_STREAMS = 3  # score update k draws from the SCORE streams plus SCORE_STREAMS * k


@dataclass(frozen=True)
class NoiseStreams:
    """The randomness of this worker's samples in one round."""

    seed: int  # below 2^64
    step: int
    shape: tuple[int, ...]  # of one sample
    rows: slice  # this worker's samples, by their indices in the global batch
    device: torch.device
    ahead: Mapping[int, "Future[Tensor]"] = field(default_factory=dict)
    """Normal noise that is being drawn by another thread, by its stream."""

    def _generators(self, stream: int) -> Iterator[np.random.Generator]:
        """A random generator for each sample in turn: one object, for a new one takes ten times as long."""
        philox = np.random.Philox(key=[self.seed, stream])
        generator, state = np.random.Generator(philox), philox.state
        for sample in range(self.rows.start, self.rows.stop):
            # The first word counts a sample's own draws.
            state["state"]["counter"] = np.array([0, sample, self.step, 0], np.uint64)
            philox.state = state
            yield generator

    def _normal(self, stream: int) -> Tensor:
        """On the CPU, and for a GPU in page-locked memory."""
        samples = [generator.standard_normal(self.shape, np.float32) for generator in self._generators(stream)]
        noise = torch.from_numpy(np.stack(samples))
        return noise.pin_memory() if self.device.type == "cuda" else noise

    def normal(self, stream: int) -> Tensor:
        """N(0, I) noise [B, *shape]."""
        noise = self.ahead[stream].result() if stream in self.ahead else self._normal(stream)
        return to_device(noise, self.device)

    def t(self, stream: int, distribution: TimestepDistribution) -> Tensor:
        """Timesteps [B] of this distribution."""
        fractions = [generator.random(dtype=np.float32) for generator in self._generators(stream)]
        return to_device(distribution(torch.tensor(fractions)), self.device)

    def prompts(self, count: int) -> list[int]:
        """Indices of this worker's prompts, into `count` of them."""
        return [int(generator.integers(count)) for generator in self._generators(Stream.PROMPTS)]

    def next_round(self, streams: Iterable[int], executor: Executor) -> "NoiseStreams":
        """The next round's randomness; the normal noise of these streams is drawn by `executor` from now on."""
        following = replace(self, step=self.step + 1, ahead={})
        return replace(following, ahead={stream: executor.submit(following._normal, stream) for stream in streams})
