"""What a run says while its cluster has not got what it asks for."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import ray

from diffinstruct.cluster.attach import listed
from diffinstruct.config.sections import ClusterConfig

SAID_AFTER_S = 15.0
"""Seconds for which something is missing before it is said: Ray's own processes take some to start."""
LOOK_EVERY_S = 2.0


@dataclass
class Wait:
    """Which line is due, if any. needed: by all processes of the run. busy: whether others had, when it began, what
    the cluster has; it counts until the first training process has begun."""

    needed: Mapping[str, float]
    busy: bool
    since: float | None = None
    said: bool = False

    def line(self, has: Mapping[str, float], free: Mapping[str, float], begun: bool, now: float) -> str | None:
        """The line to print at `now`, in seconds: once for each wait, and once when it is over."""
        if not lacking(self.needed, has) and (begun or not self.busy):
            since, said, self.since, self.said = self.since, self.said, None, False
            if since is None or not said:
                return None
            return f"the machines are there, after {(now - since) // 60:.0f}:{(now - since) % 60:02.0f}"
        self.since = now if self.since is None else self.since
        if self.said or now - self.since < SAID_AFTER_S:
            return None
        self.said = True
        in_all, unused = (listed({kind: of.get(kind, 0) for kind in self.needed}) for of in (has, free))
        return f"waiting for machines: asks for {listed(self.needed)}; Ray has {in_all}, free {unused}"


def lacking(needed: Mapping[str, float], has: Mapping[str, float]) -> bool:
    """Whether there is less of something than is needed; amounts may be fractions."""
    return any(amount > has.get(kind, 0) + 1e-9 for kind, amount in needed.items())


@contextmanager
def waits_said(asked: ClusterConfig, actors: int) -> Iterator[Callable[[], None]]:
    """In the block, print a line where the cluster has less than the workers and so many reward actors ask for, and
    one when it has it. Gives a function by which the block says that a training process runs."""
    amounts = {
        kind: asked.workers * asked.per_worker.get(kind, 0) + actors * asked.per_reward_actor.get(kind, 0)
        for kind in {**asked.per_worker, **asked.per_reward_actor}
    }
    needed = {kind: amount for kind, amount in amounts.items() if amount}
    wait = Wait(needed, lacking(needed, ray.available_resources()))
    begun, ended = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(LOOK_EVERY_S):
            if line := wait.line(ray.cluster_resources(), ray.available_resources(), begun.is_set(), time.monotonic()):
                print(line, flush=True)

    thread = threading.Thread(target=look, name="waiting", daemon=True)
    thread.start()
    try:
        yield begun.set
    finally:
        ended.set()
        thread.join()
