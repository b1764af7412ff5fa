"""Errors of a run on Ray: which of them end it, and what the tracker is told."""

from __future__ import annotations

import logging
from pathlib import Path

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    ActorUnschedulableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.train import ControllerError, FailureConfig, UserCallback, WorkerGroupError

from diffinstruct.cluster import ray_private
from diffinstruct.config.addresses import one_line
from diffinstruct.config.sections import TrackingConfig
from diffinstruct.errors import ClusterError, UserError
from diffinstruct.method.memory import out_of_memory
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.rewards import RewardError
from diffinstruct.run_folder.checkpoint import CheckpointError
from diffinstruct.run_folder.signals import Paused
from diffinstruct.tracking.journal import deliver

logger = logging.getLogger(__name__)

FINAL = (UserError, RewardError, NonFiniteGradient, CheckpointError, Paused)  # errors that a second try would raise again
RESTARTS = FailureConfig(max_failures=3)  # any other error restarts the workers, so many times
MEMORY_ADVICE = "a smaller micro_batch_size or activation_checkpointing takes less; `diffinstruct check` counts it"
NODE_ADVICE = (
    "fewer cluster.workers or cluster.rewards.replicas to a machine, a smaller micro_batch_size or a machine with more takes "
    "less of it; `diffinstruct check` counts it"
)

LOST: dict[tuple[type[Exception], ...], tuple[str, str]] = {
    (ObjectStoreFullError,): (
        "Ray's object store is full",
        "a larger /dev/shm, or another --object-store-memory of `ray start`, gives it room",
    ),
    (OutOfDiskError,): ("a disk that Ray writes to is full", "make room in /tmp/ray, or start Ray with another --temp-dir"),
    (NodeDiedError, LocalRayletDiedError): ("a machine of the run was lost", "`ray status` says which machines are there"),
    (RuntimeEnvSetupError,): (
        "Ray cannot set up a process's environment",
        "what runtime_env.yaml names has to be there for every machine",
    ),
    (ActorUnschedulableError, TaskUnschedulableError): (
        "no machine can hold a process of the run",
        "`ray status` says what the machines have",
    ),
    (WorkerCrashedError, ActorDiedError, ActorUnavailableError): (
        "a process of the run was lost",
        "its machine may be gone, or out of memory: the kernel's log and Ray's, in /tmp/ray/session_latest/logs there, say it",
    ),
    (ObjectLostError,): ("what a process of the run had made was lost with it", "its machine may be gone"),
    ray_private.start_failures(): (
        "the training processes did not start",
        "`ray status` says whether the machines have what they ask for",
    ),
    ray_private.silence(): ("a training process does not answer", "its machine may be gone, or busy beyond its means"),
}
"""Ray's errors -> what has happened, and what the user can do. Where two fit, the first one counts."""


class NoSecondTry(UserCallback):
    """Stops the controller at an error that a restart would only repeat. (What it raises, Ray does not retry.)"""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if (final := final_error(error)) is not None:
                raise final


def final_error(error: BaseException | None) -> Exception | None:
    """The error of ours inside one of Ray's, if there is one."""
    match error:
        case RayTaskError():  # is of its cause's class, too, but says its whole traceback
            return final_error(error.cause)
        case Exception() if isinstance(error, FINAL):
            return error
        case ControllerError():
            return final_error(error.controller_failure)
        case WorkerGroupError():
            return next((found for e in error.worker_failures.values() if (found := final_error(e))), None)
        case OutOfMemoryError():
            return UserError(
                f"out of memory on a machine, where Ray ended a process of this run: {one_line(error)}; {NODE_ADVICE}"
            )
        case Exception() if (failure := ray_private.failure_of_poll(error)) is not None:
            return final_error(failure)
        case Exception() if out_of_memory(error):
            return UserError(f"out of memory in a training process: {one_line(error)}; {MEMORY_ADVICE}")
    return None


def cluster_error(error: BaseException | None) -> ClusterError | None:
    """The line for an error of Ray's own that has ended a run. None where one of the errors in it is anybody else's: that
    is the one to look into, with its traceback."""
    match error:
        case RayTaskError():
            return cluster_error(error.cause)
        case ControllerError():
            return cluster_error(error.controller_failure)
        case WorkerGroupError():
            lines = [cluster_error(failure) for failure in error.worker_failures.values()]
            return lines[0] if lines and all(lines) else None
        case RayActorError() if error.actor_init_failed:
            return None
        case Exception() if (failure := ray_private.failure_of_poll(error)) is not None:
            return cluster_error(failure)
    for kinds, (happened, mend) in LOST.items():
        if isinstance(error, kinds):
            return ClusterError(f"{happened}: {one_line(error)}; {mend}")
    return None


def close(folder: Path, tracking: TrackingConfig, reason: BaseException) -> None:
    """End the run of a folder in its trackers with the reason: a worker that was killed could not."""
    status = "KILLED" if isinstance(reason, Paused) or not isinstance(reason, Exception) else "FAILED"
    try:
        if (folder / "journal.jsonl").exists():
            deliver(folder, tracking.uri, status, f"{type(reason).__name__}: {reason}", tracking.also)
    except Exception as error:
        logger.warning("the end of %s has not reached MLflow: %s", folder, one_line(error))
