"""A tiny random StableDiffusionPipeline folder, built in a second: 32 px pictures, latents [4, 8, 8], fp32."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TOKENS = 12
LATENT = (4, 8, 8)


def build(folder: Path, prediction: str = "epsilon", dtype: torch.dtype = torch.float32) -> Path:
    """Write the pipeline into `folder` and return it; the weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = _tokenizer(folder / "tokenizer")
        vae = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8), num_encoder_blocks=(0, 1, 1),
            num_decoder_blocks=(1, 1, 1), latent_channels=4, scaling_factor=1.3,
        )  # fmt: skip
        vae.decoder.layers[-1].weight.data *= 3  # pictures with contrast, around grey, some pixels black or white
        vae.decoder.layers[-1].bias.data += 0.5
        unet = UNet2DConditionModel(
            sample_size=LATENT[1], block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=16, attention_head_dim=2,
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=TOKENS,
                projection_dim=16,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    for name, part in {"vae": vae, "unet": unet, "text_encoder": text_encoder}.items():
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns of what does not concern these models
        part.save_pretrained(folder / name)
    scheduler.save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "StableDiffusionPipeline", "requires_safety_checker": False, "safety_checker": [None, None],
        "feature_extractor": [None, None], "image_encoder": [None, None], "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderTiny"], "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"],
    }  # fmt: skip
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair format over the letters, with two merges."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS,
        pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer
