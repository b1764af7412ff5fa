"""Which errors of a run on Ray end it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    AuthenticationError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    OwnerDiedError,
    RayTaskError,
    RuntimeEnvSetupError,
    TaskUnschedulableError,
    WorkerCrashedError,
)
from ray.train import ControllerError, WorkerGroupError

from diffinstruct.cluster import reward_call, tasks
from diffinstruct.cluster.attach import start_error
from diffinstruct.cluster.failures import RESTARTS, NoSecondTry, cluster_error, final_error
from diffinstruct.cluster.ray_private import silence, start_failures
from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import ClusterError, UserError
from diffinstruct.method.rewards import RewardError

KILLED = OutOfMemoryError(
    "Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.7) was 15.3GB"
)
SAID = r"^out of memory on a machine, [^\n]*IP: 10.0.0.7[^\n]*; fewer cluster.workers [^\n]*$"


def test_memory_that_ends_is_no_reason_to_try_again() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(UserError, match=r"^out of memory in a training process: .*2 GiB; a smaller micro_batch_size"):
        NoSecondTry().after_exception(None, {0: error})
    assert isinstance(final_error(WorkerGroupError("", {1: error})), UserError)
    NoSecondTry().after_exception(None, {0: RuntimeError("a lost connection")})


MISMATCH = (
    "Version mismatch: The cluster was started with:\n    Ray: 2.59.1\n    Python: 3.11.7\n"
    "This process on node 10.0.0.7 was started with:\n    Ray: 2.60.0\n    Python: 3.12.1\n"
)


@pytest.mark.parametrize(
    ("error", "address", "said"),
    [
        (
            RuntimeError(MISMATCH),
            "h:1",
            "RAY_ADDRESS: the cluster at h:1 has Ray 2.59.1 and Python 3.11.7, here are Ray 2.60.0 and Python 3.12.1; both "
            "have to be the same",
        ),
        (
            RuntimeError(MISMATCH.replace("2.59.1", "2.60.0").replace("3.12.1", "3.11.9")),
            "h:1",
            "RAY_ADDRESS: the cluster at h:1 has Ray 2.60.0 and Python 3.11.7, here are Ray 2.60.0 and Python 3.11.9; both "
            "have to be the same; RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor lets another patch of Python pass",
        ),
        (
            AuthenticationError("no token\nmore"),
            "h:1",
            "RAY_ADDRESS: no Ray at h:1: no token; if it asks for a token, RAY_AUTH_MODE=token and its token are needed here",
        ),
        (
            ConnectionError("Failed to connect to Ray cluster at h:1"),
            "h:1",
            "RAY_ADDRESS: no Ray at h:1: Failed to connect to Ray cluster at h:1; if it asks for a token, "
            "RAY_AUTH_MODE=token and its token are needed here",
        ),
        (ConnectionRefusedError(111, "refused"), "h:1", "RAY_ADDRESS: no Ray at h:1: [Errno 111] refused"),
        (
            RuntimeError("Timed out waiting for node info for node_id=1.\nmore"),
            "h:1",
            "RAY_ADDRESS: no Ray at h:1: Timed out waiting for node info for node_id=1.",
        ),
        (
            RuntimeError("Failed to start GCS.  Last 0 lines of error files:\n\n."),
            "local",
            "Ray does not start on this machine: Failed to start GCS.  Last 0 lines of error files:; its logs lie in "
            "/tmp/ray/session_latest/logs",
        ),
        (
            Exception("The current node timed out during startup."),
            "local",
            "Ray does not start on this machine: The current node timed out during startup.; its logs lie in "
            "/tmp/ray/session_latest/logs",
        ),
        (TypeError("a bug"), "local", None),
        (TypeError("a bug"), "h:1", None),
    ],
)
def test_each_error_of_rays_start_is_one_line(error, address, said):
    line = start_error(error, address)
    assert (line and str(line)) == said
    assert isinstance(line, UserError) or said is None


(STARTED_LATE, START_FAILED, TOO_FEW), (SILENT,) = start_failures(), silence()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (WorkerCrashedError(), "a process of the run was lost"),
        (ActorDiedError(), "a process of the run was lost"),
        (ActorUnavailableError("it is away", b"1" * 16), "a process of the run was lost"),
        (NodeDiedError("it went"), "a machine of the run was lost"),
        (LocalRayletDiedError(), "a machine of the run was lost"),
        (ObjectStoreFullError("full"), "Ray's object store is full"),
        (OutOfDiskError("full"), "a disk that Ray writes to is full"),
        (RuntimeEnvSetupError("no such package"), "Ray cannot set up a process's environment"),
        (TaskUnschedulableError("too large"), "no machine can hold a process of the run"),
        (OwnerDiedError("0" * 56, None, ""), "what a process of the run had made was lost with it"),
        (STARTED_LATE(2), "the training processes did not start"),
        (START_FAILED("gone"), "the training processes did not start"),
        (TOO_FEW("no GPU"), "the training processes did not start"),
        (SILENT("no answer"), "a training process does not answer"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_each_error_of_rays_own_that_ends_a_run_is_one_line(error, said):
    """As Ray Train hands it over: in an error of its controller's, or of its workers'."""
    for wrapped in (error, ControllerError(error), WorkerGroupError("", {0: error, 1: WorkerCrashedError()})):
        line = cluster_error(wrapped)
        assert isinstance(line, ClusterError)
        assert str(line).startswith(f"{said}: {type(error).__name__}: ") and "\n" not in str(line) and "; " in str(line)
        assert final_error(wrapped) is None  # Ray tries again, before


def test_an_error_of_somebodys_code_keeps_its_traceback():
    bug = KeyError("a bug")
    in_constructor = ActorDiedError(RayTaskError("__init__", "Traceback ...", bug))
    for error in (bug, in_constructor, ControllerError(bug), WorkerGroupError("", {0: WorkerCrashedError(), 1: bug})):
        assert cluster_error(error) is None


def test_a_reward_actor_that_was_killed_for_memory_is_not_asked_again(monkeypatch):
    """Ray says of it only that it was restarted."""
    detail = (
        "1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 10.0.0.7, ID: ab) was "
        "15.2GB used / 16.0GB limit (0.95)\nOOM kill reason: ..."
    )

    def lost(reference):
        raise ActorUnavailableError("The actor was restarted.", b"1" * 16)

    sent = []
    monkeypatch.setattr(reward_call.ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(reward_call.ray, "get", lost)
    monkeypatch.setattr(reward_call.ray_private, "killed_for_memory", lambda actor: detail)
    call = reward_call.Call(None, "reward actor 0", "score 4 samples", 60.0, sent.append, lambda answer: None, 1)
    with pytest.raises(RewardError) as error:
        call.answer()
    assert str(error.value) == (
        "reward actor 0 was killed for memory, asked to score 4 samples: Memory on the node (IP: 10.0.0.7, ID: ab) was 15.2GB "
        f"used / 16.0GB limit (0.95); {reward_call.MEMORY_ADVICE}"
    )
    assert len(sent) == 1 and "rewards.micro_batch_size" in str(error.value)


@pytest.fixture
def remote(monkeypatch):
    """Tasks that run when they are asked for, in this process; their options, and how often each was sent."""
    seen = SimpleNamespace(options=None, sent=0, outcomes=[])

    def as_remote(task):
        def options(**given):
            seen.options = given
            return SimpleNamespace(remote=send)

        def send(function):
            seen.sent += 1
            return function

        return SimpleNamespace(options=options)

    def get(function):
        if seen.outcomes and isinstance(outcome := seen.outcomes.pop(0), Exception):
            raise outcome
        return function()

    monkeypatch.setattr(tasks.ray, "remote", as_remote)
    monkeypatch.setattr(tasks.ray, "get", get)
    return seen


def test_a_task_that_is_lost_is_run_again_and_one_that_took_too_much_memory_is_not(remote) -> None:
    remote.outcomes = [WorkerCrashedError(), None]
    assert tasks.in_tasks([lambda: 1, lambda: 2], Experiment(), ".") == [1, 2]
    assert remote.sent == 3 and remote.options["max_retries"] == 0  # with any other number Ray tries that for ever
    remote.sent, remote.outcomes = 0, [KILLED]
    with pytest.raises(UserError, match=SAID):
        tasks.in_tasks([lambda: 1], Experiment(), ".")
    assert remote.sent == 1
    remote.outcomes = [WorkerCrashedError()] * 9
    with pytest.raises(ClusterError, match=r"^a process of the run was lost: WorkerCrashedError: [^\n]*$"):
        tasks.in_tasks([lambda: 1], Experiment(), ".")
    assert remote.sent == 2 + RESTARTS.max_failures
