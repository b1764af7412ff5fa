"""Rewards at the latents: decode, score, and the gradient of the score with respect to the latents.

The contract of a reward model: images [B, 3, H, W] float in [0, 1] and prompts list[str] -> scores [B], higher is better.
`LatentRewards` is that, moved to where the generator's samples live. It runs in the trainer's process or in a reward actor;
both speak through `Send`, so the step cannot tell which.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

RewardModel = Callable[[Tensor, Sequence[str]], Tensor]


class RewardError(RuntimeError):
    """A reward that cannot be trusted: wrong shape, not finite, dead, late. It never becomes a score."""


@dataclass(frozen=True)
class Scores:
    """`scores`: each reward's own [B]. `gradient`, like the latents: d(sum_b sum_i weight_i r_i) / d latents over the trained
    rewards, so row b is sample b's own gradient whatever the batch. `seconds`: what computing it took."""

    scores: dict[str, Tensor]
    gradient: Tensor
    seconds: float


Collect = Callable[[], Scores]
Send = Callable[[Tensor, Sequence[str]], Collect]
"""(detached latents [B, ...], prompts) -> a function that waits for the Scores."""


class LatentRewards:
    """Decoder and rewards in one process. A pure function of latents and prompts: asking twice is harmless.

    Args:
        decode: latents [B, ...] -> images [B, 3, H, W] in [0, 1], differentiable.
        trained: name -> (reward, weight); their weighted sum is what `gradient` climbs.
        held_out: name -> reward, scored without gradient; may be a black box.
        micro_batch: rows that go through decoder and rewards at once. Rows in batches of another size differ in the last
            bits, so a fixed value makes answers reproducible, and memory bounded.
    """

    def __init__(
        self,
        decode: Callable[[Tensor], Tensor],
        trained: Mapping[str, tuple[RewardModel, float]],
        held_out: Mapping[str, RewardModel],
        micro_batch: int = 16,
    ) -> None:
        self.decode, self.trained, self.held_out, self.micro_batch = decode, trained, held_out, micro_batch

    def __call__(self, latents: Tensor, prompts: Sequence[str]) -> Scores:
        if not self.trained and not self.held_out:  # reward scale 0 and nobody watching: no reason to decode
            return Scores({}, torch.zeros_like(latents), 0.0)
        started = time.perf_counter()
        rows = range(0, len(latents), self.micro_batch)
        parts = [self._score(latents[i : i + self.micro_batch], prompts[i : i + self.micro_batch]) for i in rows]
        scores = {name: torch.cat([p[0][name] for p in parts]) for name in [*self.trained, *self.held_out]}
        return Scores(scores, torch.cat([p[1] for p in parts]), time.perf_counter() - started)

    def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        answer = self(latents, prompts)
        return lambda: answer

    def _score(self, latents: Tensor, prompts: Sequence[str]) -> tuple[dict[str, Tensor], Tensor]:
        leaf = latents.detach().requires_grad_()
        scores: dict[str, Tensor] = {}
        total = leaf.new_zeros(())
        with torch.enable_grad():
            images = self.decode(leaf)
            for name, (reward, weight) in self.trained.items():
                score = scored(name, reward, images, prompts)
                if not score.requires_grad:
                    raise RewardError(f"reward {name}: its scores carry no gradient to the images, so it can only be held out")
                total = total + weight * score.float().sum()
                scores[name] = score.detach()
            gradient = torch.autograd.grad(total, leaf)[0] if self.trained else torch.zeros_like(leaf)
        if not math.isfinite(gradient.abs().sum().item()):
            raise RewardError(f"the gradient of {' + '.join(self.trained)} at the latents is not finite")
        with torch.no_grad():
            for name, judge in self.held_out.items():
                scores[name] = scored(name, judge, images.detach(), prompts)
        return scores, gradient


def scored(name: str, reward: RewardModel, images: Tensor, prompts: Sequence[str]) -> Tensor:
    """The reward's scores [B], finite. It gets images of its own: what it writes into them no other reward sees. One that errs
    is refused by name and never becomes a 0."""
    batch = len(prompts)
    try:
        score = reward(images.clone(), prompts)
    except Exception as error:
        raise RewardError(f"reward {name}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    if not isinstance(score, Tensor):
        raise RewardError(f"reward {name}: returned a {type(score).__name__}, expected a tensor [{batch}]")
    if score.shape != (batch,):
        raise RewardError(f"reward {name}: {batch} images got scores of shape {list(score.shape)}, expected [{batch}]")
    if not torch.isfinite(score).all():
        raise RewardError(f"reward {name}: {int((~torch.isfinite(score)).sum())} of {batch} scores are not finite")
    return score
