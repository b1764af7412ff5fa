"""What differs between families of text-to-image pipelines. Each answers the same four questions: which parts there
are, what a prompt and the null prompt become, and how the network is called. To add one, add its class.

Prompts are encoded by diffusers' own pipelines, so that a network is conditioned on what it was trained on.

Shapes: B samples; xt and outputs [B, C, H, W]; t [B], as the network is fed; conditions batch first.
"""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffinstruct.method.diffusion import Conditions


class StableDiffusion:
    """SD 1.x and 2.x: a U-Net and one CLIP text encoder."""

    pipeline: ClassVar[str] = "StableDiffusionPipeline"  # its class in diffusers
    part: ClassVar[str] = "unet"  # the network's name in the pipeline
    network: ClassVar[str] = "UNet2DConditionModel"  # its class in diffusers
    once: ClassVar[tuple[str, ...]] = ()  # classes by which older pipelines call the same network
    texts: ClassVar[Mapping[str, str]] = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
    """What turns prompts into conditions: name in the pipeline -> class in transformers."""
    limits: ClassVar[Mapping[str, int]] = {}
    """Tokens after which the pipeline cuts a prompt, where that is not as many as the tokenizer says."""
    flow: ClassVar[bool] = False  # whether its schedule is that of a flow
    shape: ClassVar[tuple[str, ...]] = ("in_channels", "out_channels", "cross_attention_dim")
    """Keys of the network's configuration that a generator's start has in common with the reference."""

    adapted: ClassVar[tuple[str, ...]] = (
        *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
        *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
    )
    """Endings of the names of the layers that adapters belong to (as in DMD2's one-step SDXL; arXiv 2405.14867)."""

    @staticmethod
    def encode(pipeline: Any, prompts: list[str], device: torch.device | str) -> Conditions:
        """The prompts' conditions."""
        return {"prompt_embeds": pipeline.encode_prompt(prompts, device, 1, False)[0]}

    @staticmethod
    def null(empty: Conditions, pipeline: Any) -> Conditions:
        """What classifier-free guidance takes for no prompt; `empty`: the conditions of the prompt ""."""
        return empty

    @staticmethod
    def blank(network: Any, tokens: int) -> Conditions:
        """Conditions of one prompt as to their shapes, for this network's configuration and a CLIP of so many tokens."""
        return {"prompt_embeds": torch.zeros(1, tokens, network.cross_attention_dim)}

    @staticmethod
    def output(network: nn.Module, xt: Tensor, t: Tensor, c: Conditions, pixels: tuple[int, int]) -> Tensor:
        """What the network says of xt, like xt. `pixels`: height and width of the picture."""
        return network(xt, t, c["prompt_embeds"], return_dict=False)[0]

    @staticmethod
    def unscaled(latents: Tensor, decoder: Any) -> Tensor:
        """The network's latents as the decoder takes them, by its configuration, as far as the stock pipeline reads it."""
        return latents / decoder.scaling_factor


