"""Human Preference Score v2 and v2.1: CLIP ViT-H, trained on ranked images.

Wu et al. 2023, arXiv 2306.09341; score = cos(text, image), which the paper's tables print times 100. The
checkpoints are open_clip's; here they become a `CLIPModel`.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from .clip import CLIP_H, ClipTower, TowerReward, bicubic, load_tokenizer, shared_tower
from .weights import Weights, fill, read

ENTRIES = {
    "hpsv2": {
        "line": "preference of HPD v2's annotators, for the image given the prompt",
        "range": "about 0.2 to 0.35; result tables print a hundred times it",
        "paper": "2306.09341",
        "weights": "xswu/HPSv2, HPS_v2_compressed.pt; tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "licences": "see the model card",
    },
    "hpsv2.1": {
        "line": "the same, trained again on better data",
        "range": "about 0.2 to 0.35; result tables print a hundred times it",
        "paper": "2306.09341",
        "weights": "xswu/HPSv2, HPS_v2.1_compressed.pt; tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "licences": "see the model card",
    },
}

if TYPE_CHECKING:
    from transformers import CLIPConfig

HUB = "xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a"


class Hps(TowerReward):
    """cos(text, image)."""

    def _score(self, features: Tensor, prompts: list[str]) -> Tensor:
        return self.tower.similarity(features, prompts)


def hpsv2(
    weights: Weights = HUB, tokenizer: str | Path = CLIP_H, config: CLIPConfig | None = None, file: str = "HPS_v2_compressed.pt"
) -> Hps:
    """HPS v2. `weights`: a state dict, a file, or a folder or hub id with `file`; `config` is ViT-H's."""
    return Hps(shared_tower(load_open_clip, weights, file, tokenizer, config))


hpsv2_1 = partial(hpsv2, file="HPS_v2.1_compressed.pt")
"""HPS v2.1, the same network with other weights."""


def load_open_clip(weights: Weights, file: str, tokenizer: str | Path, config: CLIPConfig | None) -> ClipTower:
    """A tower from open_clip's state dict of a CLIP, which looks at pictures as HPS does."""
    from transformers import CLIPModel

    state = read(weights, file)  # first: a file that is not there should not be missed a minute later
    clip = CLIPModel(config or vit_h())
    fill(clip, state, open_clip_name, open_clip_cut)
    return ClipTower(clip, load_tokenizer(tokenizer), pixels=fit_pixels)


def vit_h() -> CLIPConfig:
    """open_clip's ViT-H-14 at 224 px."""
    from transformers import CLIPConfig

    text = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 16}
    return CLIPConfig(
        text_config=text | {"hidden_act": "gelu"},
        vision_config=vision | {"hidden_act": "gelu", "image_size": 224, "patch_size": 14},
        projection_dim=1024,
    )


def fit_pixels(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] -> [B, 3, size, size]: long side to `size`, black around the middle, differentiable.

    HPS resizes tensors, in one bicubic pass whose overshoot stays; antialiased, as torchvision does since 0.17.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    if scale != 1:
        height, width = round(height * scale), round(width * scale)
        images = bicubic(images, (height, width))
    top, left = (size - height) // 2, (size - width) // 2
    return F.pad(images, (left, size - width - left, top, size - height - top))


_OPEN_CLIP = [  # pattern in CLIPModel's names -> open_clip's
    (r"^vision_model\.embeddings\.(class_embedding)", r"visual.\1"),
    (r"^vision_model\.embeddings\.patch_embedding", r"visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", r"visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", r"visual.ln_pre"),
    (r"^vision_model\.post_layernorm", r"visual.ln_post"),
    (r"^vision_model\.encoder\.layers", r"visual.transformer.resblocks"),
    (r"^visual_projection\.weight", r"visual.proj"),
    (r"^text_model\.embeddings\.token_embedding", r"token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", r"positional_embedding"),
    (r"^text_model\.final_layer_norm", r"ln_final"),
    (r"^text_model\.encoder\.layers", r"transformer.resblocks"),
    (r"^text_projection\.weight", r"text_projection"),
    (r"\.self_attn\.[qkv]_proj\.", r".attn.in_proj_"),
    (r"\.self_attn\.out_proj", r".attn.out_proj"),
    (r"\.layer_norm([12])", r".ln_\1"),
    (r"\.mlp\.fc1", r".mlp.c_fc"),
    (r"\.mlp\.fc2", r".mlp.c_proj"),
]


def open_clip_name(name: str) -> str:
    """A tensor's name in a `CLIPModel` -> in open_clip's CLIP."""
    for pattern, theirs in _OPEN_CLIP:
        name = re.sub(pattern, theirs, name)
    return name


def open_clip_cut(name: str, tensor: Tensor) -> Tensor:
    """What `CLIPModel` calls `name`, out of open_clip's tensor: queries, keys and values lie in one, projections
    across."""
    if name.endswith("_projection.weight"):
        return tensor.T
    if found := re.search(r"\.([qkv])_proj\.", name):
        return tensor.chunk(3)["qkv".index(found[1])]
    return tensor
