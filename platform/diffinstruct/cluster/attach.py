"""The Ray cluster: joining it, what it has, and whether a run fits."""

from __future__ import annotations

import os
import re
import secrets
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.exceptions import AuthenticationError, RayError

import diffinstruct
from diffinstruct.cluster import ray_private
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import SHARED_PATH, relative_paths
from diffinstruct.config.sections import ClusterConfig
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.method.memory import allocator_settings

LONGEST_TMPDIR = 38
"""Characters of a temporary folder in which Ray's sockets find room: a path of theirs has 69 more, and 107 at most."""
TOKEN_ADVICE = "if it asks for a token, RAY_AUTH_MODE=token and its token are needed here"
PATCH_ADVICE = "; RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor lets another patch of Python pass"
VERSIONS = re.compile(r"Ray: (\S+)\s+Python: (\S+)")
"""The cluster's and then ours, in what Ray says where they are not the same."""
HEAD = "node:__internal_head__"  # a resource that the head has, and no other node


@contextmanager
def attached() -> Iterator[str]:
    """Ray, and a word on where it is: the cluster of RAY_ADDRESS (a submitted job has it too), or one of our own, which
    ends with the block. Never a bare `ray.init()`: it joins whatever cluster this machine happens to have."""
    if ray.is_initialized():
        yield described()
        return
    address = _address()
    # A worker without a GPU sees none, so that `device: auto` is the CPU there.
    environment = {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1", **allocator_settings()}
    os.environ.update(environment)
    if address == "local":
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        if {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"}.isdisjoint(os.environ) and not _keeps_a_token(Path.home() / ".ray"):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
        if len(tempfile.gettempdir()) > LONGEST_TMPDIR:
            os.environ.setdefault("RAY_TMPDIR", "/tmp")

        def found() -> None:  # Ray's own helpers look for their cluster, and are lost where this machine has another
            os.environ.setdefault("RAY_ADDRESS", ray.get_runtime_context().gcs_address)

        options: dict[str, Any] = {"worker_process_setup_hook": found}
    else:
        options = {"env_vars": {**environment, "RAY_ADDRESS": address}}
    host, _, port = address.rpartition(":")
    try:
        if port.isdecimal():  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), timeout=10).close()
        ray.init(address=address, runtime_env=options)
    except Exception as error:  # Ray raises what it likes
        if line := start_error(error, address):
            raise line from None
        raise
    try:
        yield described()
    finally:
        ray.shutdown()


def start_error(error: Exception, address: str) -> UserError | None:
    """The line for what `ray.init` has raised, if it is for the user to mend; `address` is a cluster's, or "local"."""
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
    if "Version mismatch" in str(error) and len(versions := VERSIONS.findall(str(error))) == 2:
        (ray, python), (our_ray, our_python) = versions
        of_one_minor = ray == our_ray and python.split(".")[:2] == our_python.split(".")[:2]
        return UserError(
            f"RAY_ADDRESS: the cluster at {address} has Ray {ray} and Python {python}, here are Ray {our_ray} and Python "
            f"{our_python}; both have to be the same{PATCH_ADVICE if of_one_minor else ''}"
        )
    if address == "local":
        if not isinstance(error, (RuntimeError, ConnectionError, RayError)) and type(error) is not Exception:
            return None
        return UserError(f"Ray does not start on this machine: {first}; its logs lie in /tmp/ray/session_latest/logs")
    if not isinstance(error, (OSError, ValueError, RuntimeError, RayError)):
        return None
    # Ray's ConnectionError is an OSError without a number: it says neither that nor what was missing
    untold = isinstance(error, AuthenticationError) or (isinstance(error, ConnectionError) and error.errno is None)
    return UserError(f"RAY_ADDRESS: no Ray at {address}: {first}{f'; {TOKEN_ADVICE}' if untold else ''}")


