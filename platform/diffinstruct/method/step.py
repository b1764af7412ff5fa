"""One alternating round of Diff-Instruct* (arXiv 2410.20898): torch only, knows neither Ray nor MLflow.

Everything that wants something of the generator says so as a gradient at its sample x0. The regulariser and the rewards
are computed on detached leaves, wherever that is cheapest, and the generator's graph is walked once:

    x0 = g_theta(z, c)  --detached-->  rewards (elsewhere, meanwhile)
    K_TA times:  score network learns to denoise x0
    x0.backward((regularization_weight * g_reg - reward_scale * g_reward) / batch),  clip, Adam, EMA

Nothing that is not finite reaches a weight. What one worker finds, be it in its sample, a loss or a reward, makes its
gradient NaN; gradients are averaged over the workers, so all of them see it, leave the update out and raise NonFinite
at the same place.

What does not fit memory at once goes through the networks in micro-batches. Then there is no graph to keep: x0 is drawn
without one, and the generator goes forward once more for each micro-batch's backward pass.
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
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from diffinstruct.method.diffusion import Conditions, GuidedReference, LawOfT, Schedule, denoising_loss
from diffinstruct.method.noise import NoiseStreams
from diffinstruct.method.nonfinite import FiniteCheck, NonFinite
from diffinstruct.method.objectives import Objective
from diffinstruct.method.precision import autocast
from diffinstruct.method.rewards import NotFinite, Scores, Send

Metrics = dict[str, float]


@dataclass(frozen=True)
class StepConfig:
    """What a round needs to know. `objective` None trains on the rewards alone; then no score network is trained."""

    objective: Objective | None
    regularization_weight: float
    reward_scale: float
    score_updates: int  # the paper's K_TA
    reuse_sample: bool  # the score network learns on the generator's own sample instead of drawing fresh ones
    score_weighting: str  # whose squared error the score network learns from: lambda(t)
    law_of_t: LawOfT  # of both players
    generator_max_grad_norm: float
    score_max_grad_norm: float
    ema_decay: float
    precision: str  # "fp32" | "bf16": autocast of the networks' forwards; weights and optimizers stay fp32
    micro_batch_size: int | None  # of this worker's samples go through the networks at once; None: all

    def parts(self, samples: int) -> list[slice]:
        """The micro-batches of so many samples."""
        size = self.micro_batch_size or samples
        return [slice(i, i + size) for i in range(0, samples, size)]


@dataclass
class TrainState:
    """The roles of the method and their optimizers. `generator` and `score_network` may be wrapped for data
    parallelism."""

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


def alternating_round(
    train_state: TrainState,
    config: StepConfig,
    schedule: Schedule,
    noise: NoiseStreams,
    prompts: Sequence[str],
    c: Conditions,
    send: Send,
) -> Metrics:
    """The score network's K_TA updates, then the generator's one. Returns this worker's means.

    Raises NonFinite before an update that would spoil the weights; RewardError.
    """
    metrics: Metrics = {}
    finite = FiniteCheck(prompts)
    for key, value in c.items():
        finite.check(f"prompt embeddings ({key})", value)
    z = noise.normal(noise.GENERATOR)
    *early, last = parts = config.parts(len(z))

    def generated(part: slice) -> Tensor:
        with autocast(config.precision, noise.device):
            sample: Tensor = train_state.generator(z[part], _rows(c, part))
        return sample

    with torch.set_grad_enabled(not early):
        x0 = torch.cat([generated(part) for part in parts])
    sample = x0.detach()
    sending = time.perf_counter()
    # A reward may well give such pictures a finite score
    collect = send(sample, prompts) if finite.check("the generator's sample", sample) else None
    exposed = time.perf_counter() - sending  # rewards in this process have their answer now

    if config.objective:
        for k in range(config.score_updates):
            metrics |= score_update(train_state, config, schedule, noise, sample, c, noise.SCORE + 3 * k, finite)
        regularizer_grad, record = _regularizer(train_state, config, config.objective, noise, sample, c)
        for key, values in record.items():
            finite.check(key, values)
        finite.check("the regularizer's gradient", regularizer_grad)
        metrics |= {key: values.mean().item() for key, values in record.items()}
    else:
        regularizer_grad = torch.zeros_like(sample)

    waiting = time.perf_counter()
    answer: Scores | None = None
    try:
        answer = collect() if collect else None
    except NotFinite as error:
        finite.record(str(error))
    metrics["time/reward_exposed"] = exposed + time.perf_counter() - waiting
    reward_grad = torch.zeros_like(sample)
    if answer:
        metrics["time/reward"] = answer.seconds
        reward_grad = config.reward_scale * answer.gradient.to(sample)
        metrics |= {f"reward/{name}": score.mean().item() for name, score in answer.scores.items()}
    finite.check("reward_scale times the rewards' gradient", reward_grad)

    train_state.generator_optimizer.zero_grad()
    gradient = (regularizer_grad - reward_grad) / len(sample) * finite.factor
    for part in early:
        with _accumulating(train_state.generator):
            generated(part).backward(gradient[part])
    (generated(last) if early else x0).backward(gradient[last])
    metrics |= {
        "gradient_norm/sample_regularizer": _mean_norm(regularizer_grad),
        "gradient_norm/sample_reward": _mean_norm(reward_grad),
        "gradient_norm/generator": _clipped(
            train_state.generator, config.generator_max_grad_norm, noise.step, "generator", finite
        ),
    }
    train_state.generator_optimizer.step()
    update_ema(
        train_state.ema, unwrapped(train_state.generator), min(config.ema_decay, (1 + noise.step) / (10 + noise.step))
    )
    return metrics


def score_update(
    train_state: TrainState,
    config: StepConfig,
    schedule: Schedule,
    noise: NoiseStreams,
    sample: Tensor,
    c: Conditions,
    stream: int,
    finite: FiniteCheck,
) -> Metrics:
    """One denoising update of the score network on generated samples, with t and eps of its own."""
    t, eps = noise.t(stream, config.law_of_t), noise.normal(stream + 1)
    z = None if config.reuse_sample else noise.normal(stream + 2)
    *early, last = config.parts(len(sample))

    def backward(part: slice) -> float:
        own = _rows(c, part)
        with autocast(config.precision, noise.device):
            x0 = sample[part]
            if z is not None:
                with torch.no_grad():
                    x0 = unwrapped(train_state.generator)(z[part], own)
            each = denoising_loss(
                train_state.score_network, schedule, x0, t[part], eps[part], own, config.score_weighting
            )
            finite.check("the score network's loss", each, part)
            loss = each.mean() * (len(each) / len(sample)) * finite.factor
        loss.backward()
        return loss.item()

    train_state.score_optimizer.zero_grad()
    loss = 0.0
    for part in early:
        with _accumulating(train_state.score_network):
            loss += backward(part)
    loss += backward(last)
    norm = _clipped(train_state.score_network, config.score_max_grad_norm, noise.step, "score network", finite)
    train_state.score_optimizer.step()
    return {"loss/score_network": loss, "gradient_norm/score_network": norm}


def _regularizer(
    train_state: TrainState,
    config: StepConfig,
    objective: Objective,
    noise: NoiseStreams,
    sample: Tensor,
    c: Conditions,
) -> tuple[Tensor, dict[str, Tensor]]:
    """regularization_weight times the loss's gradient at the sample, and per sample what the objective has to tell."""
    t, eps = noise.t(noise.GENERATOR + 1, config.law_of_t), noise.normal(noise.GENERATOR + 2)
    pulls, records = [], []
    for part in config.parts(len(sample)):
        leaf = sample[part].clone().requires_grad_()
        with autocast(config.precision, noise.device):
            loss, record = objective(
                leaf,
                t[part],
                eps[part],
                _rows(c, part),
                score_network=unwrapped(train_state.score_network),
                reference=train_state.reference,
            )
        pulls.append(config.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0])
        records.append({"loss/regularizer": loss.detach()} | record)
    return torch.cat(pulls), {key: torch.cat([record[key] for record in records]) for key in records[0]}


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model. The average is fp32: in bf16 one at 0.9999 stands still."""
    average: list[Tensor] = list(ema.parameters())
    torch._foreach_lerp_(average, [p.to(a.dtype) for a, p in zip(average, model.parameters(), strict=True)], 1 - decay)


def _clipped(player: nn.Module, max_norm: float, step: int, name: str, finite: FiniteCheck) -> float:
    """Clip and return the norm from before. Gradients are already averaged over the workers: all of them raise, or
    none."""
    whole = nn.utils.clip_grad_norm_(player.parameters(), max_norm)
    norm = (whole.full_tensor() if isinstance(whole, DTensor) else whole).item()
    if not math.isfinite(norm):
        raise NonFinite(step, name, finite.first)
    return norm


def _mean_norm(gradient: Tensor) -> float:
    """Mean over the batch of the per-sample norms; so the workers' mean is the global batch's."""
    return gradient.flatten(1).norm(dim=1).mean().item()


def _rows(c: Conditions, part: slice) -> Conditions:
    return {key: value[part] for key, value in c.items()}


def _accumulating(player: nn.Module) -> AbstractContextManager:
    """A backward pass whose gradients wait for the last micro-batch's before they meet the other workers'. Sharded ones
    meet
    them at once: to wait, each worker would hold the whole gradient."""
    return player.no_sync() if isinstance(player, DistributedDataParallel) else nullcontext()
