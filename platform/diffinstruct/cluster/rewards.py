"""Reward actors: the decoder and the reward models in processes of their own, asked as if they were in ours.

Latents go there, scores and the gradient at the latents come back, as numpy arrays (several times quicker through Ray than
torch tensors). The actors are created by the driver, outside of any trial, and die with its job; every training worker gets
their handles. One call is whole micro-batches of one caller, so an answer's bits depend on nobody else's questions.

Whatever befalls an actor has an outcome: a process that died is restarted by Ray, one that is stopped or hangs is killed and
restarted, and the caller asks again, because scoring is a pure function. An answer counts once, and only if it is to the very
question. After ATTEMPTS failures in a row the caller gets a RewardError; no failure ever becomes a score.
"""

from __future__ import annotations

import logging
import operator
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import ray
import torch
import yaml
from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray._private.state import state as cluster_state
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)
from ray.runtime_env import RuntimeEnv
from torch import Tensor

from diffinstruct.experiment import Experiment, UserError, did_you_mean, nearest_file
from diffinstruct.handshake import Report
from diffinstruct.rewards import Collect, LatentRewards, RewardError, Scores, Terms
from diffinstruct.step import use_deterministic_kernels

ATTEMPTS = 5
"""So often a question is asked before its caller gives up."""
GRACE = 10.0
"""Seconds in which a process that is alive says what it does, however hard it works; less where the deadline is shorter."""
HANDSHAKE = 40
"""So many questions' time a handshake may take with each actor."""
STARTING = 1800.0
"""Seconds in which a process starts and loads its models, downloads included."""
LOADING = "loading"
"""What an actor says it does meanwhile: it is no work on anybody's request."""

logger = logging.getLogger(__name__)


def stand_in(folder: str) -> None:
    """Make relative paths mean what they meant to the driver; on a machine that has no such folder they mean nothing."""
    with suppress(FileNotFoundError):
        os.chdir(folder)


# ------------------------------------------------------------------------------------------------------ the actor
class Answer(NamedTuple):
    """To the call with the id `request`. `rewards`: their names, in order; `content`: Scores, its tensors as arrays, or what
    else was asked for."""

    request: str
    rewards: tuple[str, ...]
    content: Any


class RewardActor:
    """One replica: the rewards of `names` behind a decoder of their own. Models load when first needed, so what is wrong with
    them reaches the caller as it is."""

    def __init__(self, experiment: Experiment, names: tuple[str, ...], folder: str) -> None:
        stand_in(folder)
        torch.set_num_threads(max(1, int(experiment.cluster.reward_cpus)))
        torch.backends.cudnn.deterministic = True  # asked again, it answers with the same bits
        if experiment.deterministic:
            use_deterministic_kernels()
        self.experiment, self.names = experiment, names
        self.device = torch.device("cuda" if experiment.cluster.reward_gpus else "cpu")
        self.task: tuple[str, float] | None = None  # request, since when
        self.reports: dict[frozenset[str], list[Report]] = {}  # by what is trained on

    @cached_property
    def rewards(self) -> LatentRewards:
        from diffinstruct.jury import make_rewards  # seconds of import that whoever asks an actor need not spend
        from diffinstruct.pretrained import frozen_dtype, load_reference

        with self.at_work(LOADING):
            decode = load_reference(
                self.experiment.reference.model,
                device=self.device,
                activation_checkpointing=self.experiment.activation_checkpointing,
                decoder_dtype=frozen_dtype(self.experiment.precision),
            ).decode
            return make_rewards(self.names, decode, self.device)

    def load(self, request: str) -> Answer:
        return Answer(request, tuple(self.rewards.models), None)

    def score(self, request: str, latents: np.ndarray, prompts: Sequence[str], terms: Terms) -> Answer:
        rewards = self.rewards
        with self.at_work(request):
            # What Ray hands over is read-only memory that it shares with others.
            answer = rewards(torch.tensor(latents, device=self.device), prompts, terms)
            scores = {name: score.cpu().numpy() for name, score in answer.scores.items()}
            content = (scores, answer.gradient.cpu().numpy(), answer.seconds, answer.micro_batch)
        return Answer(request, tuple(scores), content)

    def meet(self, request: str, latents: np.ndarray, prompts: Sequence[str], trained: frozenset[str]) -> Answer:
        """The handshakes, made once: all trials of a sweep share this actor."""
        from diffinstruct.jury import InProcess

        rewards = self.rewards
        with self.at_work(request):
            if trained not in self.reports:
                asked = torch.tensor(latents, device=self.device)
                self.reports[trained] = InProcess(rewards).meet(asked, prompts, trained)
        return Answer(request, tuple(report.name for report in self.reports[trained]), self.reports[trained])

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


