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
import socket
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import ray.train
import torch
import torch.distributed
import yaml
from ray._private.state import state as cluster_state
from ray._private.worker import get_dashboard_url
from ray.exceptions import RayTaskError
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

import diffinstruct
from diffinstruct import orders, tracking
from diffinstruct.checkpoint import CheckpointError
from diffinstruct.cluster.rewards import RewardPool, ray_options, reward_pool, stand_in
from diffinstruct.experiment import Experiment, UserError, did_you_mean
from diffinstruct.locks import Busy
from diffinstruct.orders import Paused
from diffinstruct.rewards import RewardError
from diffinstruct.step import Metrics, NonFinite

if TYPE_CHECKING:
    from diffinstruct.jury import RewardService
    from diffinstruct.run import Result
    from diffinstruct.tracking import Parent

OUTPUT = "output.txt"
"""What rank 0 prints goes into this file of the run's folder, and from there to the user's terminal."""
FINAL = (UserError, RewardError, NonFinite, CheckpointError, Paused)
"""Errors that a second try would meet again."""
PROMPTS_A_TASK = 256
"""Encoding fewer takes less time than loading the text encoders."""
HEAD = "node:__internal_head__"
"""A resource that the head has, and no other node."""

logger = logging.getLogger(__name__)


def run(experiment: Experiment, folder: Path, parent: Parent | None = None) -> Result:
    """Train `experiment` in `folder`, or go on with what is there; as `local.run`, on a cluster."""
    folder = folder.absolute()
    warn_of_passing_copy(folder)
    uri = tracking.tracking_uri(experiment.tracking.uri, folder.parent)
    experiment = experiment.tracked_at(uri)
    with attached() as where:
        check_fits(experiment)
        embed(experiment)
        with reward_pool(experiment) if experiment.reward_actors else nullcontext() as pool, shown(folder / OUTPUT):
            return fit(experiment, folder, pool, where, parent)


