"""One alternating round of Diff-Instruct* (arXiv 2410.20898): torch only, knows neither Ray nor MLflow.

A round is the score network's K_TA updates and the generator's one. A run's *step* is the number of rounds that are done:
configuration, journal and checkpoints count in steps.

Every loss reaches the generator as a gradient at its sample x0. The regulariser and the rewards are computed on detached
leaves, wherever that is cheapest, and the generator's graph is walked once:

    x0 = g_theta(z, c)  --detached-->  rewards (elsewhere, meanwhile)
    K_TA times:  score network learns to denoise x0
    x0.backward((regularization_weight * g_reg - reward_scale * g_reward) / batch),  clip, Adam, EMA

Nothing that is not finite reaches a weight. Where one worker finds such a value in its sample, a loss or a reward, it
makes its gradient NaN. Gradients are averaged over the workers, so all of them see it, leave the update out and raise
NonFiniteGradient at the same place.

What does not fit memory at once goes through the networks in micro-batches. Then x0 is drawn without a graph, and the
generator goes forward once more for each micro-batch's backward pass.
"""

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

from diffinstruct.method.diffusion import Conditions, GuidedReference, Schedule, TimestepDistribution, denoising_loss
from diffinstruct.method.memory import to_device
from diffinstruct.method.noise import SCORE_STREAMS, NoiseStreams, Stream
from diffinstruct.method.nonfinite import FiniteCheck, NonFiniteGradient
from diffinstruct.method.objectives import Objective
from diffinstruct.method.precision import autocast
from diffinstruct.method.rewards import Collect, NonFiniteScore, Scores, Send

Metrics = dict[str, float]
DeviceMetrics = dict[str, Tensor | float]
"""Means that may still be on the device: to read one is to wait for it, so a round reads them once, at its end."""

TIMESTEP_PARTS = ("t_lowest", "t_low", "t_high", "t_highest")  # the schedule in four equal parts
X0_GAP_BY_TIMESTEP, TIMESTEP_SHARE = "x0_gap_by_t/", "timestep_share/"


@dataclass(frozen=True)
class StepConfig:
    """The settings of a round. Without an `objective` the rewards alone train, and they train the generator alone."""

    objective: Objective | None
    regularization_weight: float
    reward_scale: float
    score_updates: int  # the paper's K_TA
    reuse_sample: bool  # the score network learns on the generator's own sample instead of drawing fresh ones
    score_weighting: str  # lambda(t) of the score network's loss
    timestep_distribution: TimestepDistribution  # of the generator's loss and the score network's
    generator_max_grad_norm: float
    score_max_grad_norm: float
    ema_decay: float
    precision: str  # "fp32" | "bf16": autocast of the networks' forwards; weights and optimizers stay fp32
    micro_batch_size: int | None  # so many samples go through the networks at once; None: all of this worker's

    @property
    def normal_streams(self) -> list[int]:
        """The streams of normal noise that a round draws from."""
        if not self.objective:
            return [Stream.GENERATOR_Z]
        scores = (Stream.SCORE_EPS,) if self.reuse_sample else (Stream.SCORE_EPS, Stream.SCORE_Z)
        of_updates = [stream + SCORE_STREAMS * k for k in range(self.score_updates) for stream in scores]
        return [Stream.GENERATOR_Z, Stream.REGULARIZER_EPS, *of_updates]

    def micro_batches(self, samples: int) -> list[slice]:
        """The rows of the micro-batches that `samples` are cut into."""
        size = self.micro_batch_size or samples
        return [slice(i, i + size) for i in range(0, samples, size)]