# ------------------------------------------------------------------------------------------------------ one call
class Fault(Exception):
    """What went wrong with one attempt."""


class Call:
    """A question to one actor, sent when it is made, and sent again until there is an answer that can be trusted.

    Args:
        place: says which actor it is.
        what: says what was asked for.
        deadline: seconds that the actor may work on one question; waiting for its turn behind other callers is no fault.
        asks: how many questions' time it may take.
        send: request id -> the reference of the Answer.
        fault: what is wrong with an Answer to it; raises Fault.
    """

    def __init__(
        self,
        actor: ActorHandle,
        place: str,
        what: str,
        deadline: float,
        send: Callable[[str], Any],
        fault: Callable[[Answer], None],
        asks: int,
    ) -> None:
        self.actor, self.place, self.what, self.send, self.fault, self.asks = actor, place, what, send, fault, asks
        self.deadline, self.grace = deadline, min(deadline, GRACE)
        self.ended: tuple[str, int] | None = None  # the process that was killed last; a stopped one takes seconds to die
        self.id = f"{asks}x{uuid.uuid4().hex}"  # others who wait for the same actor see how long this may take
        self.request = f"{self.id}/1"
        self.reference = send(self.request)

    def answer(self) -> Any:
        """The answer's content. Raises what the actor raised, or RewardError, one line, when all attempts have failed."""
        attempt = 0
        while True:
            attempt += 1
            try:
                if attempt > 1:
                    self._wait_until_it_is_back(0.1 * 2**attempt)
                    self.request = f"{self.id}/{attempt}"
                    self.reference = self.send(self.request)
                answer = self._wait()
                if answer.request != self.request:
                    raise Fault(f"answered {answer.request}, asked {self.request}")
                self.fault(answer)
                return answer.content
            except RayTaskError as error:
                raise error.cause from error  # the reward's own words
            except (Fault, RayError) as error:
                failure = error if isinstance(error, Fault) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if attempt == ATTEMPTS or isinstance(error, (ActorDiedError, RuntimeEnvSetupError)):  # Ray starts it no more
                    has = ray.cluster_resources()
                    raise RewardError(
                        f"{self.place} failed {attempt} times in a row, asked to {self.what}: {failure} "
                        f"(the cluster has {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs)"
                    ) from error
                logger.warning("%s: %s; asked again (%d of %d) to %s", self.place, failure, attempt + 1, ATTEMPTS, self.what)

    def _wait(self) -> Answer:
        pause = self.deadline
        while not ray.wait([self.reference], timeout=pause)[0]:
            pause = self._look()
        return ray.get(self.reference)

    def _look(self) -> float:
        """End the actor if what it does is not to be waited for. Returns seconds until the next look."""
        doing = self._doing()
        if doing is None:
            return self.grace
        task, seconds = doing
        if task == self.request:
            most = self.asks * self.deadline
        elif task == LOADING:
            most = STARTING
        else:  # somebody else's, who would have ended it by then, and so is dead
            asks = int(task.partition("x")[0]) if task else 1
            most = 2 * asks * self.deadline + self.grace
        if seconds >= most:
            own = task == self.request
            limit = f" (cluster.reward_deadline_s allows {most:g})" if own else ""
            self._replace(f"{seconds:.0f} s at work on {'it' if own else task}{limit}")
        return min(self.deadline, most - seconds)

    def _wait_until_it_is_back(self, pause: float) -> None:
        until = time.monotonic() + STARTING
        while True:
            time.sleep(pause)
            if self._doing():
                return
            if time.monotonic() > until:
                self._replace(f"not back after {STARTING:g} s")
            pause = min(2 * pause, 5.0)

    def _doing(self) -> tuple[str | None, float] | None:
        """What the actor says it does; None if it is not there at present. One that is there and silent is ended."""
        before = self._process()
        try:
            return ray.get(self.actor.doing.remote(), timeout=self.grace)
        except GetTimeoutError:
            # One that waits for resources, for its environment or for its imports is silent, too; or the question went to
            # a process that is no more.
            if before == self._process() != self.ended and before[0] == "ALIVE":
                self._replace(f"silent for {self.grace:g} s")
        except ActorUnavailableError:
            pass
        return None

    def _process(self) -> tuple[str, int]:
        """State and number of the actor's process. (The public API asks the dashboard, which need not be there.)"""
        table = cluster_state.actor_table(self.actor._actor_id.hex(), None, None)
        return table["State"], table["NumRestarts"]

    def _replace(self, why: str) -> NoReturn:
        self.ended = self._process()
        ray.kill(self.actor, no_restart=False)  # reaches a stopped process, too
        raise Fault(f"{why}, so it was killed")


