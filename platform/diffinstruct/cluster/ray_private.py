"""Ray's private API: the only file that imports it. pyproject.toml bounds Ray's version, and
tests/cluster/test_ray_private.py holds what is used here to the Ray that is installed."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from typing import Any

from ray._private.runtime_env.py_modules import upload_py_modules_if_needed
from ray._private.runtime_env.working_dir import upload_working_dir_if_needed
from ray._private.state import state
from ray._private.worker import get_dashboard_url as get_dashboard_url
from ray.actor import ActorHandle
from ray.core.generated.common_pb2 import NODE_OUT_OF_MEMORY
from ray.core.generated.gcs_pb2 import ActorTableData, WorkerTableData

logger = logging.getLogger(__name__)


def actor_process(actor: ActorHandle) -> tuple[str, int]:
    """State and number of an actor's process. (The public API asks the dashboard, which need not be there.)"""
    table = state.actor_table(actor._actor_id.hex(), None, None)
    return table["State"], table["NumRestarts"]


def killed_for_memory(actor: ActorHandle) -> str | None:
    """What Ray's memory monitor says of the end of the actor's last process; None where it has not ended that one. (The
    error of a call says only that the actor was restarted.)"""
    accessor = state._connect_and_get_accessor()
    if (record := accessor.get_actor_info(actor._actor_id)) is None:
        return None
    info = ActorTableData.FromString(record)
    ended = info.previous_incarnations[-1].worker_id if info.previous_incarnations else info.address.worker_id
    for process in map(WorkerTableData.FromString, accessor.get_worker_table()):
        if process.worker_address.worker_id == ended and process.exit_type == NODE_OUT_OF_MEMORY and not process.is_alive:
            return str(process.exit_detail)
    return None


def failure_of_poll(error: Exception) -> Exception | None:
    """What a training process was lost by, where `error` is Train's word for one that does not answer any more."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError  # takes seconds, which reward actors save

    return error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else None


def start_failures() -> tuple[type[Exception], ...]:
    """Train's errors for training processes that do not start."""
    from ray.train.v2._internal import exceptions

    kinds = ("WorkerGroupStartupTimeoutError", "WorkerGroupStartupFailedError", "InsufficientClusterResourcesError")
    return tuple(getattr(exceptions, kind) for kind in kinds)


def silence() -> tuple[type[Exception], ...]:
    """Train's error for a training process that does not answer in time."""
    from ray.train.v2._internal.exceptions import WorkerHealthCheckTimeoutError

    return (WorkerHealthCheckTimeoutError,)


def autoscaler_limits() -> dict[str, float] | None:
    """The most of each resource that the cluster's autoscaler may bring; None where there is no autoscaler."""
    return state.get_max_resources_from_cluster_config()


def tune_trials(results: Any) -> list[Any]:
    """Tune's trials, in the order of `results`: a result alone does not say whose it is."""
    return results._experiment_analysis.trials


def time_attribute(scheduler: Any, default: str) -> str | None:
    """The result key by which a scheduler counts time; `default` for a scheduler that does not count."""
    return getattr(scheduler, "_time_attr", default)


def perturbation_interval(scheduler: Any) -> float:
    """How often PopulationBasedTraining lets trials take over others' weights, in its own unit of time."""
    return scheduler._perturbation_interval


def hyperparameter_mutations(scheduler: Any) -> Mapping[str, Any]:
    """What PopulationBasedTraining changes, and to what."""
    return scheduler._hyperparam_mutations


def uploaded(runtime_env: Mapping[str, Any]) -> dict[str, Any]:
    """A runtime environment whose local folders are uploaded to the cluster."""
    result = dict(runtime_env)
    with tempfile.TemporaryDirectory() as scratch:
        for upload in (upload_py_modules_if_needed, upload_working_dir_if_needed):
            result = upload(result, include_gitignore=True, scratch_dir=scratch, logger=logger)
    return result