@dataclass
class TrainState:
    """The method's networks and their optimizers. The trained ones may be wrapped for data parallelism. Where the rewards
    alone train, there is neither score network nor reference."""

    generator: nn.Module  # (z [B, ...], c) -> x0 [B, ...]
    ema: nn.Module  # exponential moving average of the generator's weights, fp32
    generator_optimizer: torch.optim.Optimizer
    score_network: nn.Module | None = None  # a Denoiser, trained on generated samples only
    score_optimizer: torch.optim.Optimizer | None = None
    reference: GuidedReference | None = None  # frozen

    def state_dict(self) -> dict[str, Any]:
        """All that a round changes; everything random is drawn from (seed, step), so there is no RNG state to keep."""
        return {name: part.state_dict() for name, part in self._stateful().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    def _stateful(self) -> dict[str, Any]:
        generator = {"generator": unwrapped(self.generator), "ema": self.ema, "generator_optimizer": self.generator_optimizer}
        if self.score_network is None:
            return generator
        return generator | {"score_network": unwrapped(self.score_network), "score_optimizer": self.score_optimizer}


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
    send: Send | None,
) -> Metrics:
    """The score network's K_TA updates, then the generator's one. Returns this worker's means. Without `send` no reward
    has a part in it.

    Raises NonFiniteGradient before an update that would spoil the weights; RewardError.
    """
    metrics: DeviceMetrics = {}
    finite = FiniteCheck(prompts)
    for key, value in c.items():
        finite.check(f"prompt embeddings ({key})", value)
    this = Round(train_state, config, schedule, noise, c, finite)
    z = noise.normal(Stream.GENERATOR_Z)
    batches = config.micro_batches(len(z))
    with torch.set_grad_enabled(len(batches) == 1):
        x0 = torch.cat([this.generate(z, rows) for rows in batches])
    sample = x0.detach()
    sending = time.perf_counter()
    finite.check("the generator's sample", sample)
    # A non-finite sample is not sent: a reward might score it as finite
    collect = send(sample, prompts) if send and finite.all_finite else None
    # The seconds in which the round waits for rewards; those in this process have their answer now
    exposed = time.perf_counter() - sending

    regularizer_grad = torch.zeros_like(sample)
    if config.objective:
        for k in range(config.score_updates):
            metrics |= this.update_score_network(sample, k)
        regularizer_grad, means = this.regularizer_gradient(sample, config.objective)
        metrics |= means
    reward_grad, means = this.reward_gradient(sample, collect)
    metrics |= means
    metrics["time/reward_exposed"] += exposed
    metrics["gradient_norm/sample_regularizer"] = _mean_norm(regularizer_grad)
    metrics["gradient_norm/sample_reward"] = _mean_norm(reward_grad)

    gradient = (regularizer_grad - reward_grad) / len(sample) * finite.gradient_factor
    metrics["gradient_norm/generator"] = this.update_generator(z, x0, gradient)
    return _read(metrics)


@dataclass(frozen=True)
class Round:
    """The parts of one alternating round, with what all of them work on. Samples are [B, ...], of this worker."""

    train_state: TrainState
    config: StepConfig
    schedule: Schedule
    noise: NoiseStreams
    c: Conditions
    finite: FiniteCheck

    def generate(self, z: Tensor, rows: slice) -> Tensor:
        """The generator's samples of these rows of z, with a graph where gradients are on."""
        with autocast(self.config.precision, self.noise.device):
            x0: Tensor = self.train_state.generator(z[rows], _rows(self.c, rows))
        return x0

    def update_score_network(self, sample: Tensor, k: int) -> DeviceMetrics:
        """Denoising update number k of the score network on generated samples, with t and eps of its own."""
        config, noise = self.config, self.noise
        network, optimizer = self.train_state.score_network, self.train_state.score_optimizer
        assert network is not None and optimizer is not None
        first = SCORE_STREAMS * k
        t, eps = noise.t(Stream.SCORE_T + first, config.timestep_distribution), noise.normal(Stream.SCORE_EPS + first)
        z = None if config.reuse_sample else noise.normal(Stream.SCORE_Z + first)
        *early, last = config.micro_batches(len(sample))

        def backward(rows: slice) -> Tensor:
            c = _rows(self.c, rows)
            with autocast(config.precision, noise.device):
                x0 = sample[rows]
                if z is not None:
                    with torch.no_grad():
                        x0 = unwrapped(self.train_state.generator)(z[rows], c)
                losses = denoising_loss(network, self.schedule, x0, t[rows], eps[rows], c, config.score_weighting)
                self.finite.check("the score network's loss", losses, rows)
                loss = losses.mean() * (len(losses) / len(sample)) * self.finite.gradient_factor
            loss.backward()
            return loss.detach().double()

        optimizer.zero_grad()
        loss = sample.new_zeros((), dtype=torch.float64)
        for rows in early:
            with _accumulating(network):
                loss += backward(rows)
        loss += backward(last)
        norm = self._clipped(network, config.score_max_grad_norm, "score network")
        optimizer.step()
        return {"loss/score_network": loss, "gradient_norm/score_network": norm}

    def regularizer_gradient(self, sample: Tensor, objective: Objective) -> tuple[Tensor, DeviceMetrics]:
        """regularization_weight times the objective's gradient at the sample, and the means of its record."""
        config, noise = self.config, self.noise
        assert self.train_state.score_network is not None and self.train_state.reference is not None
        score_network, reference = unwrapped(self.train_state.score_network), self.train_state.reference
        t, eps = noise.t(Stream.REGULARIZER_T, config.timestep_distribution), noise.normal(Stream.REGULARIZER_EPS)
        gradients, records = [], []
        for rows in config.micro_batches(len(sample)):
            leaf = sample[rows].clone().requires_grad_()
            with autocast(config.precision, noise.device):
                inputs = (leaf, t[rows], eps[rows], _rows(self.c, rows))
                loss, record = objective(*inputs, score_network=score_network, reference=reference)
            gradients.append(config.regularization_weight * torch.autograd.grad(loss.sum(), leaf)[0])
            records.append({"loss/regularizer": loss.detach()} | record)
        gradient, per_sample = torch.cat(gradients), {key: torch.cat([r[key] for r in records]) for key in records[0]}
        for key, values in per_sample.items():
            self.finite.check(key, values)
        self.finite.check("the regularizer's gradient", gradient)
        means: DeviceMetrics = {key: values.mean() for key, values in per_sample.items()}
        if "x0_gap" in per_sample:  # an objective of the user's own may record none
            means |= _by_timestep(per_sample["x0_gap"], t, len(self.schedule.alphas))
        return gradient, means

    def reward_gradient(self, sample: Tensor, collect: Collect | None) -> tuple[Tensor, DeviceMetrics]:
        """reward_scale times the rewards' gradient at the sample, and the rewards' means. Without `collect`, or where a
        reward is not finite, the gradient is 0."""
        waiting = time.perf_counter()
        scores: Scores | None = None
        try:
            scores = collect() if collect else None
        except NonFiniteScore as error:
            self.finite.record(str(error))
        metrics: DeviceMetrics = {"time/reward_exposed": time.perf_counter() - waiting}
        gradient = torch.zeros_like(sample)
        if scores:
            metrics["time/reward"] = scores.seconds
            gradient = self.config.reward_scale * to_device(scores.gradient, sample.device).to(sample)
            metrics |= {f"reward/{name}": score.mean() for name, score in scores.scores.items()}
        self.finite.check("reward_scale times the rewards' gradient", gradient)
        return gradient, metrics

    def update_generator(self, z: Tensor, x0: Tensor, gradient: Tensor) -> float:
        """One update of the generator and its EMA with a gradient at its sample; returns the weights' gradient norm.

        x0 has a graph where the batch is one micro-batch; else each of them is drawn once more, with one.
        """
        config, step, generator = self.config, self.noise.step, self.train_state.generator
        *early, last = config.micro_batches(len(x0))
        self.train_state.generator_optimizer.zero_grad()
        for rows in early:
            with _accumulating(generator):
                self.generate(z, rows).backward(gradient[rows])
        (self.generate(z, last) if early else x0).backward(gradient[last])
        norm = self._clipped(generator, config.generator_max_grad_norm, "generator")
        self.train_state.generator_optimizer.step()
        update_ema(self.train_state.ema, unwrapped(generator), ema_decay_at(step, config.ema_decay))
        return norm

    def _clipped(self, network: nn.Module, max_norm: float, name: str) -> float:
        """Clip the gradients; returns their norm from before. They are the workers' means: all raise, or none."""
        total = nn.utils.clip_grad_norm_(network.parameters(), max_norm)
        norm = (total.full_tensor() if isinstance(total, DTensor) else total).item()
        if not math.isfinite(norm):
            raise NonFiniteGradient(self.noise.step, name, self.finite.first)
        return norm


