"""An SD1.5-shaped pipeline with random weights, in the layouts in which one gets such models: as a hub repository lies in
the cache, with its fp16 variant alone, and as one file in its authors' layout."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sources import RandomWeights

UNET, VAE, TEXTS = "unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"
"""Where a pipeline's weights are."""


def write_pipeline(shapes: Path, folder: Path) -> None:
    """A pipeline of these configuration files, with random weights in fp32."""
    shutil.copytree(shapes, folder, dirs_exist_ok=True)
    reference = load_reference(str(shapes), weights=RandomWeights())
    text_encoder = json.loads((folder / "text_encoder" / "config.json").read_text())
    write_tokenizer(folder / "tokenizer", text_encoder["max_position_embeddings"])
    for part in (reference.family.part, "vae", "text_encoder"):
        network = reference.network() if part == reference.family.part else reference.part(part)
        network.save_pretrained(folder / part)
        del network


def write_tokenizer(folder: Path, tokens: int) -> None:
    """CLIP's byte-pair format over the letters."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [*string.ascii_lowercase, ",", "."]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    end = "<|endoftext|>"
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    CLIPTokenizer(**files, model_max_length=tokens, pad_token=end, unk_token=end).save_pretrained(folder)


def write_pickscore(config: dict[str, Any], model: Path, processor: Path) -> None:
    """A CLIP of this configuration with random weights, and what prepares its inputs."""
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(**config)).save_pretrained(model)
    CLIPConfig(**config).save_pretrained(processor)
    write_tokenizer(processor, config["text_config"].get("max_position_embeddings", 77))
    (processor / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "CLIPImageProcessor"}))


def in_hub_cache(cache: Path, name: str, commit: str, folder: Path) -> Path:
    """Put a folder into the hub's cache as a download leaves it: files in `blobs`, links to them in a snapshot. Returns
    the snapshot."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    for file in [path for path in sorted(folder.rglob("*")) if path.is_file()]:
        place = snapshot / file.relative_to(folder)
        blob = repository / "blobs" / hashlib.sha256(f"{commit}/{place.relative_to(snapshot)}".encode()).hexdigest()
        for parent in (place.parent, blob.parent):
            parent.mkdir(parents=True, exist_ok=True)
        file.replace(blob)
        place.symlink_to(os.path.relpath(blob, place.parent))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.rmtree(folder)
    return snapshot


def write_half_variant(pipeline: Path, folder: Path) -> None:
    """What a download of the fp16 variant alone brings."""
    shutil.copytree(pipeline, folder, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
    for file in pipeline.glob("*/*.safetensors"):
        weights = {name: value.half() if value.is_floating_point() else value for name, value in load_file(file).items()}
        half = folder / file.relative_to(pipeline).with_suffix(".fp16.safetensors")
        save_file(weights, half, metadata={"format": "pt"})


def write_one_file(pipeline: Path, file: Path) -> None:
    """All of a Stable Diffusion 1.x in one file, under its authors' names for the weights."""
    weights = dict[str, Tensor]()
    for name, weight in load_file(pipeline / f"{UNET}.safetensors").items():
        weights[f"model.diffusion_model.{original_unet_name(name, _levels(pipeline, 'unet'))}"] = weight
    for name, weight in load_file(pipeline / f"{VAE}.safetensors").items():
        is_attention = "attentions" in name and weight.ndim == 2
        weights[f"first_stage_model.{original_vae_name(name, _levels(pipeline, 'vae')[0])}"] = (
            weight[:, :, None, None] if is_attention else weight
        )
    for name, weight in load_file(pipeline / f"{TEXTS}.safetensors").items():
        weights[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = weight
    save_file(weights, file)


def _levels(pipeline: Path, part: str) -> tuple[int, int]:
    """Levels of a U-Net or a decoder, and layers of each."""
    config = json.loads((pipeline / part / "config.json").read_text())
    return len(config["block_out_channels"]), config["layers_per_block"]


def original_unet_name(name: str, levels_layers: tuple[int, int]) -> str:
    """What the authors of Stable Diffusion 1.x call a weight of the U-Net that diffusers calls `name`."""
    for ours, theirs in _unet_places(*levels_layers):
        if name.startswith(ours):
            rest = name.removeprefix(ours)
            if ".resnets." in ours:
                rest = next(new + rest.removeprefix(old) for old, new in RESNET.items() if rest.startswith(old))
            return theirs + rest
    raise KeyError(name)


RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip


def _unet_places(levels: int, layers: int) -> Iterator[tuple[str, str]]:
    yield from (
        ("conv_in.", "input_blocks.0.0."), ("conv_norm_out.", "out.0."), ("conv_out.", "out.2."),
        ("time_embedding.linear_1.", "time_embed.0."), ("time_embedding.linear_2.", "time_embed.2."),
        ("mid_block.resnets.0.", "middle_block.0."), ("mid_block.attentions.0.", "middle_block.1."),
        ("mid_block.resnets.1.", "middle_block.2."),
    )  # fmt: skip
    place = 1
    for level in range(levels):
        for layer in range(layers):
            yield f"down_blocks.{level}.resnets.{layer}.", f"input_blocks.{place}.0."
            yield f"down_blocks.{level}.attentions.{layer}.", f"input_blocks.{place}.1."
            place += 1
        yield f"down_blocks.{level}.downsamplers.0.conv.", f"input_blocks.{place}.0.op."
        place += 1
    for level in range(levels):
        for layer in range(layers + 1):
            place = level * (layers + 1) + layer
            yield f"up_blocks.{level}.resnets.{layer}.", f"output_blocks.{place}.0."
            yield f"up_blocks.{level}.attentions.{layer}.", f"output_blocks.{place}.1."
        # The lowest level has no attention
        yield f"up_blocks.{level}.upsamplers.0.", f"output_blocks.{place}.{1 if level == 0 else 2}."


def original_vae_name(name: str, levels: int) -> str:
    """What the authors call a weight of the decoder that diffusers calls `name`."""
    name = re.sub(r"up_blocks\.(\d)", lambda match: f"up.{levels - 1 - int(match[1])}", name)
    for ours, theirs in VAE_NAMES.items():
        name = re.sub(ours, theirs, name)
    return name


VAE_NAMES = {
    r"down_blocks": "down", r"mid_block\.resnets\.0": "mid.block_1", r"mid_block\.resnets\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", r"\.resnets": ".block", r"downsamplers\.0": "downsample",
    r"upsamplers\.0": "upsample", r"group_norm": "norm", r"to_([qkv])\.": r"\1.", r"to_out\.0": "proj_out",
    r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut",
}  # fmt: skip
