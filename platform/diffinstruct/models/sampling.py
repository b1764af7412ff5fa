"""Latents of a generator for pictures that are shown or scored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.precision import autocast
from diffinstruct.models.pipeline import Reference

EVALUATION_SEED = 1_000_000
"""Pictures that are shown or scored draw their noise from seeds at and above this one, training from those below."""


def probe_inputs(reference: Reference, prompts: Sequence[str], n: int, seed: int, noises: int = 1) -> tuple[list[str], Tensor]:
    """n of the prompts, drawn by `seed` (repeatedly where there are fewer), and noise [n * noises, ...] for them."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(prompts), generator=generator) for _ in range(-(-n // len(prompts)))])
    noise = torch.randn(n * noises, *reference.latent_shape, generator=generator)
    return [prompts[i] for i in order[:n]], noise.to(reference.device)


@torch.no_grad()
def sample_latents(
    experiment: Experiment, reference: Reference, generator: nn.Module, noise: Tensor, prompts: Sequence[str]
) -> Tensor:
    """The generator's latents, in a round's precision and a micro-batch at a time: a probe takes no more memory than a
    round."""
    batch = experiment.rewards.micro_batch_size
    parts = [slice(i, i + batch) for i in range(0, len(noise), batch)]
    with autocast(experiment.precision, noise.device):
        return torch.cat([generator(noise[part], reference.encode_prompts(list(prompts[part]))) for part in parts])
