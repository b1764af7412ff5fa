"""Reward actors: the decoder and the reward models in processes of their own, asked as if they were in ours.

Latents go there, scores and the gradient at the latents come back, as numpy arrays (several times quicker through Ray
than torch tensors). The actors are created by the driver, outside of any trial, and die with its job; every training
worker gets their handles. One call is whole micro-batches of one caller, so an answer's bits depend on nobody else's
questions.

Whatever befalls an actor has an outcome: a process that died is restarted by Ray, one that is stopped or hangs is
killed and restarted, and the caller asks again, because scoring is a pure function. An answer counts once, and only if
it is to the very question. After ATTEMPTS failures in a row the caller gets a RewardError; no failure ever becomes a
score.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
import yaml
from ray.actor import ActorHandle
from ray.exceptions import RuntimeEnvSetupError
from ray.runtime_env import RuntimeEnv
from torch import Tensor

from diffinstruct.cluster import ray_private
from diffinstruct.cluster.attach import ray_options
from diffinstruct.cluster.reward_actor import ActorReply, RewardActor
from diffinstruct.cluster.reward_call import Call, Fault
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.sections import RewardActorsConfig
from diffinstruct.errors import UserError, did_you_mean, nearest_file
from diffinstruct.method.rewards import Collect, RewardError, RewardRequest, Scores
from diffinstruct.reward_service.reward_validation import Report

VALIDATION_CALLS = 40  # a validation may take as long as so many scoring calls, with each actor


@dataclass(frozen=True)
class Group:
    """Replicas with the same rewards."""

    rewards: tuple[str, ...]
    replicas: tuple[ActorHandle, ...]
    environment: str | None  # the file of its own runtime environment, if it has one


@dataclass(frozen=True)
class RewardPool:
    """All reward actors, and how to ask them; a `RewardBackend`. Picklable: workers and trials share one pool.

    names: of all rewards, in the order of the scores.
    deadline: seconds that an actor may work on one call.
    needs: what one actor takes of the cluster, in words.
    first: the replica that gets the first rows; workers with different ones do not all queue for the same.
    """

    names: tuple[str, ...]
    groups: tuple[Group, ...]
    deadline: float
    needs: str
    first: int = 0

    def actors(self) -> tuple[ActorHandle, ...]:
        return tuple(replica for group in self.groups for replica in group.replicas)

    def ask(self, latents: Tensor, prompts: Sequence[str], request: RewardRequest) -> Collect:
        """Ask every group, each with its part of the weights. A batch is dealt out to a group's replicas in whole
        micro-batches, so that its rows have the same neighbours as in one process."""
        if unknown := [name for name in request.weights if name not in self.names]:
            raise RewardError(f"reward {unknown[0]}: asked for, but there are {', '.join(self.names) or 'none'}")
        array = latents.detach().cpu().numpy()
        batches = -(-len(array) // request.micro_batch)
        calls = []
        for group in self.groups:
            weights = {name: weight for name, weight in request.weights.items() if name in group.rewards}
            share = -(-batches // len(group.replicas)) * request.micro_batch
            calls.append(
                [
                    self._score(group, self.first + i, array[at : at + share], prompts[at : at + share], weights, request)
                    for i, at in enumerate(range(0, len(array), share))
                ]
            )

        def collect() -> Scores:
            answers = [[call.answer() for call in of_group] for of_group in calls]
            if not answers:
                return Scores({}, torch.zeros(array.shape), 0.0, request.micro_batch)
            found = {
                name: torch.from_numpy(np.concatenate([scores[name] for scores, *_ in of_group]))
                for group, of_group in zip(self.groups, answers, strict=True)
                for name in group.rewards
            }
            gradients = [np.concatenate([gradient for _, gradient, *_ in of_group]) for of_group in answers]
            return Scores(
                {name: found[name] for name in self.names},
                torch.from_numpy(reduce(operator.add, gradients)),
                max(seconds for of_group in answers for *_, seconds, _ in of_group),
                min(micro_batch for of_group in answers for *_, micro_batch in of_group),
            )

        return collect

    def _score(
        self,
        group: Group,
        which: int,
        rows: np.ndarray,
        prompts: Sequence[str],
        weights: dict[str, float],
        request: RewardRequest,
    ) -> Call:
        latents, asked = ray.put(rows), RewardRequest(weights, request.micro_batch)

        def fault(answer: ActorReply) -> None:
            scores, gradient, *_ = answer.content
            wrong = [name for name, score in scores.items() if score.shape != (len(rows),)]
            if wrong or gradient.shape != rows.shape:
                raise Fault(f"answered for other than {len(rows)} samples")

        what = f"score {len(rows)} samples"
        return self._call(group, which, what, lambda actor, id: actor.score.remote(id, latents, prompts, asked), fault)

    def validate(
        self, latents: Tensor, prompts: Sequence[str], trained: Collection[str], known: Collection[str] = ()
    ) -> list[Report]:
        """Validate every reward in each group's first replica."""
        array = ray.put(latents.detach().cpu().numpy())
        what, asked = f"validate with {len(prompts)} samples", (frozenset(trained), frozenset(known))
        calls = [
            self._call(
                group, 0, what, lambda actor, id: actor.validate.remote(id, array, prompts, *asked), asks=VALIDATION_CALLS
            )
            for group in self.groups
        ]
        reports = {report.name: report for call in calls for report in call.answer()}
        return [reports[name] for name in self.names]

    def load(self) -> None:
        """Wait until every actor has its models. Raises UserError: they may be anybody's code that fails to load."""
        calls = [
            (group, self._call(group, which, "load its models", lambda actor, id: actor.load.remote(id)))
            for group in self.groups
            for which in range(len(group.replicas))
        ]
        for group, call in calls:
            try:
                call.answer()
            except RewardError as error:
                if group.environment and isinstance(error.__cause__, RuntimeEnvSetupError):
                    why = str(error.__cause__).strip().splitlines()[-1]  # of a traceback
                    raise _unusable(group.environment, f"cannot be set up: {why}") from None
                raise

    def _call(
        self,
        group: Group,
        which: int,
        what: str,
        send: Callable[[ActorHandle, str], Any],
        fault: Callable[[ActorReply], None] = lambda answer: None,
        asks: int = 1,
    ) -> Call:
        """A call of one replica, whose answer has to be of the group's rewards, in their order."""
        which %= len(group.replicas)
        actor = group.replicas[which]

        def of_other_rewards(answer: ActorReply) -> None:
            if answer.rewards != group.rewards:
                raise Fault(f"answered for {', '.join(answer.rewards) or 'no reward'}")
            fault(answer)

        place = f"reward actor {self.actors().index(actor)} ({self.needs})"
        what = f"{what} with {', '.join(group.rewards)}"
        return Call(actor, place, what, self.deadline, lambda id: send(actor, id), of_other_rewards, asks)


