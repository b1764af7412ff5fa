"""Which errors of a run on Ray end it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import OutOfMemoryError, WorkerCrashedError
from ray.train import WorkerGroupError

from diffinstruct.cluster import tasks
from diffinstruct.cluster.failures import RESTARTS, NoSecondTry, final_error
from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError

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
    with pytest.raises(WorkerCrashedError):
        tasks.in_tasks([lambda: 1], Experiment(), ".")
    assert remote.sent == 2 + RESTARTS.max_failures
