"""Tiny models for the rewards: random CLIP and BLIP checkpoints in their authors' layouts, word tokenizers, pictures.

`weights` and `pictures` are part of what originals.json means: change them and its scores are void.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BertTokenizer, BlipConfig, CLIPConfig, CLIPModel, CLIPTokenizer

from reward_models.clip import OPENAI_MEAN, OPENAI_STD
from reward_models.hps import open_clip_cut, open_clip_name
from reward_models.weights import fill

ORIGINALS = json.loads((Path(__file__).parent / "originals.json").read_text())
WORDS = ["a", "red", "blue", "pot", "smiling", "cactus"]
LETTERS = sorted(set("".join(WORDS)))
CLIP_VOCABULARY = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
BERT_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS]
SIZE = 32  # of the pictures that the models see


def weights(shapes: dict[str, list[int]], seed: int) -> dict[str, Tensor]:
    """Random tensors, drawn in the order of their names: vectors called weight about 1, all else about 0."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: 0.3 * torch.randn(shapes[name], generator=generator) for name in sorted(shapes)}
    return {name: tensor + (tensor.ndim == 1 and name.endswith("weight")) for name, tensor in drawn.items()}


def pictures(n: int, height: int = 64, width: int = 64, seed: int = 1) -> Tensor:
    """Random smooth images [n, 3, height, width] in [0, 1], of uint8 values."""
    coarse = torch.rand(n, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


def clip_config(act: str = "quick_gelu") -> CLIPConfig:
    """Of a CLIP that sees 32 px and reads 20 tokens; OpenAI's activation, or open_clip's "gelu"."""
    shape = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": act}
    start, end = len(CLIP_VOCABULARY) - 2, len(CLIP_VOCABULARY) - 1
    words = {"vocab_size": len(CLIP_VOCABULARY), "bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    return CLIPConfig(
        text_config=shape | words | {"hidden_size": 16, "max_position_embeddings": 20},
        vision_config=shape | {"hidden_size": 32, "image_size": SIZE, "patch_size": 8},
        projection_dim=12,
    )


def blip_config() -> BlipConfig:
    """Of a BLIP that sees 32 px."""
    words = {"vocab_size": len(BERT_VOCABULARY), "bos_token_id": 2, "sep_token_id": 3, "max_position_embeddings": 40}
    return BlipConfig(
        text_config=words | {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        vision_config={"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
        | {"image_size": SIZE, "patch_size": 16, "layer_norm_eps": 1e-6},
    )


def build(folder: Path) -> dict[str, dict[str, Any]]:
    """Write each reward's files into `folder` and return what to load it with: name -> settings."""
    clip, bert, hps = folder / "clip", folder / "bert", folder / "hps"
    CLIPTokenizer(vocab={token: i for i, token in enumerate(CLIP_VOCABULARY)}, merges=[]).save_pretrained(clip)
    BertTokenizer(vocab={token: i for i, token in enumerate(BERT_VOCABULARY)}).save_pretrained(bert)
    model = CLIPModel(clip_config())
    fill(model, weights(**ORIGINALS["clip"]), open_clip_name, open_clip_cut)
    model.save_pretrained(clip)
    (clip / "preprocessor_config.json").write_text(json.dumps({"image_mean": OPENAI_MEAN, "image_std": OPENAI_STD}))

    hps.mkdir()
    drawn = weights(ORIGINALS["clip"]["shapes"], ORIGINALS["hpsv2"]["seed"])
    torch.save({"epoch": 1, "name": "tiny", "state_dict": drawn}, hps / "HPS_v2_compressed.pt")
    torch.save({"state_dict": drawn}, hps / "HPS_v2.1_compressed.pt")
    for name in ("aesthetic_v1", "aesthetic_v2", "image_reward"):
        original = ORIGINALS[name]
        torch.save(weights(original["shapes"], original["seed"]), folder / f"{name}.pt")

    heads = {name: {"weights": folder / f"{name}.pt", "model": clip} for name in ("aesthetic_v1", "aesthetic_v2")}
    preference = {"weights": hps, "tokenizer": clip, "config": clip_config("gelu")}
    return heads | {
        "pickscore": {"model": clip, "processor": clip},
        "clip_score": {"model": clip},
        "hpsv2": preference,
        "hpsv2.1": preference,
        "image_reward": {"weights": folder / "image_reward.pt", "tokenizer": bert, "config": blip_config()},
    }
