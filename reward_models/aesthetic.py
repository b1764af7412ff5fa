"""LAION's aesthetic predictors: a small head on normalised CLIP-L image embeddings, trained on ratings of 1 to 10.

v1: github.com/LAION-AI/aesthetic-predictor, one linear layer. v2: christophschuhmann/improved-aesthetic-predictor, five
with nothing between them (Schuhmann et al. 2022, LAION-5B, arXiv 2210.08402). The prompt is not read.
"""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from urllib.parse import unquote

import torch.nn.functional as F
from torch import Tensor, nn

from .clip import CLIP_L, ClipTower, TowerReward, load_tower, shared_tower
from .weights import Weights, fill, read

ENTRIES = {
    "aesthetic_v1": {
        "line": "how much the image pleases; the prompt is not read",
        "range": "about 1 to 10, mostly 4 to 7",
        "paper": "-",
        "weights": "LAION-AI/aesthetic-predictor on GitHub, sa_0_4_vit_l_14_linear.pth; openai/clip-vit-large-patch14",
        "licences": "MIT (head), CLIP: see the model card",
    },
    "aesthetic_v2": {
        "line": "how much the image pleases; the prompt is not read",
        "range": "about 1 to 10, mostly 4 to 7",
        "paper": "2210.08402",
        "weights": "christophschuhmann/improved-aesthetic-predictor on GitHub, "
        "sac+logos+ava1-l14-linearMSE.pth; openai/clip-vit-large-patch14",
        "licences": "Apache-2.0 (head), CLIP: see the model card",
    },
}

# Each in its author's repository, at the commit that was looked at.
V1 = "https://github.com/LAION-AI/aesthetic-predictor/raw/6d122adad522ab246644d9dc1c6d7a3810ee255f/sa_0_4_vit_l_14_linear.pth"
V2 = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/6934dd81792f086e613a121dbce43082cb8be85e/"
    "sac%2Blogos%2Bava1-l14-linearMSE.pth"
)


V1_FILE, V2_FILE = (unquote(address.rpartition("/")[2]) for address in (V1, V2))


class Aesthetic(TowerReward):
    """`net`, [B, D] -> [B, 1], on image features of length 1."""

    def __init__(self, tower: ClipTower, net: nn.Module) -> None:
        super().__init__(tower)
        self.net = net.requires_grad_(False)

    def _score(self, features: Tensor, prompts: list[str]) -> Tensor:
        return self.net(F.normalize(features, dim=-1)).squeeze(1)


def score_mlp(width: int) -> nn.Sequential:
    """[B, width] -> [B, 1] by five linear layers. They are numbered as their authors' checkpoints are, where dropouts
    of the training stand between them; ImageReward took the same."""
    sizes = [width, 1024, 128, 64, 16, 1]
    layers = zip("02467", sizes[:-1], sizes[1:], strict=True)
    return nn.Sequential(OrderedDict((number, nn.Linear(before, after)) for number, before, after in layers))


def aesthetic_v1(weights: Weights = V1, model: str | Path = CLIP_L) -> Aesthetic:
    """v1. `weights` of the head: keys weight, bias, or a folder with V1_FILE; `model`: hub id or folder of CLIP."""
    head = read(weights, V1_FILE)
    tower = shared_tower(load_tower, model)
    net = nn.Linear(tower.clip.config.projection_dim, 1)
    fill(net, head, lambda name: name)
    return Aesthetic(tower, net)


def aesthetic_v2(weights: Weights = V2, model: str | Path = CLIP_L) -> Aesthetic:
    """v2. `weights` of the head: keys layers.0.weight and on, or a folder with V2_FILE; `model`: as of v1."""
    head = read(weights, V2_FILE)
    tower = shared_tower(load_tower, model)
    net = score_mlp(tower.clip.config.projection_dim)
    fill(net, head, lambda name: f"layers.{name}")
    return Aesthetic(tower, net)
