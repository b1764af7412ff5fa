"""Latents of a generator for pictures that are shown or scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from diffinstruct.method.precision import autocast
from diffinstruct.models.pipeline import Reference

EVALUATION_SEED = 1_000_000
"""Pictures that are shown or scored draw their noise from seeds at and above this one, training from those below."""


def pictures_at_once(latent_shape: Sequence[int]) -> int:
    """How many pictures to begin with, where only memory limits them: 32 small ones, 16 of 512 px, 4 of 1024 px."""
    return max(1, min(32, 2**16 // prod(latent_shape[1:])))


def probe_inputs(reference: Reference, prompts: Sequence[str], n: int, seed: int, noises: int = 1) -> tuple[list[str], Tensor]:
    """n of the prompts, drawn by `seed` (repeatedly where there are fewer), and noise [n * noises, ...] for them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for _ in range(-(-n // len(prompts)))])
    noise = torch.randn(n * noises, *reference.latent_shape, generator=generator)
    return [prompts[i] for i in order[:n]], noise.to(reference.device)


@dataclass(frozen=True)
class LatentSampler:
    """Samples a generator in a round's precision, a micro-batch at a time: it takes no more memory than a round."""

    reference: Reference
    precision: str
    micro_batch_size: int

    @torch.no_grad()
    def __call__(self, generator: nn.Module, noise: Tensor, prompts: Sequence[str]) -> Tensor:
        """The generator's latents, like `noise`."""
        size, encode = self.micro_batch_size, self.reference.encode_prompts
        rows = [slice(i, i + size) for i in range(0, len(noise), size)]
        with autocast(self.precision, noise.device):
            return torch.cat([generator(noise[part], encode(list(prompts[part]))) for part in rows])
