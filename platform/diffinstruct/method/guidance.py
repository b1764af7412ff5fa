"""Classifier-free guidance of the reference, inside the divergence or beside it (guidance IN and OUT of arXiv
2410.20898)."""

import torch
from torch import Tensor

from diffinstruct.method.diffusion import Conditions, Denoiser, GuidedReference


def guided(denoiser: Denoiser, null: Conditions, guidance_scale: float, where: str) -> GuidedReference:
    """The reference and what guides it, g = (guidance_scale - 1) (x0_hat(c) - x0_hat(null)).

        "in"    r = x0_hat(c) + g, and nothing beside: the divergence is that to the guided model
        "out"   r = x0_hat(c), and sg[g] beside the divergence, as one more reward

    Scores are affine in x0 predictions, so the same lines hold for them. guidance_scale is diffusers': 1 is plain
    conditional, and the paper's cfg_scale is guidance_scale - 1. `null` has batch size 1. Both prompts go through the
    network in one forward. Only the reference is ever guided, never the score network.
    """

    def reference(xt: Tensor, t: Tensor, c: Conditions) -> tuple[Tensor, Tensor | None]:
        if guidance_scale == 1:
            return denoiser(xt, t, c), None
        both = {k: torch.cat([v, null[k].to(v).expand_as(v)]) for k, v in c.items()}
        conditional, unconditional = denoiser(torch.cat([xt, xt]), torch.cat([t, t]), both).chunk(2)
        g = (guidance_scale - 1) * (conditional - unconditional)
        return (conditional + g, None) if where == "in" else (conditional, g.detach())

    return reference
