"""A reward actor: decoder and rewards in a process of their own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from diffinstruct.cluster.attach import stand_in
from diffinstruct.config.experiment import Experiment
from diffinstruct.method.precision import use_deterministic_kernels, use_precision
from diffinstruct.method.rewards import LatentRewards, RewardRequest
from diffinstruct.reward_service.reward_validation import Report

LOADING = "loading"  # what an actor says while it loads its models, which is no work on anybody's request


class ActorReply(NamedTuple):
    """To the call with the id `request`. rewards: their names, in order. content: what was asked for, arrays for tensors."""

    request: str
    rewards: tuple[str, ...]
    content: Any


class RewardActor:
    """One replica: the rewards of `names` behind a decoder of their own. Models load when first needed, so what is
    wrong with them reaches the caller as it is."""

    def __init__(self, experiment: Experiment, names: tuple[str, ...], folder: str) -> None:
        stand_in(folder)
        torch.set_num_threads(max(1, int(experiment.cluster.rewards.cpus)))
        torch.backends.cudnn.deterministic = True  # asked again, it answers with the same bits
        use_precision(experiment.precision)
        if experiment.deterministic:
            use_deterministic_kernels()
        self.experiment, self.names = experiment, names
        self.device = torch.device("cuda" if experiment.cluster.rewards.gpus else "cpu")
        self.task: tuple[str, float] | None = None  # request, since when
        self.reports: dict[tuple[frozenset[str], frozenset[str]], list[Report]] = {}  # by what is trained on

    @cached_property
    def rewards(self) -> LatentRewards:
        from diffinstruct.method.precision import frozen_dtype
        from diffinstruct.models.pipeline import load_reference
        from diffinstruct.reward_service.client import make_rewards

        with self.at_work(LOADING):
            decode = load_reference(
                self.experiment.reference.model,
                device=self.device,
                activation_checkpointing=self.experiment.activation_checkpointing,
                decoder_dtype=frozen_dtype(self.experiment.precision),
            ).decode
            return make_rewards(self.names, decode, self.device)

    def load(self, request: str) -> ActorReply:
        return ActorReply(request, tuple(self.rewards.models), None)

    def score(self, request: str, latents: np.ndarray, prompts: Sequence[str], reward_request: RewardRequest) -> ActorReply:
        rewards = self.rewards
        with self.at_work(request):
            # What Ray hands over is read-only memory that it shares with others.
            answer = rewards(torch.tensor(latents, device=self.device), prompts, reward_request)
            scores = {name: score.cpu().numpy() for name, score in answer.scores.items()}
            content = (scores, answer.gradient.cpu().numpy(), answer.seconds, answer.micro_batch)
        return ActorReply(request, tuple(scores), content)

    def validate(
        self,
        request: str,
        latents: np.ndarray,
        prompts: Sequence[str],
        trained: frozenset[str],
        known: frozenset[str] = frozenset(),
    ) -> ActorReply:
        """The rewards' validation reports, made once: all trials of a sweep share this actor."""
        from diffinstruct.reward_service.client import LocalRewards

        rewards = self.rewards
        with self.at_work(request):
            if (trained, known) not in self.reports:
                asked = torch.tensor(latents, device=self.device)
                self.reports[trained, known] = LocalRewards(rewards).validate(asked, prompts, trained, known)
            reports = self.reports[trained, known]
        return ActorReply(request, tuple(report.name for report in reports), reports)

    @ray.method(concurrency_group="watch")  # a thread of its own, which answers while the other one works
    def doing(self) -> tuple[str | None, float]:
        """The request at work, and for how many seconds it has been."""
        task = self.task
        return (task[0], time.monotonic() - task[1]) if task else (None, 0.0)

    @contextmanager
    def at_work(self, request: str) -> Iterator[None]:
        self.task = (request, time.monotonic())
        try:
            yield
        finally:
            self.task = None