# ------------------------------------------------------------------------------------------------------- the pool
@dataclass(frozen=True)
class Group:
    """Replicas with the same rewards."""

    rewards: tuple[str, ...]
    replicas: tuple[ActorHandle, ...]
    environment: str | None  # the file of its own runtime environment, if it has one


@dataclass(frozen=True)
class RewardPool:
    """All reward actors, and how to ask them; a `RewardService`. Picklable: workers and trials share one pool.

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

    def ask(self, latents: Tensor, prompts: Sequence[str], terms: Terms) -> Collect:
        """Ask every group, each with its part of the weights. A batch is dealt out to a group's replicas in whole
        micro-batches, so that its rows meet the same neighbours as in one process."""
        if unknown := [name for name in terms.weights if name not in self.names]:
            raise RewardError(f"reward {unknown[0]}: asked for, but there are {', '.join(self.names) or 'none'}")
        array = latents.detach().cpu().numpy()
        batches = -(-len(array) // terms.micro_batch)
        calls = []
        for group in self.groups:
            weights = {name: weight for name, weight in terms.weights.items() if name in group.rewards}
            share = -(-batches // len(group.replicas)) * terms.micro_batch
            calls.append(
                [
                    self._score(group, self.first + i, array[at : at + share], prompts[at : at + share], weights, terms)
                    for i, at in enumerate(range(0, len(array), share))
                ]
            )

        def collect() -> Scores:
            answers = [[call.answer() for call in of_group] for of_group in calls]
            if not answers:
                return Scores({}, torch.zeros(array.shape), 0.0, terms.micro_batch)
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
        self, group: Group, which: int, rows: np.ndarray, prompts: Sequence[str], weights: dict[str, float], terms: Terms
    ) -> Call:
        latents, asked = ray.put(rows), Terms(weights, terms.micro_batch)

        def fault(answer: Answer) -> None:
            scores, gradient, *_ = answer.content
            wrong = [name for name, score in scores.items() if score.shape != (len(rows),)]
            if wrong or gradient.shape != rows.shape:
                raise Fault(f"answered for other than {len(rows)} samples")

        what = f"score {len(rows)} samples"
        return self._call(group, which, what, lambda actor, id: actor.score.remote(id, latents, prompts, asked), fault)

    def meet(self, latents: Tensor, prompts: Sequence[str], trained: Collection[str]) -> list[Report]:
        """The handshake with every reward, in each group's first replica."""
        array = ray.put(latents.detach().cpu().numpy())
        what, asked = f"shake hands over {len(prompts)} samples", frozenset(trained)
        calls = [
            self._call(group, 0, what, lambda actor, id: actor.meet.remote(id, array, prompts, asked), asks=HANDSHAKE)
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
        fault: Callable[[Answer], None] = lambda answer: None,
        asks: int = 1,
    ) -> Call:
        """A call of one replica, whose answer has to be of the group's rewards, in their order."""
        which %= len(group.replicas)
        actor = group.replicas[which]

        def of_other_rewards(answer: Answer) -> None:
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
    prepared = [(names, file, {"runtime_env": runtime_env(file)} if file else {}) for names, file in grouped(experiment)]
    groups: list[Group] = []
    try:
        for names, file, own in prepared:
            make = ray.remote(concurrency_groups={"watch": 1})(actor).options(**options, **own)
            replicas = tuple(make.remote(experiment, names, os.getcwd()) for _ in range(asked.reward_replicas))
            groups.append(Group(names, replicas, file))
        declared = "".join(f", {amount:g} {name}" for name, amount in asked.reward_resources.items())
        needs = f"of {asked.reward_cpus:g} CPUs, {asked.reward_gpus:g} GPUs{declared}"
        pool = RewardPool(experiment.rewards.names, tuple(groups), asked.reward_deadline_s, needs)
        pool.load()
        yield pool
    finally:
        for group in groups:
            for replica in group.replicas:
                ray.kill(replica)


