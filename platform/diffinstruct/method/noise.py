"""The randomness of a round, a function of (seed, step, sample)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffinstruct.method.diffusion import LawOfT


@dataclass(frozen=True)
class NoiseStreams:
    """The randomness of one round, drawn for the *global* batch and then sliced: the number of workers changes no
    number."""

    seed: int
    step: int
    global_batch: int
    shape: tuple[int, ...]  # of one sample
    rows: slice  # this worker's part of the global batch
    device: torch.device

    GENERATOR, SCORE, PROMPTS = 0, 8, 4  # places in a round; score update k draws at SCORE + 3 k

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 1_024 + stream)

    def normal(self, stream: int) -> Tensor:
        full = torch.randn(self.global_batch, *self.shape, generator=self._generator(stream))
        return full[self.rows].to(self.device)

    def t(self, stream: int, law: LawOfT) -> Tensor:
        fraction = torch.rand(self.global_batch, generator=self._generator(stream))
        return law(fraction[self.rows]).to(self.device)

    def prompts(self, count: int) -> list[int]:
        """This worker's indices into `count` prompts."""
        full = torch.randint(count, (self.global_batch,), generator=self._generator(self.PROMPTS))
        return full[self.rows].tolist()
