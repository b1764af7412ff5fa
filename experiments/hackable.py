"""A reward that can be hacked, planted on purpose: experiments/overoptimization.py has the watch find it out."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from reward_models import load

SHARPNESS = 500.0
"""At the distilled start, at the latents, the gradient of the bonus is then about as long as the preference's."""


class Hackable(nn.Module):
    """The built-in preference plus a bonus for sharpness, the mean difference of neighbouring pixels, whatever they show.

    Raters like sharp pictures, so such a bonus is easily learned from choices; but noise is sharpest of all, and there the
    preference is outbid. Images [B, 3, H, W] in [0, 1] -> scores [B].
    """

    def __init__(self) -> None:
        super().__init__()
        self.preference = load("pocket_preference")

    def forward(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        down = images.diff(dim=-2).abs().flatten(1).mean(1)
        across = images.diff(dim=-1).abs().flatten(1).mean(1)
        return self.preference(images, prompts) + SHARPNESS * (down + across) / 2
