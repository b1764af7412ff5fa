"""PickScore: a CLIP whose image-text similarity was trained on human choices.

Kirstain et al. 2023, "Pick-a-Pic", arXiv 2305.01569.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from .clip import CLIP_H, TowerReward, load_tower, shared_tower

ENTRIES = {
    "pickscore": {
        "line": "preference of Pick-a-Pic's users, for the image given the prompt",
        "range": "about 18 to 24; result tables print a hundredth of it",
        "paper": "2305.01569",
        "weights": "yuvalkirstain/PickScore_v1, processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "licences": "see the model cards",
    }
}


class PickScore(TowerReward):
    """exp(logit_scale) * cos(text, image)."""

    def _score(self, features: Tensor, prompts: list[str]) -> Tensor:
        return self.tower.clip.logit_scale.exp() * self.tower.similarity(features, prompts)


def pickscore(
    model: str | Path = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800", processor: str | Path = CLIP_H
) -> PickScore:
    """PickScore v1, a ViT-H at 224 px, from hub ids or local folders of a `CLIPModel` and of its processor."""
    return PickScore(shared_tower(load_tower, model, processor))
