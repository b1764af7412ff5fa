"""Networks behind one face: denoisers and one-step generators."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffinstruct.method.diffusion import Conditions, Schedule
from diffinstruct.models.families import StableDiffusion

InputScale = Literal["unit", "sigma"]
"""What a one-step generator takes z ~ N(0, I) for: "unit" feeds it as it is (DMD2), "sigma" feeds sigma_T z (SiD)."""


class NetworkDenoiser(nn.Module):
    """A pipeline's network behind the one face of every network: (xt, t, conditions) -> x0_hat, in xt's dtype.

    pixels_per_latent: along an edge, of the pipeline's decoder.
    """

    def __init__(
        self, network: nn.Module, family: type[StableDiffusion], schedule: Schedule, prediction: str, pixels_per_latent: int
    ) -> None:
        super().__init__()
        self.network, self.family, self.schedule = network, family, schedule
        self.prediction, self.pixels_per_latent = prediction, pixels_per_latent
        self.dtype: torch.dtype = network.dtype  # type: ignore[assignment]  # held: to ask, diffusers walks all modules

    def _apply(self, *arguments: Any, **more: Any) -> Any:
        applied = super()._apply(*arguments, **more)
        self.dtype = self.network.dtype  # type: ignore[assignment]
        return applied

    def forward(self, xt: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        output = self.output(xt, self.schedule.fed(t), conditions)
        return self.schedule.x0_from(self.prediction, output, xt, t)

    def output(self, xt: Tensor, fed: Tensor, conditions: Conditions) -> Tensor:
        """What the network itself predicts, in xt's dtype; `fed` [B] is the time as it takes it."""
        c = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in conditions.items()}
        pixels = (xt.shape[-2] * self.pixels_per_latent, xt.shape[-1] * self.pixels_per_latent)
        return self.family.output(self.network, xt.to(self.dtype), fed, c, pixels).to(xt.dtype)


class OneStepGenerator(nn.Module):
    """(z, conditions) -> x0: a denoiser at one fixed timestep T, fed with noise alone.

    x0 = (xt - sigma_T eps_hat) / alpha_T with xt = z or sigma_T z, for a network that predicts eps.
    """

    def __init__(self, denoiser: NetworkDenoiser, timestep: int, input_scale: InputScale) -> None:
        super().__init__()
        self.denoiser, self.timestep, self.input_scale = denoiser, timestep, input_scale

    def forward(self, z: Tensor, conditions: Conditions) -> Tensor:
        t = torch.full((len(z),), self.timestep, device=z.device)
        _, sigma = self.denoiser.schedule.at(t, z)
        return self.denoiser(sigma * z if self.input_scale == "sigma" else z, t, conditions)
