"""The rewards of a run as its loop asks them, in this process or in reward actors.

`cluster/reward_pool.py` has the actors; this file knows no Ray.
"""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn

from diffinstruct.config.sections import RewardActorsConfig, RewardsConfig
from diffinstruct.errors import UserError, left_behind
from diffinstruct.method.rewards import Collect, LatentRewards, RewardError, RewardModel, RewardRequest, Scores
from diffinstruct.models.sources import quiet
from diffinstruct.ranks import Ranks
from diffinstruct.reward_service.reward_digest import reward_digest
from diffinstruct.reward_service.reward_validation import FEW, Report, raise_on_faults, validate_reward


def load_reward(name: str, device: torch.device | str = "cpu") -> RewardModel:
    """A reward by its short name or import path, on `device`. Raises UserError where its code fails to load."""
    import reward_models

    try:
        with quiet():
            reward = reward_models.load(name)
    except (Exception, SystemExit) as error:  # a script that is taken for a reward may end the program
        hint = left_behind() if isinstance(error, ModuleNotFoundError) else ""
        what = f"{type(error).__name__}: {' '.join(str(error).split())}{hint}"
        raise UserError(f"rewards: cannot load {name!r}: {what}") from error
    if not callable(reward):
        raise UserError(f"rewards: {name!r} makes a {type(reward).__name__}, which is not callable")
    return reward.to(device) if isinstance(reward, nn.Module) else reward


MEASURED_ROUNDS = 3  # so many first rounds are timed before the rewards' placement is chosen


class RewardBackend(Protocol):
    """The rewards' side of a request: this process or reward actors."""

    def ask(self, latents: Tensor, prompts: Sequence[str], request: RewardRequest) -> Collect:
        """Latents [B, ...], detached, and their prompts; collecting raises RewardError."""

    def validate(
        self, latents: Tensor, prompts: Sequence[str], trained: Collection[str], known: Collection[str] = ()
    ) -> list[Report]:
        """Validate every reward on the pictures of `latents`; those in `trained` need a gradient, and of those whose
        digest is in `known` a short check will do."""


class LocalRewards:
    """The rewards in this process: the answer is there when `ask` returns."""

    def __init__(self, rewards: LatentRewards) -> None:
        self.rewards = rewards

    def ask(self, latents: Tensor, prompts: Sequence[str], request: RewardRequest) -> Collect:
        try:
            answer = self.rewards(latents, prompts, request)
        except RewardError as error:  # it comes when the answer is collected, as an actor's does
            return partial(_raise, error)
        return lambda: answer

    def validate(
        self, latents: Tensor, prompts: Sequence[str], trained: Collection[str], known: Collection[str] = ()
    ) -> list[Report]:
        def pictures(latents: Tensor) -> Tensor:
            with torch.no_grad():  # decoded one at a time: all at once need not fit a GPU's memory
                return torch.cat([self.rewards.decode(latent) for latent in latents.split(1)])

        few, everything, reports = pictures(latents[:FEW]), None, []
        for name, reward in self.rewards.models.items():
            digest = reward_digest(reward, name in trained, few.shape[1:])
            if not (is_known := digest in known) and everything is None:
                everything = torch.cat([few, pictures(latents[FEW:])]) if len(latents) > FEW else few
            images = few if is_known or everything is None else everything
            report = validate_reward(name, reward, images, prompts[: len(images)], name in trained, is_known)
            reports.append(replace(report, digest=digest))
        return reports


def _raise(error: Exception) -> NoReturn:
    raise error


def make_rewards(names: Sequence[str], decode: Callable[[Tensor], Tensor], device: torch.device | str) -> LatentRewards:
    """The rewards of these names on one device, behind one decoder."""
    return LatentRewards(decode, {name: load_reward(name, device) for name in names})


