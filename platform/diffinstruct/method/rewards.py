"""Rewards at the latents: decode, score, and the gradient of the score with respect to the latents.

The contract of a reward model: images [B, 3, H, W] float in [0, 1] and prompts list[str] -> scores [B], higher is
better. `LatentRewards` is that, moved to where the generator's samples live. It runs in the trainer's process or in a
reward actor; both are asked through `Send`, so the step cannot tell which.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffinstruct.method.memory import halving, out_of_memory
from diffinstruct.method.transient import ATTEMPTS, ask_until_answered

RewardModel = Callable[[Tensor, Sequence[str]], Tensor]


class RewardError(RuntimeError):
    """A reward that cannot be trusted: wrong shape, not finite, dead, late. It never becomes a score."""


class NonFiniteScore(RewardError):
    """Scores or a gradient with a NaN or an infinity in them: of these pictures, and maybe not of the next."""


@dataclass(frozen=True)
class RewardRequest:
    """What a caller wants of the rewards.

    weights: name -> weight in the sum whose gradient is wanted; other rewards are scored and no more. Without any no
        gradient is computed.
    micro_batch: rows that go through decoder and rewards at once. The caller fixes it, since another number changes the
        last bits.
    """

    weights: Mapping[str, float]
    micro_batch: int


@dataclass(frozen=True)
class Scores:
    """`scores`: each reward's own [B]. `gradient`, like the latents: d(sum_b sum_i weight_i r_i) / d latents, so row b
    is sample b's own. `seconds`: what it took. `micro_batch`: the rows that went at once, fewer where memory ended."""

    scores: dict[str, Tensor]
    gradient: Tensor
    seconds: float
    micro_batch: int


Collect = Callable[[], Scores]
Send = Callable[[Tensor, Sequence[str]], Collect]
"""(detached latents [B, ...], prompts) -> a function that waits for the Scores."""


