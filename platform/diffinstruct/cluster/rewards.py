"""Reward actors: the decoder and the reward models in processes of their own, asked as if they were in ours.

Latents go there, scores and the gradient at the latents come back, as numpy arrays (several times quicker through Ray than
torch tensors). The actors are created by the driver, outside of any trial, and die with its job; every training worker gets
a handle. An actor that dies is restarted by Ray and asked again: scoring is a pure function, so asking twice is harmless.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import ray
import torch
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from torch import Tensor

from diffinstruct.experiment import Experiment
from diffinstruct.rewards import Collect, LatentRewards, RewardError, Scores

Answer = tuple[dict[str, np.ndarray], np.ndarray, float]
"""`Scores`, its tensors as arrays."""


def stand_in(folder: str) -> None:
    """Make relative paths mean what they meant to the driver; on a machine that has no such folder they mean nothing."""
    with suppress(FileNotFoundError):
        os.chdir(folder)


class RewardActor:
    """One replica. Its models load when first needed, so what is wrong with them reaches the caller as it is."""

    def __init__(self, experiment: Experiment, folder: str) -> None:
        stand_in(folder)
        torch.set_num_threads(max(1, int(experiment.cluster.reward_cpus)))
        self.experiment = experiment
        self.device = torch.device("cuda" if experiment.cluster.reward_gpus else "cpu")

    @cached_property
    def rewards(self) -> LatentRewards:
        from diffinstruct.pretrained import load_reference  # seconds of import that whoever asks an actor need not spend
        from diffinstruct.run import make_rewards

        decode = load_reference(self.experiment.reference.model, device=self.device).decode
        return make_rewards(self.experiment, decode, self.device)

    def micro_batch(self) -> int:
        return self.rewards.micro_batch

    def score(self, latents: np.ndarray, prompts: Sequence[str]) -> Answer:
        # What Ray hands over is read-only memory that it shares with others.
        answer = self.rewards(torch.tensor(latents, device=self.device), prompts)
        scores = {name: score.cpu().numpy() for name, score in answer.scores.items()}
        return scores, answer.gradient.cpu().numpy(), answer.seconds


@dataclass(frozen=True)
class RewardPool:
    """The replicas, and how to ask them. Picklable: workers and trials share one pool.

    replicas: handles; a batch is dealt out to them in whole micro-batches, so that its rows meet the same neighbours as in
        one process.
    deadline: seconds an answer may take before its actor is killed, restarted and asked again, once.
    first: the replica that gets the first rows; workers with different ones do not all queue for the same.
    """

    replicas: tuple[ActorHandle, ...]
    micro_batch: int
    deadline: float
    first: int = 0

    def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        """Deal latents [B, ...] and prompts out; the `Send` of the step. Collecting raises RewardError."""
        array = latents.detach().cpu().numpy()
        batches = -(-len(array) // self.micro_batch)
        share = -(-batches // len(self.replicas)) * self.micro_batch
        asked = []
        for i, start in enumerate(range(0, len(array), share)):
            which = (self.first + i) % len(self.replicas)
            rows = slice(start, start + share)
            asked.append((which, len(array[rows]), self.replicas[which].score.remote(array[rows], prompts[rows])))

        def collect() -> Scores:
            answers = [self._answer(*question) for question in asked]
            scores = {name: torch.tensor(np.concatenate([a[0][name] for a in answers])) for name in answers[0][0]}
            return Scores(scores, torch.tensor(np.concatenate([a[1] for a in answers])), max(a[2] for a in answers))

        return collect

    def _answer(self, which: int, rows: int, reference: Any) -> Answer:
        replica = self.replicas[which]
        for _ in range(2):
            try:
                return ray.get(reference, timeout=self.deadline)
            except RayTaskError as error:
                raise error.cause from error  # the reward's own words
            except RayActorError as error:
                raise RewardError(f"reward actor {which} is dead, asked to score {rows} samples: {error}") from error
            except GetTimeoutError:
                # A restarted actor gets its unanswered calls again (max_task_retries), this one included.
                ray.kill(replica, no_restart=False)
        raise RewardError(f"reward actor {which} was silent for {self.deadline:g} s twice, asked to score {rows} samples")


@contextmanager
def reward_pool(experiment: Experiment) -> Iterator[RewardPool]:
    """The reward actors of `experiment`, loaded and ready, until the end of the block.

    To be called in the driver: an actor created inside a trial would be put into the trial's placement group.
    """
    asked = experiment.cluster
    immortal = {"max_restarts": -1, "max_task_retries": -1}
    actor = ray.remote(RewardActor).options(num_cpus=asked.reward_cpus, num_gpus=asked.reward_gpus, **immortal)
    replicas = tuple(actor.remote(experiment, os.getcwd()) for _ in range(asked.reward_replicas))
    try:
        try:
            micro_batches = ray.get([replica.micro_batch.remote() for replica in replicas])
        except RayTaskError as error:
            raise error.cause from error
        yield RewardPool(replicas, micro_batches[0], asked.reward_deadline_s)
    finally:
        for replica in replicas:
            ray.kill(replica)