def ray_options(asked: Mapping[str, float]) -> dict[str, Any]:
    """Resources by name as the options of an actor or a task, which know CPU and GPU by other names."""
    declared = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0), "resources": declared}


def grouped(experiment: Experiment) -> list[tuple[tuple[str, ...], str | None]]:
    """Which rewards share actors, and the file of their runtime environment, if they have one of their own. Names are in the
    order of `experiment.rewards.names`; reward_replicas actors stand for each group."""
    environments = experiment.cluster.reward_environments
    placed = {name for environment in environments for name in environment.rewards}
    groups = [(set(experiment.rewards.names) - placed, None)] + [(set(e.rewards), e.runtime_env) for e in environments]
    return [(tuple(name for name in experiment.rewards.names if name in names), file) for names, file in groups if names]


def runtime_env(file: str) -> dict[str, Any]:
    """A Ray runtime environment from its YAML file, its local folders uploaded: relative paths mean what they mean to
    `ray job submit`. Raises UserError, one line."""
    try:
        content = yaml.safe_load(Path(file).read_text())
        if not isinstance(content, dict):
            raise ValueError(f"should be a mapping, got {type(content).__name__}")
        known = RuntimeEnv.known_fields
        if unknown := sorted(set(content) - known, key=str):
            raise ValueError(f"{unknown[0]!r} is no field of a runtime environment{did_you_mean(unknown[0], known)}")
        ready = dict(RuntimeEnv(**content))
        with tempfile.TemporaryDirectory() as scratch:
            for upload in (upload_py_modules_if_needed, upload_working_dir_if_needed):
                ready = upload(ready, include_gitignore=True, scratch_dir=scratch, logger=logger)
    except Exception as error:  # whatever Ray has against what stands in the file
        missing = isinstance(error, FileNotFoundError) and error.filename == file
        hint = nearest_file(Path(file), "*.y*ml") if missing else ""
        raise _unusable(file, f"{' '.join(str(error).split())}{hint}") from None
    ready.pop("excludes", None)  # of the upload
    return ready


def _unusable(file: str, why: str) -> UserError:
    return UserError(f"cluster.reward_environments: {file}: {why}")
