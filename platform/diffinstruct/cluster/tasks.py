"""Work of a run that is no training, in Ray tasks of a training process's size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from diffinstruct.cluster.attach import ray_options, stand_in
from diffinstruct.cluster.failures import RESTARTS, cluster_error, final_error
from diffinstruct.config.experiment import Experiment


def in_tasks(functions: Sequence[Callable[[], Any]], experiment: Experiment, folder: str) -> list[Any]:
    """What the functions return, each run as in `folder`, in a Ray task of a training process's size. One that is lost
    with its machine is run again, as often as training processes are. Raises what a function raised, UserError where
    Ray has ended one because a machine's memory was used up (Ray itself would try that for ever), ClusterError where one
    was lost too often."""
    asked = experiment.cluster

    def task(function: Callable[[], Any]) -> Any:
        import torch

        stand_in(folder, experiment)
        torch.set_num_threads(asked.cpus_per_worker)
        return function()

    # By default a task inside a trial of Tune's would be put into the trial's own resources
    options = {**ray_options(asked.per_worker), "scheduling_strategy": "DEFAULT", "max_retries": 0}
    remote = ray.remote(task).options(**options)

    def answer(function: Callable[[], Any], sent: ray.ObjectRef, again: int = RESTARTS.max_failures) -> Any:
        try:
            return ray.get(sent)
        except (RayTaskError, OutOfMemoryError) as error:
            raise final_error(error) or error from None
        except RayError as error:
            if not again:
                raise cluster_error(error) or error from None
        return answer(function, remote.remote(function), again - 1)

    sent = [remote.remote(function) for function in functions]
    return [answer(*one) for one in zip(functions, sent, strict=True)]
