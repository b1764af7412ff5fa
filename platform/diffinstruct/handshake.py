"""The handshake: what a reward has to show before anything is trained on it, or judged by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from diffinstruct.rewards import RewardModel


@dataclass(frozen=True)
class Report:
    """What was seen of a reward. `faults`, a line each, none for one that can be trusted."""

    name: str
    faults: tuple[str, ...]


def handshake(name: str, reward: RewardModel, images: Tensor, prompts: Sequence[str], trained: bool) -> Report:
    """Put `reward` to the test on images [B, 3, H, W] in [0, 1] and their prompts. trained: whether it needs a gradient."""
    raise NotImplementedError


def refuse(reports: Sequence[Report]) -> None:
    """Raises RewardError with every fault of every report, a line each."""
    raise NotImplementedError