def ema_decay_at(step: int, most: float) -> float:
    """The EMA's decay warms up from 1/10 to `most`."""
    return min(most, (1 + step) / (10 + step))


@torch.no_grad()
def update_ema(ema: nn.Module, model: nn.Module, decay: float) -> None:
    """ema <- decay ema + (1 - decay) model. It is fp32: in bf16 one at 0.9999 stands still."""
    weights: list[Tensor] = list(ema.parameters())
    torch._foreach_lerp_(weights, [p.to(e.dtype) for e, p in zip(weights, model.parameters(), strict=True)], 1 - decay)


def _read(metrics: DeviceMetrics) -> Metrics:
    """The numbers; those that are on another device come in one copy."""
    tensors = {key: value.double() for key, value in metrics.items() if isinstance(value, Tensor)}
    away = [key for key, value in tensors.items() if value.device.type != "cpu"]
    if away:
        tensors |= zip(away, torch.stack([tensors[key] for key in away]).cpu(), strict=True)
    return {key: tensors[key].item() if key in tensors else float(value) for key, value in metrics.items()}


def _by_timestep(x0_gap: Tensor, t: Tensor, timesteps: int) -> DeviceMetrics:
    """The x0 gaps [B] of each part of the schedule, summed, and how many there are; both over B, so that their ratio may
    be taken after means over ranks and rounds."""
    part = t * len(TIMESTEP_PARTS) // timesteps
    inside = {name: (part == i).to(x0_gap) for i, name in enumerate(TIMESTEP_PARTS)}
    shares: DeviceMetrics = {f"{TIMESTEP_SHARE}{name}": mask.mean() for name, mask in inside.items()}
    return shares | {f"{X0_GAP_BY_TIMESTEP}{name}": (mask * x0_gap).mean() for name, mask in inside.items()}


def _mean_norm(gradient: Tensor) -> Tensor:
    """The mean over the batch of the per-sample norms; so the workers' mean is the global batch's."""
    return gradient.flatten(1).norm(dim=1).mean()


def _rows(c: Conditions, rows: slice) -> Conditions:
    return {key: value[rows] for key, value in c.items()}


def _accumulating(network: nn.Module) -> AbstractContextManager:
    """A backward pass whose gradients are averaged over the workers only after the last micro-batch's. Sharded ones are
    reduced at once: to wait, each worker would hold the whole gradient."""
    return network.no_sync() if isinstance(network, DistributedDataParallel) else nullcontext()
