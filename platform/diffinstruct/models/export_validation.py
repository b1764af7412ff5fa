"""Before a run: will its export, as a stock pipeline, draw the picture that is trained?

Configurations of schedulers, decoders and networks have more keys than any program reads. So the stock pipeline is run
once, with the generator's scheduler, on modules that have the configurations and no weights: what it feeds its network,
and the picture that it makes of the network's answer, are held against ours. It takes about a second at any size.
"""

import inspect
from collections.abc import Mapping
from copy import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffinstruct.errors import UserError
from diffinstruct.models.denoiser import InputScale
from diffinstruct.models.export import one_step_scheduler
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.sources import message_lines, quiet

LARGEST_DIFFERENCE = 1e-3  # of two pictures in [0, 1]; rounding is 1e-5


class _Part(nn.Module):
    """A module of diffusers by its class and its configuration alone."""

    def __init__(self, kind: type, config: Mapping[str, Any]) -> None:
        super().__init__()
        parameters = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
        defaults = {parameter.name: parameter.default for parameter in parameters}  # for files older than some keys
        self.kind, self.config = kind, FrozenDict(defaults | dict(config))
        self.dtype, self.device = torch.float32, torch.device("cpu")


class _Network(_Part):
    """A network that answers one thing, and keeps what it was asked by the names of its class's arguments."""

    def __init__(self, kind: type, config: Mapping[str, Any], answer: Tensor) -> None:
        super().__init__(kind, config)
        self.answer = answer
        self.asked: dict[str, list[Tensor]] = {}
        # SDXL's pipeline asks the module itself how long its time ids should be
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    def forward(self, *inputs: Any, **more: Any) -> tuple[Tensor]:
        named = inspect.signature(self.kind.forward).bind(self, *inputs, **more).arguments  # type: ignore[attr-defined]
        leaves = {name: [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)] for name, value in named.items()}
        self.asked = {name: [leaf.double() for leaf in tensors] for name, tensors in leaves.items() if tensors}
        return (self.answer,)


class _Decoder(_Part):
    """A decoder of one layer: three channels, larger, and bounded."""

    def __init__(self, kind: type, config: Mapping[str, Any], pixels_per_latent: int) -> None:
        super().__init__(kind, config)
        self.pixels_per_latent = pixels_per_latent

    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        enlarged = latents[:, :3].repeat_interleave(self.pixels_per_latent, 2).repeat_interleave(self.pixels_per_latent, 3)
        return (torch.tanh(enlarged / 8),)


def validate_export(reference: Reference, timestep: int, input_scale: InputScale) -> None:
    """Hold the stock pipeline of a one-step generator against the generator, without weights.

    Raises UserError, one line, where the pipeline raises, feeds its network something else, or draws another picture.
    """
    reference.check_timestep(timestep, input_scale)
    z, target = (torch.randn(1, *reference.latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    ours = copy(reference)
    ours.vae = _Decoder(*reference.configured("vae"), reference.pixels_per_latent)
    network = _network(reference, z, target, timestep, input_scale)
    generator = reference.one_step(network, timestep, input_scale)
    c = reference.blank_conditions()
    picture, asked = ours.decode(generator(z, c)), network.asked
    kind = reference.family.pipeline
    says = f"reference.model: the {kind} that this run would export"
    try:
        stock = _stock_picture(reference, network, ours.vae, one_step_scheduler(reference, generator), z, c)
    except Exception as error:  # diffusers' pipelines raise whatever they fall over
        raise UserError(f"{says} cannot draw: {type(error).__name__}: {message_lines(error)[0]}") from error
    for name, values in asked.items():
        theirs = network.asked.get(name, [])
        if len(values) != len(theirs) or not all(map(_equal, values, theirs)):
            raise UserError(f"{says} feeds its network another {name} than the training; it would not be the trained generator")
    if (difference := (picture - stock).abs().max().item()) > LARGEST_DIFFERENCE:
        raise UserError(f"{says} draws another picture than the training: they differ by {difference:.3f} of 1")


def _network(reference: Reference, z: Tensor, target: Tensor, timestep: int, input_scale: InputScale) -> _Network:
    """A network whose answer at T makes `target` of z."""
    schedule, t = reference.schedule, torch.tensor([timestep])
    _, sigma = schedule.at(t, z)
    xt = sigma * z if input_scale == "sigma" else z
    at_0, at_1 = (schedule.x0_from(reference.prediction, torch.full_like(z, value), xt, t) for value in (0.0, 1.0))
    answer = (target - at_0) / (at_1 - at_0)
    kind, config = reference.configured(reference.family.part)
    # The variance that some networks predict, too, comes after it
    answer = torch.cat([answer] * (config.get("out_channels", answer.shape[1]) // answer.shape[1]), dim=1)
    return _Network(kind, config, answer)


@torch.no_grad()
def _stock_picture(
    reference: Reference, network: _Network, decoder: _Decoder, scheduler: Any, z: Tensor, c: Mapping[str, Tensor]
) -> Tensor:
    """The picture [1, 3, H, W] that diffusers' own pipeline makes of z in one step."""
    with quiet(), np.errstate(divide="ignore"):  # of sigma 0, see `export`
        pipeline = reference.stock_pipeline({reference.family.part: network, "vae": decoder, "scheduler": scheduler})
        pipeline.set_progress_bar_config(disable=True)
        known = inspect.signature(pipeline.__call__).parameters
        # PixArt's has a default for one and takes it for a second prompt; its other resizes what it finds too small
        more = {key: value for key, value in (("negative_prompt", None), ("use_resolution_binning", False)) if key in known}
        call = {"num_inference_steps": 1, "guidance_scale": 0.0, "latents": z.clone(), "output_type": "pt"}
        picture: Tensor = pipeline(**call, **more, **c).images
    return picture


def _equal(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two inputs of a network are the same numbers; a time may come as one number or as one a sample."""
    return bool(torch.isclose(ours, theirs, rtol=1e-4, atol=1e-5).all()) if ours.numel() == theirs.numel() else False
