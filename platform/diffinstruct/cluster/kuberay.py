"""A run as a manifest for KubeRay: the experiment, and a RayJob whose pods are what its cluster section asks for.

A pod holds one process, or as many as share one GPU. The two groups of pods declare a resource each, so that no reward
actor takes a training process's place. Nothing secret stands in the manifest: KubeRay makes the cluster's token, and a
Secret that need not exist holds variables like MLFLOW_TRACKING_URI and HF_TOKEN.
"""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import PurePosixPath
from typing import Any

import yaml

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError

SECRET = "diffinstruct"  # the Secret whose keys become environment variables of every pod
MOUNT = PurePosixPath("/etc/diffinstruct")  # where the experiment lies in every pod
RUNS = "/mnt/runs"  # where the claim is mounted if `output_dir` is a relative path, which means nothing in a pod
STOP_WAIT_S = 300  # seconds that a job which is told to stop has for its step and its checkpoint; Ray's default is 3
IMAGE = r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?"
"""An image's name: host, port, path, tag, digest."""
LONGEST_NAME = 47  # letters that KubeRay allows a RayJob
HEAD_CPUS = 2  # for the driver, Ray's own processes and the dashboard; the head offers none to training


def manifest(experiment: Experiment, image: str, claim: str, resume: str | None = None) -> str:
    """YAML for `kubectl apply`: a ConfigMap and a RayJob.

    Args:
        image: has this project, whatever the recipe names by path, and this Ray.
        claim: a PersistentVolumeClaim that many pods may write to; the runs lie in it.
        resume: folder of a run in it that goes on.

    Raises UserError for what Kubernetes would refuse.
    """
    uri = experiment.tracking.uri or ""
    experiment = placed(experiment)
    _check(image, claim, experiment.output_dir, uri, resume)
    name, cluster = job_name(experiment.name, experiment.config_hash), experiment.cluster
    file = MOUNT / "experiment.yaml"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {file.name: experiment.to_yaml()},
    }
    pods = Pods(name, image, claim, experiment.output_dir)
    head = pods.of("head", HEAD_CPUS, 0, {}, RAY_JOB_STOP_WAIT_TIME_S=str(STOP_WAIT_S))
    head["rayStartParams"] = {"num-cpus": "0"}
    groups = [pods.group("trainer", cluster.workers, cluster.per_worker)]
    if experiment.reward_actors:
        groups.append(pods.group("reward", experiment.reward_actors, cluster.per_reward_actor))
    command = ["python", "-m", "diffinstruct", "train", str(file), *(["--resume", resume] if resume else [])]
    job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": shlex.join(command),
            "shutdownAfterJobFinishes": True,
            "rayClusterSpec": {
                "rayVersion": version("ray"),
                "authOptions": {"mode": "token"},
                "headGroupSpec": head,
                "workerGroupSpecs": groups,
            },
        },
    }
    return yaml.dump_all([config_map, job], Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _check(image: str, claim: str, output_dir: str, uri: str, resume: str | None) -> None:
    """Raises UserError for names that Kubernetes would refuse, and for paths that lie in no claim."""
    if not re.fullmatch(IMAGE, image):
        raise UserError(f"--image: should be as registry.example/diffinstruct:1, got {image!r}")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim) or len(claim) > 253:
        raise UserError(f"--claim: should be small letters, digits, '-' and '.', got {claim!r}")
    database = uri.removeprefix("sqlite:///") if uri.startswith("sqlite:///") else None
    for key, path in {"tracking.uri": database, "--resume": resume}.items():
        if path is not None and not PurePosixPath(path).is_relative_to(output_dir):
            raise UserError(f"{key}: should lie in {output_dir}, where the claim is mounted, got {path!r}")


@dataclass(frozen=True)
class Pods:
    """Templates of the pods of one job; `name` is the job's and its ConfigMap's."""

    name: str
    image: str
    claim: str
    output_dir: str

    def of(self, kind: str, cpus: int, gpus: int, resources: dict[str, float], **variables: str) -> dict[str, Any]:
        """One group of pods: what `ray start` is told, and the template."""
        limits = {"cpu": str(cpus)} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        mounts = {"experiment": str(MOUNT), "runs": self.output_dir}
        container = {
            "name": kind,
            "image": self.image,
            "resources": {"requests": limits, "limits": limits},
            "env": [{"name": key, "value": value} for key, value in {"OMP_NUM_THREADS": "1", **variables}.items()],
            "envFrom": [{"secretRef": {"name": SECRET, "optional": True}}],
            "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
        }
        volumes = [
            {"name": "experiment", "configMap": {"name": self.name}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": self.claim}},
        ]
        template = {"terminationGracePeriodSeconds": STOP_WAIT_S, "containers": [container], "volumes": volumes}
        # KubeRay puts the value into a shell's command line as it is.
        start = {"resources": shlex.quote(json.dumps(resources))} if resources else {}
        return {"rayStartParams": start, "template": {"spec": template}}

    def group(self, kind: str, processes: int, each: dict[str, float]) -> dict[str, Any]:
        """A group with as many pods as the processes need; processes that share a GPU share a pod."""
        gpu = each.get("GPU", 0)
        per_pod = min(processes, int(1 / gpu + 1e-9)) if 0 < gpu < 1 else 1
        resources = {key: round(per_pod * amount, 4) for key, amount in each.items() if key not in ("CPU", "GPU")}
        count = ceil(processes / per_pod)
        cpus = max(1, ceil(per_pod * each["CPU"]))  # a process that is not counted works all the same
        replicas = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), count)
        return {"groupName": kind, **replicas, **self.of(kind, cpus, ceil(per_pod * gpu - 1e-9), resources)}


def placed(experiment: Experiment) -> Experiment:
    """With an absolute `output_dir`, and with resources that tell the two groups of pods apart."""
    asked = experiment.cluster
    rewards = asked.rewards.model_copy(update={"resources": asked.rewards.resources or {"reward": 1.0}})
    cluster = asked.model_copy(update={"worker_resources": asked.worker_resources or {"trainer": 1.0}, "rewards": rewards})
    runs = experiment.output_dir if PurePosixPath(experiment.output_dir).is_absolute() else RUNS
    return experiment.model_copy(update={"cluster": cluster, "output_dir": runs})


def job_name(name: str, config_hash: str) -> str:
    """The run's name as Kubernetes allows it, and its configuration's hash: the same configuration is the same job."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    words = words if words[:1].isalpha() else f"run-{words}"
    return f"{words[: LONGEST_NAME - len(config_hash) - 1].rstrip('-')}-{config_hash}"


class _Dumper(yaml.SafeDumper):
    """Writes what is used twice out twice and texts of many lines as such, as people who read manifests expect."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str, lambda to, text: to.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)
)
