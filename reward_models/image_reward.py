"""ImageReward: BLIP reads the prompt while it looks at the image; experts' ratings were its target.

Xu et al. 2023, arXiv 2304.05977: BLIP ViT-L, a BERT that attends to its patches, an MLP on the first token.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .aesthetic import score_mlp
from .clip import OPENAI_MEAN, OPENAI_STD, clip_pixels, load_tokenizer
from .weights import Weights, fill, read

ENTRIES = {
    "image_reward": {
        "line": "experts' rating of alignment and fidelity, image and prompt read together",
        "range": "about -2.3 to 2, normalised to mean 0 and deviation 1 on its own data",
        "paper": "2304.05977",
        "weights": "zai-org/ImageReward, ImageReward.pt; tokenizer of google-bert/bert-base-uncased",
        "licences": "Apache-2.0 (weights)",
    }
}

if TYPE_CHECKING:
    from transformers import BlipConfig

MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw scores on its authors' data
LONGEST = 35  # tokens of a prompt


class ImageReward(nn.Module):
    """(MLP(first token of BERT(prompt | patches of the image)) - MEAN) / STD."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: BlipConfig, tokenizer: Any) -> None:
        from transformers import BlipTextModel, BlipVisionModel

        super().__init__()
        self.vision = BlipVisionModel(config.vision_config)
        self.text = BlipTextModel(config.text_config, add_pooling_layer=False)
        self.mlp = score_mlp(config.text_config.hidden_size)
        self.tokenizer, self.longest = tokenizer, LONGEST
        self.register_buffer("mean", torch.tensor(OPENAI_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(OPENAI_STD).view(3, 1, 1), persistent=False)
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        pixels = (clip_pixels(images.float(), self.vision.config.image_size) - self.mean) / self.std
        patches = self.vision(pixel_values=pixels.to(self.vision.dtype)).last_hidden_state
        # always to the full length, so that a prompt is read the same whatever stands beside it
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, max_length=LONGEST, return_tensors="pt")
        read = self.text(**_read(tokens, images.device), encoder_hidden_states=patches).last_hidden_state
        return (self.mlp(read[:, 0]).squeeze(1) - MEAN) / STD


def _read(tokens: Any, device: torch.device) -> dict[str, Tensor]:
    """Without the token types that BERT's tokenizer adds and BLIP does not know."""
    return {name: tokens[name].to(device) for name in ("input_ids", "attention_mask")}


def image_reward(
    weights: Weights = "zai-org/ImageReward@5736be03b2652728fb87788c9797b0570450ab72",
    tokenizer: str | Path = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594",
    config: BlipConfig | None = None,
) -> ImageReward:
    """ImageReward v1.0. `weights`: a state dict, a file, or a folder or hub id with ImageReward.pt; `config` is
    BLIP-L's."""
    state = read(weights, "ImageReward.pt")  # first: a file that is not there should not be missed a minute later
    reward = ImageReward(config or blip_large(), load_tokenizer(tokenizer))
    fill(reward, state, blip_name, unused=UNUSED)
    return reward


def blip_large() -> BlipConfig:
    """BLIP with a ViT-L at 224 px and a BERT-base, as ImageReward builds it."""
    from transformers import BlipConfig

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    return BlipConfig(
        text_config={"num_attention_heads": 12},
        vision_config=vision | {"image_size": 224, "patch_size": 16, "layer_norm_eps": 1e-6},
    )


# BLIP's contrastive projections, which ImageReward carries and does not use, and a table of 0, 1, 2, ...
UNUSED = r"blip\.(vision|text)_proj\.(weight|bias)|blip\.text_encoder\.embeddings\.position_ids"

_BLIP = [  # pattern in our names -> ImageReward's
    (r"^text\.", r"blip.text_encoder."),
    (r"^mlp\.", r"mlp.layers."),
    (r"^vision\.embeddings\.class_embedding", r"blip.visual_encoder.cls_token"),
    (r"^vision\.embeddings\.position_embedding", r"blip.visual_encoder.pos_embed"),
    (r"^vision\.embeddings\.patch_embedding", r"blip.visual_encoder.patch_embed.proj"),
    (r"^vision\.post_layernorm", r"blip.visual_encoder.norm"),
    (r"^vision\.encoder\.layers", r"blip.visual_encoder.blocks"),
    (r"\.self_attn\.qkv", r".attn.qkv"),
    (r"\.self_attn\.projection", r".attn.proj"),
    (r"\.layer_norm([12])", r".norm\1"),
]


def blip_name(name: str) -> str:
    """A tensor's name here -> in ImageReward's checkpoint."""
    for pattern, theirs in _BLIP:
        name = re.sub(pattern, theirs, name)
    return name
