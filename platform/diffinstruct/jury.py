"""The rewards of a run and how it asks them: in this process or in actors, at one interface.

`cluster/rewards.py` has the actors; this file knows no Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch
from torch import Tensor

from diffinstruct.experiment import Experiment
from diffinstruct.handshake import Report, handshake
from diffinstruct.pretrained import load_reward
from diffinstruct.rewards import Collect, LatentRewards, Terms


class RewardService(Protocol):
    """Whoever answers for the rewards."""

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: Terms) -> Collect:
        """Latents [B, ...], detached, and their prompts; collecting raises RewardError."""

    def meet(self, latents: Tensor, prompts: Sequence[str], trained: Collection[str]) -> list[Report]:
        """The handshake with every reward on the pictures of `latents`; those in `trained` need a gradient."""


class InProcess:
    """The rewards in this process: the answer is there when `ask` returns."""

    def __init__(self, rewards: LatentRewards) -> None:
        self.rewards = rewards

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: Terms) -> Collect:
        answer = self.rewards(latents, prompts, terms)
        return lambda: answer

    def meet(self, latents: Tensor, prompts: Sequence[str], trained: Collection[str]) -> list[Report]:
        with torch.no_grad():
            images = self.rewards.decode(latents)
        return [handshake(name, reward, images, prompts, name in trained) for name, reward in self.rewards.models.items()]


def make_rewards(
    names: Sequence[str], decode: Callable[[Tensor], Tensor], device: torch.device | str
) -> LatentRewards:
    """The rewards of these names, frozen, on one device, behind one decoder."""
    return LatentRewards(decode, {name: load_reward(name, device) for name in names})


def terms_of(experiment: Experiment) -> Terms:
    """What the configuration asks for."""
    return Terms({reward.name: reward.weight for reward in experiment.rewards.trained}, experiment.rewards.micro_batch)
