"""A run as a manifest for KubeRay: the experiment, and a RayJob whose pods are what its cluster section asks for.

A pod holds as many training processes as a machine has GPUs, which then speak through NVLink; or one reward actor, or as
many as share one GPU. The two groups of pods declare a resource each, so that no reward actor takes a training process's
place. Nothing secret stands in the manifest: KubeRay makes the cluster's token, and a Secret that need not exist holds
variables like MLFLOW_TRACKING_URI and HF_TOKEN.
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

from diffinstruct.config.addresses import sqlite_path
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import relative_paths
from diffinstruct.config.sections import ClusterConfig
from diffinstruct.errors import UserError

SECRET = "diffinstruct"  # the Secret whose keys become environment variables of every pod
MOUNT = PurePosixPath("/etc/diffinstruct")  # where the experiment lies in every pod
SHARED = "/mnt/shared"  # where the claim is mounted, as the shared folder of other clusters; or at an `output_dir` elsewhere
RUNS = f"{SHARED}/runs"  # the `output_dir` of a recipe with a relative one, which means nothing in a pod
DOWNLOADS = "huggingface"  # the folder of the claim that is HF_HOME: what one pod has downloaded all have
GPUS = 8  # that a machine has at most, for all that is known here
STOP_WAIT_S = 300  # seconds that a job which is told to stop has for its step and its checkpoint; Ray's default is 3
IMAGE = r"[a-z0-9][a-z0-9._-]*(:\d+)?(/[a-z0-9][a-z0-9._-]*)*(:[\w.-]{1,128})?(@sha256:[0-9a-f]{64})?"
"""An image's name: host, port, path, tag, digest."""
LONGEST_NAME = 47  # letters that KubeRay allows a RayJob
HEAD_CPUS = 2  # for the driver, Ray's own processes and the dashboard; the head offers none to training


def manifest(
    experiment: Experiment, image: str, claim: str, resume: str | None = None, workers_per_pod: int | None = None
) -> str:
    """YAML for `kubectl apply`: a ConfigMap and a RayJob.

    Args:
        image: has this project and this Ray.
        claim: a PersistentVolumeClaim that many pods may write to; the runs lie in it, and what the recipe names by path
            lies in it or in the image.
        resume: folder of a run in it that goes on.
        workers_per_pod: training processes of one pod; None: cluster.shard_degree, else, where they have GPUs, as many as
            make equal pods of at most GPUS, else 1.

    Raises UserError for what Kubernetes would refuse.
    """
    uri = experiment.tracking.uri or ""
    _check_paths(experiment)
    experiment = placed(experiment)
    mount = SHARED if PurePosixPath(experiment.output_dir).is_relative_to(SHARED) else experiment.output_dir
    _check(image, claim, mount, uri, experiment.prompts.embeddings, resume)
    name, cluster = job_name(experiment.name, experiment.config_hash), experiment.cluster
    file = MOUNT / "experiment.yaml"
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {file.name: experiment.to_yaml()},
    }
    pods = Pods(name, image, claim, mount)
    head = pods.of("head", HEAD_CPUS, 0, {}, RAY_JOB_STOP_WAIT_TIME_S=str(STOP_WAIT_S))
    head["rayStartParams"] = {"num-cpus": "0"}
    groups = [pods.group("trainer", cluster.workers, cluster.per_worker, workers_of_pod(cluster, workers_per_pod))]
    if experiment.reward_actors:
        share = 1 / cluster.rewards.gpus if 0 < cluster.rewards.gpus < 1 else 1
        groups.append(pods.group("reward", experiment.reward_actors, cluster.per_reward_actor, int(share + 1e-9)))
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


def workers_of_pod(cluster: ClusterConfig, asked: int | None) -> int:
    """Training processes of one pod. Raises UserError where `asked` makes no equal pods."""
    if asked is not None and (asked < 1 or cluster.workers % asked):
        raise UserError(f"--workers-per-pod: should divide cluster.workers ({cluster.workers}), got {asked}")
    most = GPUS if cluster.use_gpu else 1
    return asked or cluster.shard_degree or max(n for n in range(1, most + 1) if cluster.workers % n == 0)


def _check_paths(experiment: Experiment) -> None:
    """Raises UserError for a relative path, which means nothing in a pod."""
    for key, path in relative_paths(experiment).items():
        raise UserError(f"{key}: should be an absolute path, of the claim (as {SHARED}/...) or of the image, got {path!r}")


def _check(image: str, claim: str, mount: str, uri: str, embeddings: str | None, resume: str | None) -> None:
    """Raises UserError for names that Kubernetes would refuse, and for paths that lie in no claim."""
    if not re.fullmatch(IMAGE, image):
        raise UserError(f"--image: should be as registry.example/diffinstruct:1, got {image!r}")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?", claim) or len(claim) > 253:
        raise UserError(f"--claim: should be small letters, digits, '-' and '.', got {claim!r}")
    for key, path in {"tracking.uri": sqlite_path(uri), "prompts.embeddings": embeddings, "--resume": resume}.items():
        if path is not None and not PurePosixPath(path).is_relative_to(mount):
            raise UserError(f"{key}: should lie in {mount}, where the claim is mounted, got '{path}'")


@dataclass(frozen=True)
class Pods:
    """Templates of the pods of one job; `name` is the job's and its ConfigMap's."""

    name: str
    image: str
    claim: str
    mount: str  # of the claim

    def of(self, kind: str, cpus: int, gpus: int, resources: dict[str, float], **variables: str) -> dict[str, Any]:
        """One group of pods: what `ray start` is told, and the template."""
        limits = {"cpu": str(cpus)} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        mounts = {"experiment": str(MOUNT), "shared": self.mount}
        variables = {"OMP_NUM_THREADS": "1", "HF_HOME": f"{self.mount}/{DOWNLOADS}", **variables}
        container = {
            "name": kind,
            "image": self.image,
            "resources": {"requests": limits, "limits": limits},
            "env": [{"name": key, "value": value} for key, value in variables.items()],
            "envFrom": [{"secretRef": {"name": SECRET, "optional": True}}],
            "volumeMounts": [{"name": volume, "mountPath": path} for volume, path in mounts.items()],
        }
        volumes = [
            {"name": "experiment", "configMap": {"name": self.name}},
            {"name": "shared", "persistentVolumeClaim": {"claimName": self.claim}},
        ]
        template = {"terminationGracePeriodSeconds": STOP_WAIT_S, "containers": [container], "volumes": volumes}
        # KubeRay puts the value into a shell's command line as it is.
        start = {"resources": shlex.quote(json.dumps(resources))} if resources else {}
        return {"rayStartParams": start, "template": {"spec": template}}

    def group(self, kind: str, processes: int, each: dict[str, float], per_pod: int) -> dict[str, Any]:
        """A group with as many pods as the processes need, so many of them in each."""
        per_pod = min(processes, per_pod)
        resources = {key: round(per_pod * amount, 4) for key, amount in each.items() if key not in ("CPU", "GPU")}
        count = ceil(processes / per_pod)
        cpus = max(1, ceil(per_pod * each["CPU"]))  # a process that is not counted works all the same
        replicas = dict.fromkeys(("replicas", "minReplicas", "maxReplicas"), count)
        return {"groupName": kind, **replicas, **self.of(kind, cpus, ceil(per_pod * each.get("GPU", 0) - 1e-9), resources)}


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
