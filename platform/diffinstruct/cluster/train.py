"""A run on Ray: training workers under Ray Train, rewards in actors, the same loop and the same numbers as `local.py`.

What is kept lies in the run's folder, which every machine of the cluster has to see: checkpoints are ours, Ray's own
snapshots are never read. A worker that dies is started again and goes on from the last checkpoint; an error that would
come again ends the run.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import ray.train
import torch
import torch.distributed
from ray.train import LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from torch.nn.parallel import DistributedDataParallel

from diffinstruct.cluster.attach import attached, check_fits, stand_in
from diffinstruct.cluster.collectives import collective_device, distributed_ranks, preempted
from diffinstruct.cluster.failures import RESTARTS, NoSecondTry, close, cluster_error, final_error
from diffinstruct.cluster.reward_pool import RewardPool, reward_pool
from diffinstruct.cluster.shared_folder import check_seen
from diffinstruct.cluster.tasks import in_tasks
from diffinstruct.cluster.waiting import waits_said
from diffinstruct.config.addresses import tracking_uri
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import SHARED_PATH, refuse_passing_copy
from diffinstruct.errors import UserError
from diffinstruct.locks import Busy
from diffinstruct.run_folder import signals
from diffinstruct.run_folder.signals import Signal
from diffinstruct.tracking.journal import Parent, deliver_rest

if TYPE_CHECKING:
    from diffinstruct.reward_service.client import RewardBackend
    from diffinstruct.training.run_log import Result

OUTPUT = "output.txt"
"""What rank 0 prints goes into this file of the run's folder, and from there to the user's terminal."""
PROMPTS_A_TASK = 256  # encoding fewer takes less time than loading the text encoders
data_parallel = partial(DistributedDataParallel, gradient_as_bucket_view=True)
"""Wraps a trained network. Its buckets are the gradients themselves, else they would be a second copy of them."""


def run(experiment: Experiment, folder: Path, parent: Parent | None = None) -> Result:
    """Train `experiment` in `folder`, or go on with what is there; as `local.run`, on a cluster."""
    folder = folder.absolute()
    refuse_passing_copy("output_dir", folder)
    uri = tracking_uri(experiment.tracking.uri, folder.parent)
    experiment = experiment.tracked_at(uri).with_absolute_embeddings()
    with attached() as where:
        check_fits(experiment.cluster, experiment.reward_actors)
        check_seen("output_dir", folder, experiment.cluster)
        with waits_said(experiment.cluster, experiment.reward_actors) as begun:
            embed(experiment)
            pooled = reward_pool(experiment) if experiment.reward_actors else nullcontext()
            with pooled as pool, shown(folder / OUTPUT, begun):
                return fit(experiment, folder, pool, where, parent)


def fit(experiment: Experiment, folder: Path, pool: RewardBackend | None, where: str, parent: Parent | None = None) -> Result:
    """One TorchTrainer; callable from a driver or from a trial. Without a `pool` each worker computes its rewards
    itself. `where` is said in the run's first and last line.

    Raises what the workers raised, if it is one of FINAL, ClusterError for an error of Ray's own, else WorkerGroupError;
    in any case the run can be resumed.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # what we print is shown once, by `shown`
    asked, started_in = experiment.cluster, os.getcwd()
    name = uuid.uuid4().hex  # one that was there before would be resumed, from Ray's snapshot
    watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
    trainer = TorchTrainer(
        lambda: train_loop(experiment, folder, pool, where, parent, started_in, watched),
        scaling_config=ScalingConfig(num_workers=asked.workers, use_gpu=asked.use_gpu, resources_per_worker=asked.per_worker),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=RESTARTS,
            callbacks=[NoSecondTry()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    in_main_thread, interrupt = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    signals.clear(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # For a training process to look for; to touch it would be to say that one runs
    (folder / OUTPUT).open("ab").close()
    try:
        with signals.on_sigterm(lambda: signals.request(folder, Signal.PAUSE)):
            result: Result = trainer.fit().return_value
    except BaseException as error:
        # Ray answers Ctrl-C by ending the workers and the program, with status 0.
        reason = KeyboardInterrupt() if isinstance(error, SystemExit) else final_error(error) or cluster_error(error) or error
        if not isinstance(reason, Busy):  # whose run it is sees to its end
            close(folder, experiment.tracking, reason)
        if reason is error:
            raise
        raise reason from None
    finally:
        shutil.rmtree(folder / "ray" / name, ignore_errors=True)
        with suppress(OSError):
            (folder / "ray").rmdir()
        if in_main_thread:
            signal.signal(signal.SIGINT, interrupt)  # Ray leaves its own behind
    # Here, where no worker holds a GPU meanwhile
    deliver_rest(folder, experiment.tracking, *[result.export] * experiment.tracking.log_model)
    return result


def embed(experiment: Experiment) -> None:
    """Make the prompt embeddings that a run's folder of them lacks, in as many tasks as it has workers."""
    if experiment.prompts.embeddings is None:
        return
    from diffinstruct.training.build import missing_embeddings, store_embeddings

    ((missing, line),) = in_tasks([partial(missing_embeddings, experiment)], experiment, os.getcwd())
    if not missing:
        return
    parts = min(experiment.cluster.workers, -(-len(missing) // PROMPTS_A_TASK))
    print(f"{line}, {parts} tasks", flush=True)
    in_tasks([partial(store_embeddings, experiment, missing[i::parts]) for i in range(parts)], experiment, os.getcwd())


def train_loop(
    experiment: Experiment,
    folder: Path,
    pool: RewardBackend | None,
    where: str,
    parent: Parent | None,
    started_in: str,
    watched: bool,
) -> Result | None:
    """Train in one worker of Ray Train; returns the result on rank 0."""
    from diffinstruct.models.sharding import shard_mesh
    from diffinstruct.training.loop import train
    from diffinstruct.training.worker import Worker

    stand_in(started_in, experiment)
    _begin(folder)
    logging.getLogger().setLevel(logging.WARNING)  # Ray says each report at INFO
    torch.set_num_threads(experiment.cluster.cpus_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    worker = Worker(distributed_ranks(rank, world), where=where, preempted=preempted if watched else lambda: False)
    if world > 1:
        if experiment.cluster.fully_shard:
            worker = replace(worker, mesh=shard_mesh(collective_device(), world, experiment.cluster.shard_degree))
        else:
            worker = replace(worker, wrap=data_parallel)
    with (
        (folder / OUTPUT).open("a", buffering=1, encoding="utf-8") if rank == 0 else nullcontext(sys.stdout) as output,
        redirect_stdout(output),
    ):
        if isinstance(pool, RewardPool):
            pool = replace(pool, first=rank)  # workers do not all queue for the same actor
        return train(experiment, folder, pool, worker, parent)


def _begin(folder: Path) -> None:
    """Tell the driver that a training process runs. Raises UserError on a machine that does not see the run's folder."""
    if not (folder / OUTPUT).is_file():
        raise UserError(f"output_dir: {folder} is not seen by {ray.util.get_node_ip_address()}; {SHARED_PATH}")
    (folder / OUTPUT).touch()


@contextmanager
def shown(path: Path, begun: Callable[[], None]) -> Iterator[None]:
    """Print what is appended to `path` during the block; on a terminal a line of progress replaces the one before. Calls
    `begun` when a training process has touched the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    untouched, ended = path.stat().st_mtime_ns, threading.Event()

    def follow() -> None:
        live = False
        with path.open(encoding="utf-8") as file:
            file.seek(0, os.SEEK_END)
            line = ""
            while True:
                if path.stat().st_mtime_ns != untouched:
                    begun()
                last = ended.is_set()
                while (piece := file.readline()) and (line := line + piece).endswith("\n"):
                    progress = sys.stdout.isatty() and line.startswith("step ")
                    before, after = ("\r\x1b[K", "") if progress else ("\n" * live, "\n")
                    print(before + line.rstrip("\n"), end=after, flush=True)
                    live, line = progress, ""
                if last:
                    break
                ended.wait(0.2)
        if live:
            print()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
