"""The whole method where the truth is known: distilled from a Gaussian mixture, the generator has the mixture's
moments."""

import copy

import pytest
import torch
from torch import nn

from diffinstruct.method.diffusion import Schedule, uniform_t
from diffinstruct.method.distances import pseudo_huber
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.objectives import objective
from diffinstruct.method.rewards import Scores
from diffinstruct.method.step import StepConfig, TrainState, alternating_round

MEANS, STDS, SHARES = torch.tensor([-1.0, 1.5]), torch.tensor([0.3, 0.5]), torch.tensor([0.4, 0.6])
MEAN = (SHARES * MEANS).sum()
STD = ((SHARES * (STDS**2 + MEANS**2)).sum() - MEAN**2).sqrt()
ALPHAS = torch.linspace(0.999, 0.05, 1000)
SCHEDULE = Schedule(ALPHAS, (1 - ALPHAS**2).sqrt())
BATCH = 512


def reference(xt, t, c):
    """The exact posterior mean of the mixture."""
    alpha, sigma = SCHEDULE.at(t, xt)
    variances = alpha**2 * STDS**2 + sigma**2  # [B, 2]
    log_weights = SHARES.log() - 0.5 * variances.log() - (xt - alpha * MEANS) ** 2 / (2 * variances)
    posterior = MEANS + alpha * STDS**2 / variances * (xt - alpha * MEANS)
    return (log_weights.softmax(1) * posterior).sum(1, keepdim=True), None


class Network(nn.Module):
    """A multilayer perceptron on x and features of t; without t the generator."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, *rest):
        t = rest[0] if len(rest) == 2 else torch.full((len(x),), 999)
        alpha, sigma = SCHEDULE.at(t, x)
        log_ratio = (sigma / alpha).log()
        level = torch.cat([alpha, sigma, log_ratio, (log_ratio).sin(), (2 * log_ratio).sin(), (2 * log_ratio).cos()], 1)
        # Preconditioned as by Karras et al. 2022: near the identity where there is little noise.
        return alpha / (alpha**2 + sigma**2) * x + sigma * self.layers(torch.cat([x, alpha * x, level], 1))


def nobody(latents, prompts):
    return lambda: Scores({}, torch.zeros_like(latents), 0.0, 16)


@pytest.mark.parametrize(
    ("name", "space"),
    [
        ("di_star", "x0"),
        *(pytest.param(*row, marks=pytest.mark.long) for row in (("diff_instruct", "eps"), ("sid", "x0"), ("dmd", "x0"))),
    ],
)
def test_the_generators_moments_reach_the_references(name, space):
    torch.manual_seed(0)
    generator, score_network = Network(), Network()
    train_state = TrainState(
        generator=generator,
        score_network=score_network,
        reference=reference,
        ema=copy.deepcopy(generator),
        generator_optimizer=torch.optim.Adam(generator.parameters(), 1e-3, betas=(0.0, 0.99)),
        score_optimizer=torch.optim.Adam(score_network.parameters(), 3e-3, betas=(0.0, 0.99)),
    )
    settings = StepConfig(
        objective=objective(name, schedule=SCHEDULE, weighting=space, distance=pseudo_huber(0.1), args={}),
        regularization_weight=1.0, reward_scale=0.0, score_updates=3, reuse_sample=True, score_weighting="v",
        timestep_distribution=uniform_t(20, 980), generator_max_grad_norm=1.0, score_max_grad_norm=10.0, ema_decay=0.99,
        precision="fp32", micro_batch_size=None,
    )  # fmt: skip
    z = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(1))

    def moments():
        with torch.no_grad():
            x = train_state.ema(z, {})
        return torch.stack([x.mean(), x.std()])

    truth = torch.stack([MEAN, STD])
    before = (moments() - truth).abs()
    for step in range(1500):
        draws = NoiseStreams(0, step, BATCH, (1,), slice(0, BATCH), torch.device("cpu"))
        alternating_round(train_state, settings, SCHEDULE, draws, [""] * BATCH, {}, nobody)
    assert before.max() > 0.3
    assert (moments() - truth).abs().max() < 0.1, (moments(), truth)
