"""One alternating round of Diff-Instruct* (arXiv 2410.20898): torch only, knows neither Ray nor MLflow.

Everything that wants something of the generator says so as a gradient at its sample x0. The regulariser and the rewards are
computed on detached leaves, wherever that is cheapest, and the generator's graph is walked once:

    x0 = g_theta(z, c)  --detached-->  rewards (elsewhere, meanwhile)
    K_TA times:  score network learns to denoise x0
    x0.backward((regularization_weight * g_reg - reward_scale * g_reward) / batch),  clip, Adam, EMA
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffinstruct.diffusion import Conditions, GuidedReference, LawOfT, Schedule, denoising_loss
from diffinstruct.objectives import Objective
from diffinstruct.rewards import Send

Metrics = dict[str, float]


class NonFinite(RuntimeError):
    """A gradient that is not finite, found before the update: no weight has been touched by it."""


@dataclass(frozen=True)
class Settings:
    """What a round needs to know. `objective` None trains on the rewards alone; then no score network is trained."""

    objective: Objective | None
    regularization_weight: float
    reward_scale: float
    score_updates: int  # the paper's K_TA
    reuse_sample: bool  # the score network learns on the generator's own sample instead of drawing fresh ones
    score_space: str  # whose squared error the score network learns from: lambda(t)
    law_of_t: LawOfT  # of both players
    generator_max_grad_norm: float
    score_max_grad_norm: float
    ema_decay: float
    precision: str  # "fp32" | "bf16": autocast of the networks' forwards; weights and optimizers stay fp32


@dataclass
class Players:
    """The roles of the method and their optimizers. `generator` and `score_network` may be wrapped for data parallelism."""

    generator: nn.Module  # (z [B, ...], c) -> x0 [B, ...]
    score_network: nn.Module  # a Denoiser, trained on generated samples only
    reference: GuidedReference  # frozen
    ema: nn.Module  # fp32 average of the generator
    generator_optimizer: torch.optim.Optimizer
    score_optimizer: torch.optim.Optimizer

    def state_dict(self) -> dict[str, Any]:
        """All that a round changes; everything random is drawn from (seed, step), so there is no RNG state to keep."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, Any]:
        return {
            "generator": unwrapped(self.generator),
            "score_network": unwrapped(self.score_network),
            "ema": self.ema,
            "generator_optimizer": self.generator_optimizer,
            "score_optimizer": self.score_optimizer,
        }


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside a data-parallel wrapper: calling it neither synchronises nor counts as a training forward."""
    inner = getattr(module, "module", module)
    assert isinstance(inner, nn.Module)
    return inner


@dataclass(frozen=True)
class Draws:
    """The randomness of one round, drawn for the *global* batch and then sliced: the number of workers changes no number."""

    seed: int
    step: int
    global_batch: int
    shape: tuple[int, ...]  # of one sample
    rows: slice  # this worker's part of the global batch
    device: torch.device

    GENERATOR, SCORE, PROMPTS = 0, 8, 4  # places in a round; score update k draws at SCORE + 3 k

    def _generator(self, place: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) * 1_024 + place)

    def normal(self, place: int) -> Tensor:
        full = torch.randn(self.global_batch, *self.shape, generator=self._generator(place))
        return full[self.rows].to(self.device)

    def t(self, place: int, law: LawOfT) -> Tensor:
        fraction = torch.rand(self.global_batch, generator=self._generator(place))
        return law(fraction[self.rows]).to(self.device)

    def prompts(self, count: int) -> list[int]:
        """This worker's indices into `count` prompts."""
        full = torch.randint(count, (self.global_batch,), generator=self._generator(self.PROMPTS))
        return full[self.rows].tolist()