class RewardClient:
    """The rewards as a run asks them.

    Its state is what a run finds out about its rewards: the micro-batch that memory holds, their scales, and where they
    are computed. A resumed run sends the same requests, so it gets the same bits.

    in_process: makes the rewards in this process, for a run without actors, or one that is faster without them.
    """

    def __init__(
        self,
        config: RewardsConfig,
        actors_config: RewardActorsConfig,
        pool: RewardBackend | None,
        in_process: Callable[[], LocalRewards],
    ) -> None:
        self.config, self.pool, self.in_process = config, pool, in_process
        self.micro_batch_size = config.micro_batch_size
        self.scales = {reward.name: 1.0 for reward in config.trained}
        self.placement = "process" if pool is None else actors_config.placement  # "auto" until it is chosen
        if self.placement == "auto" and actors_config.environments:
            self.placement = "actor"  # the training environment may have another version of the reward's package
        self._backend: RewardBackend | None = None
        self._exposed_seconds: list[float] = []  # in which each round waited for rewards, while the placement is not chosen
        self._last_batch: tuple[Tensor, Sequence[str]] | None = None

    @property
    def backend(self) -> RewardBackend:
        if self._backend is None:
            self._backend = self.in_process() if self.placement == "process" or self.pool is None else self.pool
        return self._backend

    def open(self) -> None:
        """Make the rewards' backend now: a mistake in it then shows before anything is written."""
        self._backend = self.backend

    @property
    def request(self) -> RewardRequest:
        """The request of a round: the configuration's weights over the scales, in micro-batches that fit."""
        weights = {reward.name: reward.weight / self.scales[reward.name] for reward in self.config.trained}
        return RewardRequest(weights, self.micro_batch_size)

    def send(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        """The `Send` of a round."""
        began = time.perf_counter()
        answer = self.backend.ask(latents, prompts, self.request)
        sent = time.perf_counter()
        if self.placement == "auto":
            self._last_batch = latents, prompts

        def collect() -> Scores:
            waiting = time.perf_counter()
            scores = self._collected(answer)
            if self.placement == "auto":
                self._exposed_seconds.append(sent - began + time.perf_counter() - waiting)
            return scores

        return collect

    def send_for_scores(self, latents: Tensor, prompts: Sequence[str]) -> Collect:
        """Ask for scores without a gradient; collecting gives them."""
        answer = self.backend.ask(latents, prompts, RewardRequest({}, self.micro_batch_size))
        return lambda: self._collected(answer)

    def validate(self, latents: Tensor, prompts: Sequence[str], known: Collection[str] = ()) -> list[Report]:
        """Validate all rewards on pictures of the generator, those whose digest is `known` shortly. Raises RewardError,
        a line for each fault."""
        reports = self.backend.validate(latents, prompts, [reward.name for reward in self.config.trained], known)
        raise_on_faults(reports)
        return reports

    def measure_scales(self, latents: Tensor, prompts: Sequence[str]) -> None:
        """`rewards.normalize`: the standard deviations of the trained rewards over pictures of the start."""
        if self.config.normalize == "std" and self.scales:
            scores = self.send_for_scores(latents, prompts)().scores
            self.scales = {name: scores[name].double().std().item() for name in self.scales}
            if flat := [name for name, scale in self.scales.items() if scale == 0]:
                raise RewardError(f"reward {flat[0]}: the same score for {len(latents)} pictures, nothing to normalize by")

    def choose_placement(self, ranks: Ranks) -> str | None:
        """Choose where the rewards are computed from now on, once enough rounds have been timed; returns a line that
        says why, or None. A collective call."""
        # A round that was left out may have been timed by some ranks and not by others
        if self.placement != "auto" or ranks.min(len(self._exposed_seconds)) < MEASURED_ROUNDS or self._last_batch is None:
            return None
        exposed = sorted(self._exposed_seconds)[len(self._exposed_seconds) // 2]
        seconds, remark = self._time_in_process()
        here = ranks.min(int(seconds < exposed))
        self.placement, where = ("process", "training process") if here else ("actor", "reward actors")
        if not here:
            self._backend = self.pool
        times = f"actors hold a round up by {exposed:.3f} s, the training process {remark}"
        return f"rewards are computed in the {where}: {times}"

    def _time_in_process(self) -> tuple[float, str]:
        """Seconds that the last request takes here, and a remark; the first of two requests reads the models."""
        assert self._last_batch is not None
        try:
            backend, seconds = self.in_process(), 0.0
            for _ in range(2):
                began = time.perf_counter()
                backend.ask(*self._last_batch, self.request)()
                seconds = time.perf_counter() - began
        except Exception as error:  # memory, or packages that only the actors have
            return float("inf"), f"cannot: {type(error).__name__}: {' '.join(str(error).split())}"
        self._backend = backend
        return seconds, f"would by {seconds:.3f} s"

    def _collected(self, answer: Collect) -> Scores:
        scores = answer()
        self.micro_batch_size = min(self.micro_batch_size, scores.micro_batch)
        return scores

    def state_dict(self) -> dict[str, Any]:
        return {"micro_batch_size": self.micro_batch_size, "scales": dict(self.scales), "placement": self.placement}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.micro_batch_size, self.scales = state["micro_batch_size"], dict(state["scales"])
        self._backend, self._exposed_seconds = None, []
        if self.pool is not None:
            self.placement = state["placement"]
