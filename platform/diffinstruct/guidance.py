"""Classifier-free guidance as a function from denoiser to denoiser (guidance IN of arXiv 2410.20898)."""

from __future__ import annotations

import torch
from torch import Tensor

from diffinstruct.diffusion import Conditions, Denoiser


def guided(denoiser: Denoiser, null: Conditions, cfg_scale: float) -> Denoiser:
    """x0_hat(c) + cfg_scale (x0_hat(c) - x0_hat(null)): the same line holds for scores, which are affine in x0_hat.

    cfg_scale 0 is plain conditional; diffusers' guidance_scale is 1 + cfg_scale. `null` has batch size 1. Both halves go
    through the network in one forward. Only the reference is ever guided, never the score network.
    """
    if cfg_scale == 0:
        return denoiser

    def denoise(xt: Tensor, t: Tensor, c: Conditions) -> Tensor:
        both = {k: torch.cat([v, null[k].to(v).expand_as(v)]) for k, v in c.items()}
        conditional, unconditional = denoiser(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
        return conditional + cfg_scale * (conditional - unconditional)

    return denoise
