"""The rewards of a run: who answers for them, on what terms they are asked, and whether they are being hacked.

`cluster/rewards.py` has the actors; this file knows no Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.rewards import Collect, LatentRewards, RewardError, RewardModel, RewardRequest, Scores
from diffinstruct.models.sources import quiet
from diffinstruct.reward_service.validation import Report, refuse, validate_reward


def load_reward(name: str, device: torch.device | str = "cpu") -> RewardModel:
    """A reward by its short name or import path, on `device`. Raises UserError: it may be anybody's code that fails to
    load."""
    import reward_models

    try:
        with quiet():
            reward = reward_models.load(name)
    except (Exception, SystemExit) as error:  # a script that is taken for a reward may end the program
        raise UserError(
            f"rewards: cannot load {name!r}: {type(error).__name__}: {' '.join(str(error).split())}"
        ) from error
    if not callable(reward):
        raise UserError(f"rewards: {name!r} makes a {type(reward).__name__}, which is not callable")
    return reward.to(device) if isinstance(reward, nn.Module) else reward


MEASURED_ROUNDS = 3
"""The first ones, which show what the rewards hold up."""


class RewardBackend(Protocol):
    """Whoever answers for the rewards."""

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: RewardRequest) -> Collect:
        """Latents [B, ...], detached, and their prompts; collecting raises RewardError."""

    def validate(self, latents: Tensor, prompts: Sequence[str], trained: Collection[str]) -> list[Report]:
        """The handshake with every reward on the pictures of `latents`; those in `trained` need a gradient."""


class LocalRewards:
    """The rewards in this process: the answer is there when `ask` returns."""

    def __init__(self, rewards: LatentRewards) -> None:
        self.rewards = rewards

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: RewardRequest) -> Collect:
        try:
            answer = self.rewards(latents, prompts, terms)
        except RewardError as error:  # it comes when the answer is collected, as an actor's does
            return partial(_raise, error)
        return lambda: answer

    def validate(self, latents: Tensor, prompts: Sequence[str], trained: Collection[str]) -> list[Report]:
        with (
            torch.no_grad()
        ):  # one at a time: so many as a handshake takes need not fit a GPU's memory while they are decoded
            images = torch.cat([self.rewards.decode(latent) for latent in latents.split(1)])
        return [
            validate_reward(name, reward, images, prompts, name in trained)
            for name, reward in self.rewards.models.items()
        ]


def _raise(error: Exception) -> NoReturn:
    raise error


def make_rewards(names: Sequence[str], decode: Callable[[Tensor], Tensor], device: torch.device | str) -> LatentRewards:
    """The rewards of these names on one device, behind one decoder."""
    return LatentRewards(decode, {name: load_reward(name, device) for name in names})


class RewardClient:
    """The rewards as a run asks them.

    What it has found out on the way is the run's state: the micro-batch that memory holds, the scales of the rewards,
    and where they are computed. A resumed run asks on the same terms, so it gets the same bits.

    in_process: makes the rewards in this process, for a run that has no actors or is better off without.
    """

    def __init__(
        self, experiment: Experiment, actors: RewardBackend | None, in_process: Callable[[], LocalRewards]
    ) -> None:
        self.experiment, self.actors, self.in_process = experiment, actors, in_process
        self.micro_batch = experiment.rewards.micro_batch_size
        self.scales = {reward.name: 1.0 for reward in experiment.rewards.trained}
        self.place = "process" if actors is None else experiment.cluster.rewards.placement  # "auto" until it is settled
        if self.place == "auto" and experiment.cluster.rewards.environments:
            self.place = "actor"  # what a package of the same name scores in this environment is another reward
        self._service: RewardBackend | None = None
        self._held_up: list[float] = []  # seconds a round, while the place is not decided
        self._last: tuple[Tensor, Sequence[str]] | None = None

    @property
    def service(self) -> RewardBackend:
        if self._service is None:
            self._service = self.in_process() if self.place == "process" or self.actors is None else self.actors
        return self._service

    def call(self) -> None:
        """Make what computes rewards now: a mistake in them then shows before anything is written."""
        self._service = self.service

    @property
    def terms(self) -> RewardRequest:
        """What the configuration asks for, with what the run has found out."""
        weights = {reward.name: reward.weight / self.scales[reward.name] for reward in self.experiment.rewards.trained}
        return RewardRequest(weights, self.micro_batch)

    def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        """The `Send` of a round."""
        began = time.perf_counter()
        answer = self.service.ask(latents, prompts, self.terms)
        sent = time.perf_counter()
        if self.place == "auto":
            self._last = latents, prompts

        def collect() -> Scores:
            waiting = time.perf_counter()
            scores = self._collected(answer)
            if self.place == "auto":
                self._held_up.append(sent - began + time.perf_counter() - waiting)
            return scores

        return collect

    def score(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        """Scores without a gradient."""
        answer = self.service.ask(latents, prompts, RewardRequest({}, self.micro_batch))
        return lambda: self._collected(answer)

    def validate(self, latents: Tensor, prompts: Sequence[str]) -> list[Report]:
        """The handshake with all rewards, on pictures of the starting generator. Raises RewardError, a line for each
        fault."""
        reports = self.service.validate(latents, prompts, [reward.name for reward in self.experiment.rewards.trained])
        refuse(reports)
        return reports

    def measure_scales(self, latents: Tensor, prompts: Sequence[str]) -> None:
        """`rewards.normalize`: the standard deviations of the trained rewards over pictures of the starting
        generator."""
        if self.experiment.rewards.normalize == "std" and self.scales:
            scores = self.score(latents, prompts)().scores
            self.scales = {name: scores[name].double().std().item() for name in self.scales}
            if flat := [name for name, scale in self.scales.items() if scale == 0]:
                raise RewardError(
                    f"reward {flat[0]}: the same score for {len(latents)} pictures, nothing to normalize by"
                )

    def settle(self, agree: Callable[[int], int]) -> str | None:
        """Where the rewards are computed from now on, once enough rounds have been seen; a line that says why, or None.

        agree: the least of all workers' values; a collective call, so every worker is to settle after the same round.
        """
        # A round that was left out may have been measured by some workers and not by others
        if self.place != "auto" or agree(len(self._held_up)) < MEASURED_ROUNDS or self._last is None:
            return None
        held_up = sorted(self._held_up)[len(self._held_up) // 2]
        taken, why = self._in_this_process()
        here = agree(int(taken < held_up))
        self.place = "process" if here else "actor"
        if not here:
            self._service = self.actors
        return (
            f"rewards are computed in the {'training process' if here else 'reward actors'}: actors hold a round up by "
            f"{held_up:.3f} s, the training process {why}"
        )

    def _in_this_process(self) -> tuple[float, str]:
        """Seconds that the last question takes here; it is asked twice, since the first time reads the models."""
        assert self._last is not None
        try:
            here, seconds = self.in_process(), 0.0
            for _ in range(2):
                began = time.perf_counter()
                here.ask(*self._last, self.terms)()
                seconds = time.perf_counter() - began
        except Exception as error:  # memory, or packages that only the actors have
            return float("inf"), f"cannot: {type(error).__name__}: {' '.join(str(error).split())}"
        self._service = here
        return seconds, f"would by {seconds:.3f} s"

    def _collected(self, answer: Collect) -> Scores:
        scores = answer()
        self.micro_batch = min(self.micro_batch, scores.micro_batch)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch": self.micro_batch, "scales": dict(self.scales), "place": self.place}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.micro_batch, self.scales = state["micro_batch"], dict(state["scales"])
        self._service, self._held_up = None, []
        if self.actors is not None:
            self.place = state["place"]
