"""Pictures of a trained generator, in one step."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from diffinstruct.models.export import load_export


def generate(folder: Path | str, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """One picture for each prompt, made by the exported pipeline in `folder`, with noise of the seeds from `seed` on.

    Raises UserError for a pipeline that is no one-step generator of ours.
    """
    reference, generator = load_export(folder, "cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(seed, seed + len(prompts))
    # One random generator for each picture: it depends on its seed, not on its neighbours.
    z = torch.stack([torch.randn(reference.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    images = reference.sampler(generator)(list(prompts), z).cpu()
    pixels = (images.permute(0, 2, 3, 1) * 255).round().byte().numpy()
    return [Image.fromarray(picture) for picture in pixels]