class LatentRewards:
    """Decoder and rewards in one process. A pure function of latents, prompts and request: asking twice is harmless.

    A reward that has a `tower` and a `head` (see `reward_models`) is head(tower.features(images), prompts); rewards
    with one and the same tower share its features.

    Args:
        decode: latents [B, ...] -> images [B, 3, H, W] in [0, 1], differentiable.
        models: name -> reward. One whose scores carry no gradient can be scored, and not trained on.
    """

    def __init__(self, decode: Callable[[Tensor], Tensor], models: Mapping[str, RewardModel]) -> None:
        self.decode, self.models = decode, models

    def __call__(self, latents: Tensor, prompts: Sequence[str], request: RewardRequest) -> Scores:
        """Raises RewardError, with the reward's name."""
        if unknown := [name for name in request.weights if name not in self.models]:
            raise RewardError(f"reward {unknown[0]}: asked for, but there are {', '.join(self.models) or 'none'}")
        started = time.perf_counter()
        if not self.models:  # reward scale 0 and nobody watching: no reason to decode
            return Scores({}, torch.zeros_like(latents), 0.0, request.micro_batch)

        def parts_of(size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
            rows = [slice(i, i + size) for i in range(0, len(latents), size)]
            return [self._graded(latents[part], prompts[part], request.weights) for part in rows]

        try:
            parts, micro_batch = halving(parts_of, request.micro_batch, len(latents))
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise RewardError(f"rewards {', '.join(self.models)}: out of memory with one sample") from error
        scores = {name: torch.cat([p[0][name] for p in parts]) for name in self.models}
        gradient = torch.cat([p[1] for p in parts])
        _refuse_non_finite(scores, gradient, f"the gradient of {' + '.join(request.weights)} at the latents")
        return Scores(scores, gradient, time.perf_counter() - started, micro_batch)

    def _graded(
        self, latents: Tensor, prompts: Sequence[str], weights: Mapping[str, float]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """`_score`, done again where a reward's service fails in the backward pass."""
        if not weights:
            return self._score(latents, prompts, weights)
        title = f"the gradient of {' + '.join(weights)}"
        attempts = min(_attempts(self.models[name]) for name in weights)
        try:
            return ask_until_answered(title, attempts, lambda: self._score(latents, prompts, weights), final=RewardError)
        except RewardError:
            raise
        except Exception as error:
            if out_of_memory(error):
                raise
            raise RewardError(f"{title}: {_words(error)}") from error

    def _score(self, latents: Tensor, prompts: Sequence[str], weights: Mapping[str, float]) -> tuple[dict[str, Tensor], Tensor]:
        leaf = latents.detach().requires_grad_(bool(weights))
        scores: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}  # features of these images, by tower
        total = leaf.new_zeros(())
        with torch.set_grad_enabled(bool(weights)):
            images = self.decode(leaf)
            for name, weight in weights.items():
                score = _unchecked(name, self.models[name], images, prompts, seen)
                if not score.requires_grad:
                    raise RewardError(f"reward {name}: its scores carry no gradient to the images, so it can only be held out")
                total = total + weight * score.float().sum()
                scores[name] = score.detach()
            gradient = torch.autograd.grad(total, leaf)[0] if weights else torch.zeros_like(leaf)
        seen = {tower: features.detach() for tower, features in seen.items()}
        with torch.no_grad():
            for name in (name for name in self.models if name not in weights):
                scores[name] = _unchecked(name, self.models[name], images.detach(), prompts, seen)
        return scores, gradient


def scored(name: str, reward: RewardModel, images: Tensor, prompts: Sequence[str], seen: dict[int, Tensor]) -> Tensor:
    """The reward's scores [B], finite. It gets images of its own: what it writes into them no other reward sees. One
    that errs is refused by name and never becomes a 0.

    seen: features of the same images by their tower's id; those of this reward's tower are used, or added.
    """
    score = _unchecked(name, reward, images, prompts, seen)
    _refuse_non_finite({name: score})
    return score


def _unchecked(name: str, reward: RewardModel, images: Tensor, prompts: Sequence[str], seen: dict[int, Tensor]) -> Tensor:
    """`scored`, but for the look whether they are finite, which waits for a GPU."""
    batch = len(prompts)

    def ask() -> Tensor:
        tower = getattr(reward, "tower", None)
        if tower is None:
            return reward(images.clone(), prompts)
        if id(tower) not in seen:
            seen[id(tower)] = tower.features(images.clone())
        return reward.head(seen[id(tower)].clone(), prompts)  # type: ignore[attr-defined]

    try:
        score = ask_until_answered(f"reward {name}", _attempts(reward), ask)
    except (Exception, SystemExit) as error:  # a reward that ends the program must not end it as if all were well
        if out_of_memory(error):
            raise
        raise RewardError(f"reward {name}: {_words(error)}") from error
    if not isinstance(score, Tensor):
        raise RewardError(f"reward {name}: returned a {type(score).__name__}, expected a tensor [{batch}]")
    if score.shape != (batch,):
        raise RewardError(f"reward {name}: {batch} images got scores of shape {list(score.shape)}, expected [{batch}]")
    if score.is_meta:
        raise RewardError(f"reward {name}: its scores are on the meta device, they have no values")
    if not score.is_floating_point():
        raise RewardError(f"reward {name}: scores of {score.dtype}, expected floating point")
    return score


def _attempts(reward: RewardModel) -> int:
    """How often the reward is asked where its service fails for a while: what it says itself, as `attempts`."""
    return getattr(reward, "attempts", ATTEMPTS)


def _words(error: BaseException) -> str:
    """The error in one line, with how often was asked."""
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return f"{type(error).__name__}: {' '.join(str(error).split())}{notes}"


def _refuse_non_finite(scores: Mapping[str, Tensor], gradient: Tensor | None = None, title: str = "") -> None:
    """Raises NonFiniteScore. All are looked at once: each look waits for a GPU."""
    finite = {f"reward {name}": score.isfinite() for name, score in scores.items()}
    all_finite = [each.all() for each in finite.values()]
    if gradient is not None:
        all_finite.append(gradient.abs().sum().isfinite())
    if torch.stack([each.to(all_finite[-1].device) for each in all_finite]).all():
        return
    for name, each in finite.items():
        if not each.all():
            raise NonFiniteScore(f"{name}: {int((~each).sum())} of {len(each)} scores are not finite")
    raise NonFiniteScore(f"{title} is not finite")
