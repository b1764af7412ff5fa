"""Tiny random pipeline folders of every family, built in a second or two: 32 px pictures, latents [4, 8, 8]."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from sentencepiece import SentencePieceTrainer
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from diffinstruct.config.experiment import Experiment

TOKENS = 12
LATENT = (4, 8, 8)


def build(folder: Path, prediction: str = "epsilon", dtype: torch.dtype = torch.float32, family: str = "sd15") -> Path:
    """Write the pipeline into `folder` and return it; the weights are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: dict[str, Any] = FAMILIES[family].build(folder, prediction)
    index: dict[str, Any] = {"_class_name": FAMILIES[family].pipeline, **FAMILIES[family].index}
    for name, part in parts.items():
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own `to` warns of what does not concern these models
        part.save_pretrained(folder / name)
        index[name] = [type(part).__module__.partition(".")[0], type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def experiment(folder: Path, **sections: Any) -> Experiment:
    """A run on the tiny pipeline, which is built in `folder` beside its prompts, and tracked there; sections as in a
    recipe."""
    prompts = folder / "prompts.txt"
    prompts.write_text("".join(f"a {colour} thing\n" for colour in ("red", "blue", "pale", "dark")))
    content = {
        "global_batch_size": 8,
        "reference": {"model": str(build(folder / "tiny"))},
        "generator": {"init_from": "reference"},
        "rewards": {"trained": [{"name": "tiny.rewards:Red"}], "held_out": ["tiny.rewards:Calm"]},
        "prompts": {"train": str(prompts), "grid": str(prompts)},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
    }
    return Experiment.model_validate(content | sections)


def _sd15(folder: Path, prediction: str) -> dict[str, Any]:
    tokenizer = _clip_tokenizer(folder / "tokenizer")
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
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    text_encoder = CLIPTextModel(_clip_config(tokenizer))
    return {"vae": vae, "unet": unet, "text_encoder": text_encoder, "tokenizer": tokenizer, "scheduler": scheduler}


def _sdxl(folder: Path, prediction: str) -> dict[str, Any]:
    tokenizer, tokenizer_2 = _clip_tokenizer(folder / "tokenizer"), _clip_tokenizer(folder / "tokenizer_2")
    unet = UNet2DConditionModel(
        sample_size=LATENT[1], block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32, attention_head_dim=(1, 2),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=16 + 6 * 8,
    )  # fmt: skip
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction,
        timestep_spacing="leading", steps_offset=1,
    )  # fmt: skip
    return {
        "vae": kl_decoder(4), "unet": unet, "scheduler": scheduler,
        "text_encoder": CLIPTextModel(_clip_config(tokenizer, 2)), "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(_clip_config(tokenizer_2, 2)), "tokenizer_2": tokenizer_2,
    }  # fmt: skip


def _pixart(folder: Path, prediction: str) -> dict[str, Any]:
    transformer = PixArtTransformer2DModel(
        sample_size=LATENT[1], num_layers=2, num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
        patch_size=2, cross_attention_dim=16, caption_channels=16, norm_elementwise_affine=False, norm_eps=1e-6,
        norm_type="ada_norm_single", interpolation_scale=1,
    )  # fmt: skip
    transformer.proj_out.weight.data.normal_(std=0.3)  # the published start is trained; a fresh one says nothing
    tokenizer = _t5_tokenizer()
    scheduler = DPMSolverMultistepScheduler(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", prediction_type=prediction
    )  # fmt: skip
    return {
        "vae": kl_decoder(4), "transformer": transformer, "scheduler": scheduler,
        "text_encoder": T5EncoderModel(_t5_config(tokenizer)), "tokenizer": tokenizer,
    }  # fmt: skip


def _sd3(folder: Path, prediction: str) -> dict[str, Any]:
    tokenizer, tokenizer_2 = _clip_tokenizer(folder / "tokenizer"), _clip_tokenizer(folder / "tokenizer_2")
    tokenizer_3 = _t5_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=LATENT[1], patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=32,
        pos_embed_max_size=16,
    )  # fmt: skip
    return {
        "vae": kl_decoder(4, shift_factor=0.2), "transformer": transformer,
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": CLIPTextModelWithProjection(_clip_config(tokenizer, 2)), "tokenizer": tokenizer,
        "text_encoder_2": CLIPTextModelWithProjection(_clip_config(tokenizer_2, 2)), "tokenizer_2": tokenizer_2,
        "text_encoder_3": T5EncoderModel(_t5_config(tokenizer_3, 32)), "tokenizer_3": tokenizer_3,
    }  # fmt: skip


def kl_decoder(channels: int, **more: Any) -> AutoencoderKL:
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=channels, norm_num_groups=4, sample_size=32, scaling_factor=0.7, **more,
    )  # fmt: skip
    vae.decoder.conv_out.weight.data *= 3
    return vae


def _clip_config(tokenizer: CLIPTokenizer, layers: int = 1) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5_config(tokenizer: T5Tokenizer, width: int = 16) -> T5Config:
    return T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, decoder_start_token_id=0,
    )  # fmt: skip


def _clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """CLIP's byte-pair format over the letters, with two merges."""
    letters = "abcdefghijklmnopqrstuvwxyz,."
    pieces = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters), "re", "red</w>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    return CLIPTokenizer(
        vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=TOKENS,
        pad_token="<|endoftext|>", unk_token="<|endoftext|>",
    )  # fmt: skip


def _t5_tokenizer() -> T5Tokenizer:
    """T5's unigram format over the letters."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    return T5Tokenizer(vocab=[*special, *((letter, -3.0) for letter in string.ascii_lowercase + ",.")], extra_ids=0)


def as_published(folder: Path) -> T5Tokenizer:
    """A T5 tokenizer's folder as PixArt's authors left it: a SentencePiece model and no tokenizer.json. Returns it."""
    for path in folder.iterdir():
        path.unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(["a red hat", "far too many words for this text encoder, they are cut off"]),
        model_prefix=str(folder / "spiece"), vocab_size=28, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2,
    )  # fmt: skip
    (folder / "spiece.vocab").unlink()
    config = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return T5Tokenizer.from_pretrained(folder)


class Family(NamedTuple):
    """A tiny pipeline of one family: its class in diffusers, the timestep of its one-step generator, what makes its
    parts, and further entries of its model_index.json."""

    pipeline: str
    timestep: int
    build: Callable[[Path, str], dict[str, Any]]
    index: Mapping[str, Any] = MappingProxyType({})


NO_CHECKER = {key: [None, None] for key in ("safety_checker", "feature_extractor", "image_encoder")}
FAMILIES = {
    "sd15": Family("StableDiffusionPipeline", 625, _sd15, {"requires_safety_checker": False, **NO_CHECKER}),
    "sdxl": Family("StableDiffusionXLPipeline", 399, _sdxl, {"force_zeros_for_empty_prompt": True}),
    "pixart": Family("PixArtAlphaPipeline", 440, _pixart),
    "sd3": Family("StableDiffusion3Pipeline", 999, _sd3),
}
"""Tests that ask for the fixture `family` take each in turn."""
