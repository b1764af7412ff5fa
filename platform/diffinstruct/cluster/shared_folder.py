"""A run's folder has to be seen by every machine that may train: looked for before anything heavy begins."""

from __future__ import annotations

import os
import time
import uuid
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from diffinstruct.config.inputs import SHARED_PATH
from diffinstruct.config.sections import ClusterConfig
from diffinstruct.errors import UserError

ANSWERED_WITHIN_S = 60.0
"""Seconds that machines have to look; one that is silent is asked again by the training process that runs on it."""
APPEARS_WITHIN_S = 5.0  # seconds in which a new file is to be seen; network disks remember for a while what was not there


def check_seen(key: str, folder: Path, asked: ClusterConfig) -> None:
    """Raises UserError, one line that begins with `key`, which names the machines that may run a training process and do
    not see `folder`: a token that the driver writes into it is looked for there."""
    here = ray.get_runtime_context().get_node_id()
    others = [
        node
        for node in ray.nodes()
        if node["Alive"]
        and node["NodeID"] != here
        and all(node["Resources"].get(kind, 0) >= amount for kind, amount in asked.per_worker.items())
    ]
    if not others:
        return
    token = folder / f"seen-{uuid.uuid4().hex}"
    folder.mkdir(parents=True, exist_ok=True)
    token.write_text(token.name, encoding="utf-8")
    try:
        blind = [address(node) for node, sees in zip(others, _answers(others, token), strict=True) if sees is False]
    finally:
        token.unlink(missing_ok=True)
    if blind:
        raise UserError(
            f"{key}: {folder} is not seen by {', '.join(blind)}, where training processes may run; {SHARED_PATH}, or keep "
            "them on machines that see it with cluster.worker_resources"
        )


def _answers(nodes: list[dict[str, Any]], token: Path) -> list[bool | None]:
    """Whether each node sees the token; None: it has not answered, or was lost."""
    look = ray.remote(sees)
    places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
    asked = [look.options(num_cpus=0, max_retries=0, scheduling_strategy=place).remote(token) for place in places]
    ready, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWERED_WITHIN_S)

    def answer(reference: ray.ObjectRef) -> bool | None:
        try:
            return ray.get(reference) if reference in ready else None
        except RayError:
            return None

    return [answer(reference) for reference in asked]


def sees(token: Path) -> bool:
    """Whether this machine sees the token; another folder of the same path has not got it."""
    until = time.monotonic() + APPEARS_WITHIN_S
    while not os.path.isfile(token):  # also where it may not look
        if time.monotonic() > until:
            return False
        time.sleep(0.5)
    return True


def address(node: dict[str, Any]) -> str:
    """How a node is called in messages: its address, and its name where that says more."""
    ip, name = node["NodeManagerAddress"], node.get("NodeManagerHostname") or ""
    return ip if name in ("", ip) else f"{ip} ({name})"
