"""One call to a reward actor, sent again until there is an answer that can be trusted."""

from __future__ import annotations

import itertools
import logging
import re
import time
import uuid
from collections.abc import Callable
from typing import Any, NoReturn

import ray
from ray.actor import ActorHandle
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    GetTimeoutError,
    RayActorError,
    RayError,
    RayTaskError,
    RuntimeEnvSetupError,
)

from diffinstruct.cluster import ray_private
from diffinstruct.cluster.reward_actor import LOADING, ActorReply
from diffinstruct.method.rewards import RewardError

logger = logging.getLogger(__name__)

STARTING = 1800.0  # seconds in which a process starts and loads its models, downloads included
ATTEMPTS = 5  # so often a question is asked before its caller gives up
MEMORY_ADVICE = (
    "a smaller rewards.micro_batch_size, fewer cluster.rewards.replicas to a machine or a machine with more takes less of it"
)
GRACE = 10.0  # seconds in which a living process says what it does, however hard it works; at most the deadline


class Fault(Exception):
    """What went wrong with one attempt."""


class Call:
    """A question to one actor, sent when it is made, and sent again until there is an answer that can be trusted.

    Args:
        place: says which actor it is.
        what: says what was asked for.
        deadline: seconds that the actor may work on one question; waiting behind other callers is no fault.
        asks: how many questions' time it may take.
        send: request id -> the object reference of the ActorReply.
        fault: raises Fault for an ActorReply that cannot be trusted.
    """

    def __init__(
        self,
        actor: ActorHandle,
        place: str,
        what: str,
        deadline: float,
        send: Callable[[str], Any],
        fault: Callable[[ActorReply], None],
        asks: int,
    ) -> None:
        self.actor, self.place, self.what, self.send, self.fault, self.asks = actor, place, what, send, fault, asks
        self.deadline, self.grace = deadline, min(deadline, GRACE)
        self.ended: tuple[str, int] | None = None  # the process that was killed last; a stopped one takes seconds to die
        self.id = f"{asks}x{uuid.uuid4().hex}"  # others who wait for the same actor see how long this may take
        self.request = f"{self.id}/1"
        self.reference = send(self.request)

    def answer(self) -> Any:
        """The answer's content. Raises what the actor raised, or RewardError where all attempts have failed."""
        for attempt in itertools.count(1):
            try:
                if attempt > 1:
                    self._wait_until_it_is_back(0.1 * 2**attempt)
                    self.request = f"{self.id}/{attempt}"
                    self.reference = self.send(self.request)
                pause = self.deadline
                while not ray.wait([self.reference], timeout=pause)[0]:
                    pause = self._look()
                answer: ActorReply = ray.get(self.reference)
                if answer.request != self.request:
                    raise Fault(f"answered {answer.request}, asked {self.request}")
                self.fault(answer)
                return answer.content
            except RayTaskError as error:
                raise error.cause from error  # the reward's own words
            except (Fault, RayError) as error:
                self._refuse_end_for_memory(error)
                failure = error if isinstance(error, Fault) else f"{type(error).__name__}: {str(error).splitlines()[0]}"
                if attempt == ATTEMPTS or isinstance(error, (ActorDiedError, RuntimeEnvSetupError)):  # Ray starts it no more
                    has = ray.cluster_resources()
                    raise RewardError(
                        f"{self.place} failed {attempt} times in a row, asked to {self.what}: {failure} "
                        f"(the cluster has {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs)"
                    ) from error
                logger.warning("%s: %s; asked again (%d of %d) to %s", self.place, failure, attempt + 1, ATTEMPTS, self.what)

    def _refuse_end_for_memory(self, error: Exception) -> None:
        """Raises RewardError where Ray has killed the process for memory: asked again, it would take as much."""
        if isinstance(error, RayActorError) and (detail := ray_private.killed_for_memory(self.actor)):
            used = re.search(r"[Mm]emory on the node .*", detail)
            raise RewardError(
                f"{self.place} was killed for memory, asked to {self.what}: {used[0] if used else detail.splitlines()[0]}; "
                f"{MEMORY_ADVICE}"
            ) from error

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
            limit = f" (cluster.rewards.deadline_s allows {most:g})" if own else ""
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
        before = ray_private.actor_process(self.actor)
        try:
            return ray.get(self.actor.doing.remote(), timeout=self.grace)
        except GetTimeoutError:
            # One that waits for resources, for its environment or for its imports is silent, too; or the question
            # went to a process that is no more.
            if before == ray_private.actor_process(self.actor) != self.ended and before[0] == "ALIVE":
                self._replace(f"silent for {self.grace:g} s")
        except ActorUnavailableError:
            pass
        return None

    def _replace(self, why: str) -> NoReturn:
        self.ended = ray_private.actor_process(self.actor)
        ray.kill(self.actor, no_restart=False)  # reaches a stopped process, too
        raise Fault(f"{why}, so it was killed")
