"""The forward process and the one face of every network: `Denoiser`, from a noisy sample to its clean prediction.

    x_t = alpha_t x0 + sigma_t eps                       (forward process, arXiv 2410.20898)
    score(x_t) = -(x_t - alpha_t x0_hat) / sigma_t^2     so a difference of scores is alpha_t / sigma_t^2 times one of
    x0_hat

Flow matching is the case alpha_t = 1 - t, sigma_t = t. Shapes: samples x0, xt, eps [B, ...]; t [B] whole numbers into
the schedule.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

Conditions = dict[str, Tensor]
"""What the networks are conditioned on, batch first: {"prompt_embeds": [B, L, D], ...}."""

Denoiser = Callable[[Tensor, Tensor, Conditions], Tensor]
"""(xt [B, ...], t [B], conditions) -> x0_hat [B, ...]. Every network, of whatever parametrisation, is adapted to it."""

GuidedReference = Callable[[Tensor, Tensor, Conditions], tuple[Tensor, Tensor | None]]
"""(xt, t, conditions) -> (r, g), each like xt: the x0 prediction that a divergence compares with, and the guidance that
stays beside it, a constant, or None."""

TimestepDistribution = Callable[[Tensor], Tensor]
"""Uniform numbers in [0, 1) [B] -> t [B]: a law by its quantiles, so that t is drawn by sample and not by batch."""

WEIGHTINGS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "x0": lambda alpha, sigma: alpha.new_ones(()),
    "eps": lambda alpha, sigma: alpha / sigma,
    "v": lambda alpha, sigma: 1 / sigma,
    "score": lambda alpha, sigma: alpha / sigma**2,
    "dmd2": lambda alpha, sigma: 1 / alpha,
}
"""Where a difference is measured: m_t(alpha, sigma) turns one of x0 predictions into one of x0, of eps (up to sign), of
v (a flow's velocity eps - x0 as well), of scores. "dmd2" is no quantity: it takes the factor alpha_t = d x_t / d x0 out
of `objectives.dmd`. Choosing it is choosing a weight of t: see `objectives`, `denoising_loss`."""


@dataclass(frozen=True)
class Schedule:
    """alpha_t and sigma_t of every t, two vectors [T], noise growing with t. `timesteps` [T]: what networks are fed for
    t, where that is not t itself (flows take 1000 sigma_t)."""

    alphas: Tensor
    sigmas: Tensor
    timesteps: Tensor | None = None
    _held: dict[torch.device, tuple[Tensor | None, ...]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def _on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """The three tables on a device, copied to it once: a copy from pageable memory waits for all that it computes."""
        if device not in self._held:
            tables = (self.alphas, self.sigmas, self.timesteps)
            self._held[device] = tuple(None if table is None else table.to(device) for table in tables)
        return self._held[device]

    def fed(self, t: Tensor) -> Tensor:
        """t [B] as the networks take it."""
        timesteps = self._on(t.device)[2]
        return t if timesteps is None else timesteps[t]

    def at(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(alpha_t, sigma_t), shaped to broadcast against `like` [B, ...] and of its dtype."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        alphas, sigmas, _ = self._on(t.device)
        assert alphas is not None and sigmas is not None
        alpha, sigma = alphas[t], sigmas[t]
        return alpha.to(like.dtype).view(shape), sigma.to(like.dtype).view(shape)

    def diffuse(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps; differentiable in x0."""
        alpha, sigma = self.at(t, x0)
        return alpha * x0 + sigma * eps

    def scale(self, weighting: str, t: Tensor, like: Tensor) -> Tensor:
        """m_t of a space, shaped to broadcast against `like`."""
        return WEIGHTINGS[weighting](*self.at(t, like))

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
            case "flow_prediction":  # v = eps - x0, with alpha + sigma = 1
                return xt - sigma * output
        raise ValueError(f"prediction: got {prediction!r}, known are 'epsilon', 'v_prediction', 'sample' and 'flow_prediction'")

    def error_factors(self, prediction: str, weighting: str) -> Tensor:
        """[T]: the factor that takes an error of a network's output to where an objective measures differences."""
        t, ones = torch.arange(len(self.alphas)), torch.ones_like(self.alphas)
        x0_error = self.x0_from(prediction, ones, ones, t) - self.x0_from(prediction, 0 * ones, ones, t)
        return (x0_error * WEIGHTINGS[weighting](self.alphas, self.sigmas)).abs()


def denoising_loss(
    denoiser: Denoiser, schedule: Schedule, x0: Tensor, t: Tensor, eps: Tensor, c: Conditions, weighting: str = "eps"
) -> Tensor:
    """[B]: the score network's loss, ||m_t (x0_hat - x0)||^2 averaged over dimensions (arXiv 2410.20898).

    lambda(t), which the paper leaves open, is chosen as the space whose error is squared: "eps" is ||eps_hat - eps||^2,
    that is the x0 error weighted by the signal-to-noise ratio. `x0` is a constant here: the caller passes samples cut
    from the generator's graph.
    """
    x0_hat = denoiser(schedule.diffuse(x0, t, eps), t, c)
    return (schedule.scale(weighting, t, x0) * (x0_hat - x0)).pow(2).flatten(1).mean(1)


def uniform_t(t_min: int, t_max: int) -> TimestepDistribution:
    """t ~ U[t_min, t_max)."""
    return lambda fraction: (t_min + fraction * (t_max - t_min)).floor().to(torch.long)


def log_normal_t(schedule: Schedule, mean: float, std: float, t_min: int, t_max: int) -> TimestepDistribution:
    """ln(sigma_t / alpha_t) ~ N(mean, std^2), cut to t in [t_min, t_max) (the law of Karras et al. 2022, arXiv
    2206.00364)."""
    ratio = (schedule.sigmas.double() / schedule.alphas.double()).log().cpu()
    edges = torch.cat([(ratio[1:] + ratio[:-1]) / 2, ratio[-1:] + 1])  # t stands for what is nearest to its ratio
    normal = torch.distributions.Normal(mean, std)
    low = normal.cdf(edges[t_min - 1]) if t_min > 0 else torch.zeros((), dtype=torch.float64)
    high = normal.cdf(edges[t_max - 1]) if t_max < len(ratio) else torch.ones((), dtype=torch.float64)

    def law(fraction: Tensor) -> Tensor:
        t = torch.searchsorted(edges, normal.icdf(low + fraction.double().cpu() * (high - low)))
        return t.clamp(t_min, t_max - 1).to(fraction.device)  # rounding at the edges, and infinity at fraction 0

    return law