@contextmanager
def reward_pool(experiment: Experiment, actor: type[RewardActor] = RewardActor) -> Iterator[RewardPool]:
    """The reward actors of `experiment`, loaded and ready, until the end of the block.

    To be called in the driver: an actor created inside a trial would be put into the trial's placement group.
    """
    asked = experiment.cluster
    # Ray restarts a process and repeats no call: whether an answer is still wanted only the caller knows.
    options = {**ray_options(asked.per_reward_actor), "max_restarts": -1, "max_task_retries": 0}
    prepared = [
        (names, file, {"runtime_env": runtime_env(file)} if file else {})
        for names, file in grouped(experiment.rewards.names, asked.rewards)
    ]
    groups: list[Group] = []
    try:
        for names, file, own in prepared:
            make = ray.remote(concurrency_groups={"watch": 1})(actor).options(**options, **own)
            replicas = tuple(make.remote(experiment, names, os.getcwd()) for _ in range(asked.rewards.replicas))
            groups.append(Group(names, replicas, file))
        declared = "".join(f", {amount:g} {name}" for name, amount in asked.rewards.resources.items())
        needs = f"of {asked.rewards.cpus:g} CPUs, {asked.rewards.gpus:g} GPUs{declared}"
        pool = RewardPool(experiment.rewards.names, tuple(groups), asked.rewards.deadline_s, needs)
        pool.load()
        yield pool
    finally:
        for group in groups:
            for replica in group.replicas:
                ray.kill(replica)


def grouped(rewards: Sequence[str], asked: RewardActorsConfig) -> list[tuple[tuple[str, ...], str | None]]:
    """Which rewards share actors, in the order of `rewards`, and the file of their own runtime environment, if any."""
    groups = [(set(rewards) - {*asked.apart}, None)] + [(set(e.rewards), e.runtime_env) for e in asked.environments]
    return [(tuple(name for name in rewards if name in names), file) for names, file in groups if names]


def runtime_env(file: str) -> dict[str, Any]:
    """A Ray runtime environment from its YAML file, its local folders uploaded: relative paths mean what they mean to
    `ray job submit`. Raises UserError, one line."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"should be a mapping, got {type(content).__name__}")
        known = RuntimeEnv.known_fields
        if unknown := sorted(set(content) - known, key=str):
            raise ValueError(f"{unknown[0]!r} is no field of a runtime environment{did_you_mean(unknown[0], known)}")
        ready = ray_private.uploaded(RuntimeEnv(**content))
    except Exception as error:  # whatever Ray has against what stands in the file
        missing = isinstance(error, FileNotFoundError) and error.filename == file
        hint = nearest_file(Path(file), "*.y*ml") if missing else ""
        raise _unusable(file, f"{' '.join(str(error).split())}{hint}") from None
    ready.pop("excludes", None)  # of the upload
    return ready


def _unusable(file: str, why: str) -> UserError:
    return UserError(f"cluster.rewards.environments: {file}: {why}")