def fit(
    experiment: Experiment,
    folder: Path,
    pool: RewardService | None,
    where: str,
    parent: Parent | None = None,
) -> Result:
    """One TorchTrainer; callable from a driver or from a trial. Without a `pool` each worker computes its rewards itself.
    `where` is said in the run's first and last line.

    Raises what the workers raised, if it is one of FINAL, else Ray's own error; either way the run can be resumed.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_PRINT_PATCH", "0")  # what we print is shown once, by `shown`
    asked, started_in = experiment.cluster, os.getcwd()
    name = uuid.uuid4().hex  # one that was there before would be resumed, from Ray's snapshot
    watched = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER") != "0"
    trainer = TorchTrainer(
        lambda: train_loop(experiment, folder, pool, where, parent, started_in, watched),
        scaling_config=ScalingConfig(
            num_workers=asked.workers,
            use_gpu=asked.use_gpu,
            resources_per_worker=asked.per_worker,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(folder / "ray"),
            failure_config=FailureConfig(max_failures=3),
            callbacks=[NoSecondTry()],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )
    in_main_thread, interrupt = threading.current_thread() is threading.main_thread(), signal.getsignal(signal.SIGINT)
    orders.withdraw(folder)
    try:
        with orders.on_sigterm(lambda: orders.give(folder, orders.PAUSE)):
            return trainer.fit().return_value
    except BaseException as error:
        # Ray answers Ctrl-C by ending the workers and the program, with status 0.
        reason = KeyboardInterrupt() if isinstance(error, SystemExit) else final_error(error) or error
        if not isinstance(reason, Busy):  # whose run it is sees to its end
            close(folder, experiment, reason)
        if reason is error:
            raise
        raise reason from None
    finally:
        shutil.rmtree(folder / "ray" / name, ignore_errors=True)
        with suppress(OSError):
            (folder / "ray").rmdir()
        if in_main_thread:
            signal.signal(signal.SIGINT, interrupt)  # Ray leaves its own behind


def embed(experiment: Experiment) -> None:
    """Make the prompt embeddings that a run's folder of them lacks, in tasks of a worker's size, as many as it has workers."""
    if experiment.prompts.embeddings is None:
        return
    started_in = os.getcwd()
    of_worker = {**ray_options(experiment.cluster.per_worker), "scheduling_strategy": "DEFAULT", "max_retries": 3}

    def look() -> list[str | None]:
        from diffinstruct.run import missing_embeddings

        stand_in(started_in)
        return missing_embeddings(experiment)

    def make(prompts: list[str | None]) -> None:
        from diffinstruct.run import store_embeddings

        stand_in(started_in)
        torch.set_num_threads(experiment.cluster.cpus_per_worker)
        store_embeddings(experiment, prompts)

    try:
        missing = ray.get(ray.remote(look).options(**of_worker).remote())
        if not missing:
            return
        parts = min(experiment.cluster.workers, -(-len(missing) // PROMPTS_A_TASK))
        print(f"prompt embeddings: {len(missing)} to make in {experiment.prompts.embeddings}, {parts} tasks", flush=True)
        ray.get([ray.remote(make).options(**of_worker).remote(missing[i::parts]) for i in range(parts)])
    except RayTaskError as error:
        raise final_error(error) or error from None


def train_loop(
    experiment: Experiment,
    folder: Path,
    pool: RewardService | None,
    where: str,
    parent: Parent | None,
    started_in: str,
    watched: bool,
) -> Result | None:
    """What runs in each worker; the result on rank 0."""
    from diffinstruct.run import Worker, train  # driver and controller need not spend the seconds of this import

    stand_in(started_in)
    logging.getLogger().setLevel(logging.WARNING)  # Ray says each report at INFO
    torch.set_num_threads(experiment.cluster.cpus_per_worker)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    worker = Worker(rank, world, where=where, leaving=leaving if watched else lambda: False)
    if world > 1:
        worker = replace(worker, average=average, least=least, gather=gather)
        if experiment.cluster.fully_shard:
            worker = replace(worker, mesh=init_device_mesh(_collective_device(), (world,)))
        else:
            worker = replace(worker, wrap=DistributedDataParallel)
    with (folder / OUTPUT).open("a", buffering=1) if rank == 0 else nullcontext(sys.stdout) as output, redirect_stdout(output):
        if isinstance(pool, RewardPool):
            pool = replace(pool, first=rank)  # workers do not all queue for the same actor
        return train(experiment, folder, pool, worker, parent)


def average(metrics: Metrics) -> Metrics:
    """The mean of each metric over the workers; a collective call."""
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=_collective_device())
    torch.distributed.all_reduce(values)
    return dict(zip(metrics, (values / torch.distributed.get_world_size()).tolist(), strict=True))


def least(value: int) -> int:
    """Of all workers' values; a collective call."""
    values = torch.tensor(value, device=_collective_device())
    torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN)
    return int(values)


def gather(value: Any) -> list[Any]:
    """All workers' values, by rank; a collective call."""
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def leaving() -> bool:
    """Whether a node with a worker on it has been told to go, as spot machines are; a collective call, of Ray's alpha API."""
    return ray.train.get_preemption_info() is not None


def _collective_device() -> str:
    return "cuda" if torch.distributed.get_backend() == "nccl" else "cpu"


# ------------------------------------------------------------------------------------------------------ failures
class NoSecondTry(UserCallback):
    """Stops the controller at an error that a restart would only repeat. (What it raises, Ray does not retry.)"""

    def after_exception(self, run_context: object, worker_exceptions: dict[int, Exception]) -> None:
        for error in worker_exceptions.values():
            if isinstance(error, FINAL):
                raise error


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
    return None


def close(folder: Path, experiment: Experiment, reason: BaseException) -> None:
    """End the MLflow run with the reason: a worker that was killed could not."""
    status = "KILLED" if isinstance(reason, Paused) or not isinstance(reason, Exception) else "FAILED"
    try:
        if (folder / "journal.jsonl").exists():
            tracking.deliver(folder, experiment.tracking.uri, status, f"{type(reason).__name__}: {reason}")
    except Exception as error:
        logger.warning("the end of %s has not reached MLflow: %s", folder, tracking.in_one_line(error))


