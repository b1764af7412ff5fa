"""The forward process and the one face of every network: `Denoiser`, from a noisy sample to its clean prediction.

    x_t = alpha_t x0 + sigma_t eps                       (forward process, arXiv 2410.20898)
    score(x_t) = -(x_t - alpha_t x0_hat) / sigma_t^2     so a difference of scores is alpha_t / sigma_t^2 times one of x0_hat

Shapes: samples x0, xt, eps [B, ...]; t [B] whole numbers into the schedule.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Conditions = dict[str, Tensor]
"""What the networks are conditioned on, batch first: {"prompt_embeds": [B, L, D], ...}."""

Denoiser = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(xt [B, ...], t [B], conditions) -> x0_hat [B, ...]. Every network, of whatever parametrisation, is adapted to this."""


@dataclass(frozen=True)
class Schedule:
    """alpha_t and sigma_t of every t, two vectors [T]."""

    alphas: Tensor
    sigmas: Tensor

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), shaped to broadcast against `like` [B, ...] and of its dtype."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        alpha, sigma = self.alphas.to(t.device)[t], self.sigmas.to(t.device)[t]
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    def diffuse(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps; differentiable in x0."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def x0_from(self, prediction: str, output: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        """x0_hat from a network's output; `prediction` is diffusers' name of what the network predicts."""
        alpha, sigma = self.at(t, xt)
        match prediction:
            case "epsilon":
                return (xt - sigma * output) / alpha
            case "v_prediction":  # v = alpha eps - sigma x0, with alpha^2 + sigma^2 = 1
                return alpha * xt - sigma * output
            case "sample":
                return output
        raise ValueError(f"prediction: got {prediction!r}, known are 'epsilon', 'v_prediction' and 'sample'")


def per_sample_sum(x: Tensor) -> Tensor:
    """[B, ...] -> [B]: the sum over a sample's dimensions, the reduction of every objective here."""
    return x.flatten(1).sum(1)


def denoising_loss(denoiser: Denoiser, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, c: Conditions) -> Tensor:
    """[B]: the score network's loss, ||eps_hat - eps||^2 averaged over dimensions (arXiv 2410.20898, with weight 1 in eps).

    eps_hat - eps = -(alpha_t / sigma_t) (x0_hat - x0), so this is the x0 error weighted by the signal-to-noise ratio.
    `x0` is a constant here: the caller passes samples cut from the generator's graph.
    """
    alpha, sigma = schedule.at(t, x0)
    x0_hat = denoiser(schedule.diffuse(x0, t, eps), t, c)
    return ((alpha / sigma) * (x0_hat - x0)).pow(2).flatten(1).mean(1)


def uniform_t(fraction: Tensor, t_min: int, t_max: int) -> Tensor:
    """t ~ U[t_min, t_max) from uniform numbers in [0, 1)."""
    return (t_min + fraction * (t_max - t_min)).floor().to(torch.long)