def alternating_round(
    players: Players,
    settings: Settings,
    schedule: Schedule,
    draws: Draws,
    prompts: Sequence[str],
    c: Conditions,
    send: Send,
) -> Metrics:
    """The score network's K_TA updates, then the generator's one. Returns this worker's means.

    Raises NonFinite before an update that would spoil the weights.
    """
    metrics: Metrics = {}
    autocast = _autocast(settings.precision, draws.device)
    z = draws.normal(draws.GENERATOR)
    with autocast:
        x0 = players.generator(z, c)
    sample = x0.detach()
    sending = time.perf_counter()
    collect = send(sample, prompts)
    exposed = time.perf_counter() - sending  # rewards in this process have their answer now

    if settings.objective:
        for k in range(settings.score_updates):
            metrics |= score_update(players, settings, schedule, draws, sample, c, draws.SCORE + 3 * k)
        leaf = sample.clone().requires_grad_()
        with autocast:
            loss, record = settings.objective(
                leaf,
                draws.t(draws.GENERATOR + 1, settings.law_of_t),
                draws.normal(draws.GENERATOR + 2),
                c,
                score_network=unwrapped(players.score_network),
                reference=players.reference,
            )
        pull = settings.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0]
        metrics |= {"loss/regularizer": loss.mean().item()} | {key: of.mean().item() for key, of in record.items()}
    else:
        pull = torch.zeros_like(sample)

    waiting = time.perf_counter()
    answer = collect()
    metrics["time/reward_exposed"] = exposed + time.perf_counter() - waiting
    metrics["time/reward"] = answer.seconds
    push = settings.reward_scale * answer.gradient.to(sample)
    metrics |= {f"reward/{name}": score.mean().item() for name, score in answer.scores.items()}

    players.generator_optimizer.zero_grad()
    x0.backward((pull - push) / len(sample))
    metrics |= {
        "gradient_norm/sample_regularizer": _mean_norm(pull),
        "gradient_norm/sample_reward": _mean_norm(push),
        "gradient_norm/generator": _clipped(
            players.generator, settings.generator_max_grad_norm, draws.step, "generator"
        ),
    }
    players.generator_optimizer.step()
    update_ema(players.ema, unwrapped(players.generator), min(settings.ema_decay, (1 + draws.step) / (10 + draws.step)))
    return metrics


def score_update(
    players: Players, settings: Settings, schedule: Schedule, draws: Draws, sample: Tensor, c: Conditions, place: int
) -> Metrics:
    """One denoising update of the score network on generated samples, with t and eps of its own."""
    with _autocast(settings.precision, draws.device):
        if not settings.reuse_sample:
            with torch.no_grad():
                sample = unwrapped(players.generator)(draws.normal(place + 2), c)
        t, eps = draws.t(place, settings.law_of_t), draws.normal(place + 1)
        loss = denoising_loss(players.score_network, schedule, sample, t, eps, c, settings.score_space).mean()
    players.score_optimizer.zero_grad()
    loss.backward()
    norm = _clipped(players.score_network, settings.score_max_grad_norm, draws.step, "score network")
    players.score_optimizer.step()
    return {"loss/score_network": loss.item(), "gradient_norm/score_network": norm}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model. In fp32: a bf16 average at 0.9999 stands still."""
    torch._foreach_lerp_(list(ema.parameters()), [p.float() for p in model.parameters()], 1 - decay)


def _clipped(player: nn.Module, max_norm: float, step: int, name: str) -> float:
    """Clip and return the norm from before. Gradients are already averaged over the workers: all of them raise, or none."""
    norm = nn.utils.clip_grad_norm_(player.parameters(), max_norm).item()
    if not math.isfinite(norm):
        raise NonFinite(f"step {step}: the {name}'s gradient is not finite ({norm}); its weights are unchanged")
    return norm


def _mean_norm(gradient: Tensor) -> float:
    """Mean over the batch of the per-sample norms; so the workers' mean is the global batch's."""
    return gradient.flatten(1).norm(dim=1).mean().item()


def _autocast(precision: str, device: torch.device) -> AbstractContextManager:
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()