class StableDiffusionXL(StableDiffusion):
    """SDXL: a U-Net and two CLIP text encoders; it also gets the second's pooled state, and the picture's size as "time
    ids" (original size, crop, target size; not cropped, here)."""

    pipeline = "StableDiffusionXLPipeline"
    texts: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
    }

    @staticmethod
    def encode(pipeline: Any, prompts: list[str], device: torch.device | str) -> Conditions:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, device=device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @staticmethod
    def null(empty: Conditions, pipeline: Any) -> Conditions:
        zeros = pipeline.config.force_zeros_for_empty_prompt
        return {key: torch.zeros_like(value) if zeros else value for key, value in empty.items()}

    @staticmethod
    def blank(network: Any, tokens: int) -> Conditions:
        pooled = network.projection_class_embeddings_input_dim - 6 * network.addition_time_embed_dim
        embeds = torch.zeros(1, tokens, network.cross_attention_dim)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": torch.zeros(1, pooled)}

    @staticmethod
    def output(network: nn.Module, xt: Tensor, t: Tensor, c: Conditions, pixels: tuple[int, int]) -> Tensor:
        sizes = _row(xt, *pixels, 0, 0, *pixels)
        added = {"text_embeds": c["pooled_prompt_embeds"], "time_ids": sizes}
        return network(xt, t, c["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]

    @staticmethod
    def unscaled(latents: Tensor, decoder: Any) -> Tensor:
        mean, std = (getattr(decoder, key, None) for key in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return latents / decoder.scaling_factor
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1) for values in (mean, std))
        return latents * std / decoder.scaling_factor + mean


class PixArtAlpha(StableDiffusion):
    """PixArt-alpha: a transformer that also learns the variance, which is not used here, and a T5 text encoder."""

    pipeline = "PixArtAlphaPipeline"
    part = "transformer"
    network = "PixArtTransformer2DModel"
    once = ("Transformer2DModel",)
    texts: ClassVar[Mapping[str, str]] = {"text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer"}
    limits: ClassVar[Mapping[str, int]] = {"tokenizer": 120}
    shape = ("in_channels", "out_channels", "caption_channels")
    adapted = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2")

    @staticmethod
    def encode(pipeline: Any, prompts: list[str], device: torch.device | str) -> Conditions:
        # Cleaned, as a call of its pipeline does by default, and `encode_prompt` does not
        clean = {"do_classifier_free_guidance": False, "device": device, "clean_caption": True}
        embeds, mask, _, _ = pipeline.encode_prompt(prompts, **clean)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    @staticmethod
    def blank(network: Any, tokens: int) -> Conditions:
        tokens = PixArtAlpha.limits["tokenizer"]
        return {
            "prompt_embeds": torch.zeros(1, tokens, network.caption_channels),
            "prompt_attention_mask": torch.ones(1, tokens, dtype=torch.long),
        }

    @staticmethod
    def output(network: nn.Module, xt: Tensor, t: Tensor, c: Conditions, pixels: tuple[int, int]) -> Tensor:
        config: Any = network.config
        sizes: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
        if config.sample_size == 128:  # the 1024 px model is told the picture's size
            sizes = {"resolution": _row(xt, *pixels), "aspect_ratio": _row(xt, pixels[0] / pixels[1])}
        text = {"encoder_hidden_states": c["prompt_embeds"], "encoder_attention_mask": c["prompt_attention_mask"]}
        output = network(xt, timestep=t, added_cond_kwargs=sizes, return_dict=False, **text)[0]
        return output.chunk(2, dim=1)[0] if config.out_channels == 2 * config.in_channels else output


class StableDiffusion3(StableDiffusion):
    """SD3 and 3.5: a flow-matching transformer, two CLIP text encoders and a T5."""

    pipeline = "StableDiffusion3Pipeline"
    part = "transformer"
    network = "SD3Transformer2DModel"
    texts: ClassVar[Mapping[str, str]] = {
        "text_encoder": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer_2": "CLIPTokenizer",
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5Tokenizer",
    }
    limits: ClassVar[Mapping[str, int]] = {"tokenizer_3": 256}
    flow = True
    shape = ("in_channels", "out_channels", "joint_attention_dim", "pooled_projection_dim")
    adapted = (
        *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
        *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    )

    @staticmethod
    def encode(pipeline: Any, prompts: list[str], device: torch.device | str) -> Conditions:
        embeds, _, pooled, _ = pipeline.encode_prompt(prompts, None, None, device, do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    @staticmethod
    def blank(network: Any, tokens: int) -> Conditions:
        with_t5 = tokens + StableDiffusion3.limits["tokenizer_3"]
        pooled = torch.zeros(1, network.pooled_projection_dim)
        return {"prompt_embeds": torch.zeros(1, with_t5, network.joint_attention_dim), "pooled_prompt_embeds": pooled}

    @staticmethod
    def output(network: nn.Module, xt: Tensor, t: Tensor, c: Conditions, pixels: tuple[int, int]) -> Tensor:
        text = {"encoder_hidden_states": c["prompt_embeds"], "pooled_projections": c["pooled_prompt_embeds"]}
        return network(hidden_states=xt, timestep=t, return_dict=False, **text)[0]

    @staticmethod
    def unscaled(latents: Tensor, decoder: Any) -> Tensor:
        return latents / decoder.scaling_factor + decoder.shift_factor


def _row(xt: Tensor, *values: float) -> Tensor:
    """These values for each sample [B, n]. They are written where xt is: a copy would make the CPU wait for a GPU."""
    return torch.stack([xt.new_full((), value) for value in values]).expand(len(xt), -1)


def _families(family: type[StableDiffusion]) -> Iterator[type[StableDiffusion]]:
    """A family and all that are derived from it."""
    yield family
    for derived in family.__subclasses__():
        yield from _families(derived)


FAMILIES: Mapping[str, type[StableDiffusion]] = {family.pipeline: family for family in _families(StableDiffusion)}
"""The families of this file, by the name of the pipeline's class, as its model_index.json says it."""