def _keeps_a_token(folder: Path) -> bool:
    """Whether Ray can keep the token of a cluster in this folder of the user's home, which it makes where it is missing."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return (folder / "auth_token").exists() or os.access(folder, os.W_OK)


def _address() -> str:
    """RAY_ADDRESS as `ray.init` takes it; "local" where there is none. Raises UserError for another form."""
    address = os.environ.get("RAY_ADDRESS") or "local"
    host, colon, port = address.rpartition(":")
    own = "give the cluster's own, like 127.0.0.1:6379"
    if address.startswith("http"):
        raise UserError(f"RAY_ADDRESS: {address} is for `ray job submit`; to run from here {own}")
    if "://" in address:
        raise UserError(f"RAY_ADDRESS: {address} is for Ray Client, through which no run can be started; {own}")
    if address not in ("local", "auto") and not (colon and host and port.isdecimal()):
        raise UserError(f"RAY_ADDRESS: {address} should be HOST:PORT; {own}")
    return address


def described() -> str:
    """Address and dashboard of the cluster we are attached to; where it is not ours, also which code runs on it."""
    dashboard = ray_private.get_dashboard_url()
    return (
        f"ray {ray.get_runtime_context().gcs_address}"
        + (f"  dashboard http://{dashboard}" if dashboard else "")
        + (f"  code {Path(diffinstruct.__file__).parent}" if os.environ.get("RAY_ADDRESS") else "")
    )


def check_fits(asked: ClusterConfig, actors: int) -> None:
    """Raises UserError, one line, where Ray will never have what the workers and so many reward actors ask for."""
    if (nodes := most_nodes()) is None:
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
    for process, each in (("training worker", asked.per_worker), ("reward actor", asked.per_reward_actor if actors else {})):
        if not any(all(resources.get(kind, 0) >= amount for kind, amount in each.items()) for resources, _ in nodes):
            of_one = listed({kind: amount for kind, amount in each.items() if amount})
            raise UserError(f"cluster: no node has all that one {process} asks for ({of_one})")


def listed(resources: Mapping[str, float]) -> str:
    """Amounts of resources in words."""
    return ", ".join(f"{amount:g} {kind}" for kind, amount in resources.items())


def most_nodes() -> list[tuple[Mapping[str, float], int]] | None:
    """(resources, how many) of the cluster's nodes, with those its autoscaler may start; None: nobody knows yet."""
    there = [(node["Resources"], 1) for node in ray.nodes() if node["Alive"]]
    file = Path("~/ray_bootstrap_config.yaml").expanduser()  # the head of a cluster that `ray up` has made has it
    if file.exists():
        types = [
            t for t in yaml.safe_load(file.read_text(encoding="utf-8"))["available_node_types"].values() if t["max_workers"]
        ]
        if not all(t["resources"] for t in types):
            return None  # machines that one has already: what they declare is known when they have joined
        return [node for node in there if HEAD in node[0]] + [(t["resources"], t["max_workers"]) for t in types]
    most = ray_private.autoscaler_limits()  # Kubernetes with its autoscaler tells sums alone
    return [*there, (most, 1)] if most else there


def stand_in(folder: str, experiment: Experiment | None = None) -> None:
    """Make relative paths mean what they meant to the driver, where this machine has its folder. Raises UserError where
    it has not, and the experiment names a file by such a path."""
    try:
        os.chdir(folder)
    except FileNotFoundError:
        for key, path in (relative_paths(experiment) if experiment else {}).items():
            machine = ray.util.get_node_ip_address()
            raise UserError(f"{key}: {path} is relative to {folder}, which {machine} does not have; {SHARED_PATH}") from None


def ray_options(asked: Mapping[str, float]) -> dict[str, Any]:
    """Resources by name as the options of an actor or a task, which know CPU and GPU by other names."""
    declared = {name: amount for name, amount in asked.items() if name not in ("CPU", "GPU")}
    return {"num_cpus": asked["CPU"], "num_gpus": asked.get("GPU", 0), "resources": declared}
