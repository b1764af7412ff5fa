"""A pretrained text-to-image diffusion model as the method needs it: schedule, denoisers, one-step generators, decoder.

`load_reference` reads a diffusers pipeline part by part and loads each part when it is first asked for: a reward actor
that only decodes never holds a U-Net. Nothing here unpickles: weights are safetensors, the rest is JSON and text.

Shapes: B samples; latents and noise [B, C, H, W] in the U-Net's units (the decoder's, times its scaling factor); t [B];
images [B, 3, H', W'] in [0, 1]; prompt_embeds [B, L, D].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, ConfigMixin, DDIMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from diffinstruct.diffusion import Conditions, Schedule
from diffinstruct.rewards import RewardModel

POCKET = Path(__file__).parent / "pocket"
SUPPORTED = "supported are pipelines of class StableDiffusionPipeline (one U-Net, one CLIP text encoder, beta schedule)"
DECODERS = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}
COMPONENTS = {
    "unet": ["UNet2DConditionModel"],
    "vae": list(DECODERS),
    "text_encoder": ["CLIPTextModel"],
    "tokenizer": ["CLIPTokenizer", "CLIPTokenizerFast"],
}

InputScale = Literal["unit", "sigma"]
"""What a one-step generator takes z ~ N(0, I) for: "unit" feeds it as it is (DMD2), "sigma" feeds sigma_T z (SiD)."""


class UNetDenoiser(nn.Module):
    """A diffusers U-Net behind the one face of every network: (xt, t, conditions) -> x0_hat, in xt's dtype."""

    def __init__(self, unet: UNet2DConditionModel, schedule: Schedule, prediction: str) -> None:
        super().__init__()
        self.unet, self.schedule, self.prediction = unet, schedule, prediction

    def forward(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        dtype = self.unet.dtype
        output = self.unet(xt.to(dtype), t, conditions["prompt_embeds"].to(dtype), return_dict=False)[0]
        return self.schedule.x0_from(self.prediction, output.to(xt.dtype), xt, t)


class OneStepGenerator(nn.Module):
    """(z, conditions) -> x0: a denoiser at one fixed timestep T, fed with noise alone.

    x0 = (xt - sigma_T eps_hat) / alpha_T with xt = z or sigma_T z, for a network that predicts eps.
    """

    def __init__(self, denoiser: UNetDenoiser, timestep: int, input_scale: InputScale) -> None:
        super().__init__()
        self.denoiser, self.timestep, self.input_scale = denoiser, timestep, input_scale

    def forward(self, z: Tensor, conditions: Conditions) -> Tensor:
        t = torch.full((len(z),), self.timestep, device=z.device)
        _, sigma = self.denoiser.schedule.at(t, z)
        return self.denoiser(sigma * z if self.input_scale == "sigma" else z, t, conditions)


class Reference:
    """A Stable Diffusion pipeline's parts. Decoder and text encoder are frozen; each network given out is its own copy.

    Not to be sent to another process: there, `load_reference` again and use the part that is needed.

    source: the folder or hub id that the parts are read from.
    index: the pipeline's `model_index.json`.
    schedule: alpha_t and sigma_t, from the pipeline's own betas.
    latent_shape: (C, H, W) of one sample, at the resolution that the U-Net was trained for.
    """

    def __init__(self, source: str, index: dict[str, Any], dtype: torch.dtype, device: torch.device | str) -> None:
        self.source, self.dtype, self.device = source, dtype, device
        self._decoder = DECODERS[index["vae"][1]]
        scheduler = _read(DDIMScheduler.load_config, source, subfolder="scheduler")
        if "beta_schedule" not in scheduler:
            raise _refusal(f"reference.model: the scheduler of {source} is a {scheduler['_class_name']}; {SUPPORTED}")
        self._ddim = DDIMScheduler.from_config(scheduler)
        self.betas: list[float] = self._ddim.betas.tolist()
        self.schedule = Schedule(self._ddim.alphas_cumprod.sqrt(), (1 - self._ddim.alphas_cumprod).sqrt())
        self.prediction: str = self._ddim.config.prediction_type
        self._unet_config = _read(UNet2DConditionModel.load_config, source, subfolder="unet")
        size = self._unet_config["sample_size"]
        self.latent_shape = (self._unet_config["in_channels"], *((size, size) if isinstance(size, int) else size))
        # Prompt sets are finite: a run meets each prompt many times. 1,000 embeddings of SD1.5 are 0.24 GB in fp32.
        self._embedding = lru_cache(maxsize=1000)(self._embed)

    @cached_property
    def vae(self) -> AutoencoderKL | AutoencoderTiny:
        return self._part(self._decoder, self.source, "vae").requires_grad_(False)

    @cached_property
    def text_encoder(self) -> CLIPTextModel:
        return self._part(CLIPTextModel, self.source, "text_encoder").requires_grad_(False)

    @cached_property
    def tokenizer(self) -> CLIPTokenizer:
        return _read(CLIPTokenizer.from_pretrained, self.source, subfolder="tokenizer")

    @cached_property
    def _sampling_unet(self) -> UNet2DConditionModel:
        return self._part(UNet2DConditionModel, self.source, "unet").requires_grad_(False)

    def denoiser(self) -> UNetDenoiser:
        """A fresh copy of the reference's network, trainable, on the reference's device."""
        unet = self._part(UNet2DConditionModel, self.source, "unet")
        return UNetDenoiser(unet, self.schedule, self.prediction)

    def generator(self, timestep: int, start: str = "reference", input_scale: InputScale = "unit") -> OneStepGenerator:
        """A fresh one-step generator.

        timestep: T, an index into the schedule.
        start: "reference", "pocket-distilled", or a folder or hub id that holds a U-Net or a pipeline with one; its
            output is taken for what the reference's is (epsilon, v, sample).
        Raises UserError for a timestep outside the schedule and for a start that does not fit the reference.
        """
        if not 0 <= timestep < len(self.betas):
            raise _refusal(f"generator.timestep: got {timestep}, the schedule has 0 to {len(self.betas) - 1}")
        source = {"reference": self.source, "pocket-distilled": str(POCKET / "generator")}.get(start, start)
        unet = self._part(UNet2DConditionModel, source, _unet_subfolder(source))
        for key in ("in_channels", "out_channels", "cross_attention_dim"):
            if unet.config[key] != self._unet_config[key]:
                raise _refusal(
                    f"generator.start: {start} does not fit the reference {self.source}: "
                    f"{key} is {unet.config[key]}, not {self._unet_config[key]}"
                )
        return OneStepGenerator(UNetDenoiser(unet, self.schedule, self.prediction), timestep, input_scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, H', W'] in [0, 1], in the latents' dtype, differentiable.

        The clamp is a plain one, as in the exported pipeline: the gradient is that of the picture as it is shown, so a
        value that the decoder puts beyond black or white gets none, and one inside the range gets all of it.
        """
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        return (self.vae.decode(scaled, return_dict=False)[0].to(latents.dtype) * 0.5 + 0.5).clamp(0, 1)

    def sampler(self, generator: OneStepGenerator) -> Callable[[list[str], Tensor], Tensor]:
        """(prompts, noise [B, C, H, W]) -> images [B, 3, H', W'] in [0, 1], of a one-step generator, without gradient."""

        @torch.no_grad()
        def sample(prompts: list[str], z: Tensor) -> Tensor:
            return self.decode(generator(z.to(self.device), self.encode_prompts(prompts)))

        return sample

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """{"prompt_embeds": [B, L, D]}, a constant, as StableDiffusionPipeline computes it; `[""]` is the null condition.

        Each prompt is encoded alone, so its embedding depends neither on its neighbours nor on what the cache holds: a
        resumed run sees the same bits.
        """
        return {"prompt_embeds": torch.stack([self._embedding(prompt) for prompt in prompts])}

    @torch.no_grad()
    def sample(self, prompts: list[str], z: Tensor, steps: int = 50, guidance_scale: float = 1.0) -> Tensor:
        """The reference's own latents, by deterministic DDIM from z [B, C, H, W] ~ N(0, I).

        `guidance_scale` is diffusers', 1 + the method's cfg_scale; at 1 or below the sampling is plain conditional.
        """
        guided = guidance_scale > 1
        c = self.encode_prompts([""] * len(prompts) * guided + prompts)["prompt_embeds"]
        scheduler = DDIMScheduler.from_config(self._ddim.config)
        scheduler.set_timesteps(steps, device=z.device)
        xt = z.to(self.dtype)
        for t in scheduler.timesteps:
            output = self._sampling_unet(torch.cat([xt] * (1 + guided)), t, c, return_dict=False)[0]
            if guided:
                null, conditional = output.chunk(2)
                output = null + guidance_scale * (conditional - null)
            xt = scheduler.step(output, t, xt, return_dict=False)[0]
        return xt.to(z.dtype)

    def _embed(self, prompt: str) -> Tensor:
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer([prompt], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state[0]

    def _part(self, kind: type, source: str, subfolder: str | None) -> Any:
        load = kind.from_pretrained  # type: ignore[attr-defined]
        with quiet() if Path(source).is_dir() else nullcontext():  # a download keeps its progress bar
            part = _read(load, source, subfolder=subfolder or "", use_safetensors=True, dtype=self.dtype)
        return part.to(self.device).eval()


class _PipelineIndex(ConfigMixin):
    config_name = "model_index.json"


def load_reference(model: str, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Reference:
    """Open "pocket" (the built-in world), a local diffusers pipeline folder or a hub id; its parts load when used.

    dtype: of every part, whatever the files hold. Raises UserError, one line, for what is not there or not supported.
    """
    source = str(POCKET / "pipeline") if model == "pocket" else model
    index = _read(_PipelineIndex.load_config, source)
    pipeline = index.get("_class_name")
    if pipeline != "StableDiffusionPipeline":
        raise _refusal(f"reference.model: {model} is a {pipeline}; {SUPPORTED}")
    for part, classes in COMPONENTS.items():
        name = (index.get(part) or (None, None))[1]
        if name not in classes:
            wanted = " or ".join(classes)
            raise _refusal(f"reference.model: the {part} of {model} is a {name}, not a {wanted}; {SUPPORTED}")
    return Reference(source, index, dtype, device)


def load_reward(name: str, device: torch.device | str = "cpu") -> RewardModel:
    """A reward by its short name or import path, on `device`. Raises UserError: it may be anybody's code that fails to load."""
    import reward_models

    try:
        with quiet():
            reward = reward_models.load(name)
    except (Exception, SystemExit) as error:  # a script that is taken for a reward may end the program
        raise _refusal(f"rewards: cannot load {name!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not callable(reward):
        raise _refusal(f"rewards: {name!r} makes a {type(reward).__name__}, which is not callable")
    return reward.to(device) if isinstance(reward, nn.Module) else reward


def _unet_subfolder(source: str) -> str | None:
    """Where in a folder or hub repository the U-Net is: under `unet` in a pipeline, at the top otherwise."""
    try:
        UNet2DConditionModel.load_config(source, subfolder="unet")
    except OSError:
        return None
    return "unet"


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for files on disk, no remark on torchvision (which nothing here needs) or on the key that
    AutoencoderTiny writes and does not read."""
    verbosity, bars = diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_verbosity = transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        transformers_logging.set_verbosity(transformers_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _read(load: Callable[..., Any], source: str, **where: Any) -> Any:
    """`load(source, ...)`; what is missing becomes one line for the user."""
    try:
        return load(source, **where)
    except (OSError, ValueError) as error:
        part = f" of {source}" if where.get("subfolder") else source
        raise _refusal(f"cannot read {where.get('subfolder', '')}{part}: {str(error).splitlines()[0]}") from error


def _refusal(message: str) -> Exception:
    from diffinstruct.experiment import UserError  # pydantic is not needed where all is well

    return UserError(message)