def warn_of_passing_copy(path: Path) -> None:
    """A job's working directory is a copy that Ray clears away."""
    if "working_dir_files" in path.parts:
        print(f"{path} lies in Ray's passing copy of the code and will be lost; an absolute path stays", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------- cluster
@contextmanager
def attached() -> Iterator[str]:
    """Ray, and a word on where it is: the cluster of RAY_ADDRESS (a submitted job has it too), or one of our own, which ends
    with the block. Never a bare `ray.init()`: it joins whatever cluster this machine happens to have.
    """
    if ray.is_initialized():
        yield described()
        return
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS: {address} is for `ray job submit`; to run from here give the cluster's own, like 127.0.0.1:6379"
        )
    # A worker without a GPU sees none, so that `device: auto` is the CPU there.
    hidden = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1"}
    os.environ.update(hidden)
    if address == "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away

        def found() -> None:  # Ray's own helpers look for their cluster, and are lost where this machine has another
            os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

        ray.init(address="local", runtime_env={"worker_process_setup_hook": found})
    else:
        host, _, port = address.rpartition(":")
        try:  # Ray itself would try for many minutes
            if port.isdecimal():
                socket.create_connection((host, int(port)), timeout=10).close()
            ray.init(address=address, runtime_env={"env_vars": {**hidden, "RAY_ADDRESS": address}})
        except (OSError, ValueError) as error:  # Ray's ConnectionError is an OSError, without a number
            refused = isinstance(error, ConnectionError) and error.errno is None
            hint = "; if it asks for a token, RAY_AUTH_MODE=token and its token are needed here" if refused else ""
            raise UserError(f"RAY_ADDRESS: no Ray at {address}: {str(error).splitlines()[0]}{hint}") from None
    try:
        yield described()
    finally:
        ray.shutdown()


def described() -> str:
    """Address and dashboard of the cluster we are attached to; where it is not ours, also which code runs on it."""
    dashboard = get_dashboard_url()
    return (
        f"ray {ray.get_runtime_context().gcs_address}"
        + (f"  dashboard http://{dashboard}" if dashboard else "")
        + (f"  code {Path(diffinstruct.__file__).parent}" if os.environ.get("RAY_ADDRESS") else "")
    )


def check_fits(experiment: Experiment) -> None:
    """Raises UserError, one line, where the cluster will never have what is asked."""
    asked, actors, nodes = experiment.cluster, experiment.reward_actors, most_nodes()
    if nodes is None:
        return
    for kind in {**asked.per_worker, **asked.per_reward_actor}:
        per_worker, per_actor = asked.per_worker.get(kind, 0), asked.per_reward_actor.get(kind, 0)
        needed = asked.workers * per_worker + actors * per_actor
        has = sum(resources.get(kind, 0) * count for resources, count in nodes)
        if needed > has + 1e-9:  # amounts may be fractions
            unit = f"{kind}s" if kind in ("CPU", "GPU") else kind
            hint = "" if has else did_you_mean(kind, {name for resources, _ in nodes for name in resources})
            raise UserError(
                f"cluster: asks for {needed:g} {unit} ({asked.workers} workers x {per_worker:g} + {actors} reward actors x "
                f"{per_actor:g}), Ray has {has:g}{hint}"
            )
    for what, each in (("training worker", asked.per_worker), ("reward actor", asked.per_reward_actor if actors else {})):
        if not any(all(resources.get(kind, 0) >= amount for kind, amount in each.items()) for resources, _ in nodes):
            of_one = ", ".join(f"{amount:g} {kind}" for kind, amount in each.items() if amount)
            raise UserError(f"cluster: no node has all that one {what} asks for ({of_one})")


def most_nodes() -> list[tuple[Mapping[str, float], int]] | None:
    """(resources, how many) of the cluster's nodes, with those that its autoscaler may start; None where nobody knows yet."""
    there = [(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
    file = Path("~/ray_bootstrap_config.yaml").expanduser()  # the head of a cluster that `ray up` has made has it
    if file.exists():
        types = [t for t in yaml.safe_load(file.read_text())["available_node_types"].values() if t["max_workers"]]
        if not all(t["resources"] for t in types):
            return None  # machines that one has already: what they declare is known when they have joined
        return [node for node in there if HEAD in node[0]] + [(t["resources"], t["max_workers"]) for t in types]
    most = cluster_state.get_max_resources_from_cluster_config()  # Kubernetes with its autoscaler tells sums alone
    return [*there, (most, 1)] if most else there


# ------------------------------------------------------------------------------------------------------ terminal
@contextmanager
def shown(path: Path) -> Iterator[None]:
    """Print what is appended to `path` during the block; on a terminal each line of progress replaces the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    ended = threading.Event()

    def follow() -> None:
        live = False
        with path.open() as file:
            file.seek(0, os.SEEK_END)
            line = ""
            while True:
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
