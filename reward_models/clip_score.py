"""CLIP score: how well an image goes with its caption.

Hessel et al. 2021, arXiv 2104.08718, in torchmetrics' variant: 100 cos with ViT-L/14, no words put before the prompt
(the paper has 2.5 cos, ViT-B/32 and "A photo depicts"). Both cut off below zero, torchmetrics after its mean over
samples; here nothing is cut off, because an image that scores low would get no gradient.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .clip import CLIP_L, TowerReward, load_tower, shared_tower

ENTRIES = {
    "clip_score": {
        "line": "agreement of image and prompt, learned from captions, not from preference",
        "range": "about 15 to 35",
        "paper": "2104.08718",
        "weights": "openai/clip-vit-large-patch14",
        "licences": "see the model card",
    }
}


class ClipScore(TowerReward):
    """100 cos(text, image)."""

    def _score(self, features: Tensor, prompts: list[str]) -> Tensor:
        return 100 * self.tower.similarity(features, prompts)


def clip_score(model: str | Path = CLIP_L) -> ClipScore:
    """CLIP score with a hub id or local folder of a `CLIPModel` and its processor."""
    return ClipScore(shared_tower(load_tower, model))
