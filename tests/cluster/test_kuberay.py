"""A run as a manifest for KubeRay, held to the schema that Kubernetes itself would hold it to.

data/ray.io_rayjobs.yaml.xz is ray-operator/config/crd/bases/ray.io_rayjobs.yaml of github.com/ray-project/kuberay, tag
v1.7.0, as it is (Copyright the KubeRay authors, Apache-2.0).
"""

from __future__ import annotations

import copy
import json
import lzma
import re
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from diffinstruct.cli.main import main
from diffinstruct.cluster.kuberay import SECRET, job_name
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load

RECIPE = Path(__file__).parents[2] / "experiments" / "recipes" / "pocket.yaml"
CRD = Path(__file__).parents[1] / "data" / "ray.io_rayjobs.yaml.xz"
IMAGE = "registry.example/diffinstruct:1"


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    """Of a RayJob, where an unknown field is a mistake, as it is for `kubectl apply`."""
    crd = yaml.load(lzma.decompress(CRD.read_bytes()), yaml.CSafeLoader)  # safe_load, in C
    (served,) = (version["schema"]["openAPIV3Schema"] for version in crd["spec"]["versions"] if version["name"] == "v1")

    def close(part: Any) -> None:
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            close(value)
        if isinstance(part, dict) and part.get("type") == "object" and "properties" in part:
            part["additionalProperties"] = False

    close(served)
    served["properties"]["metadata"] = {"type": "object"}  # Kubernetes knows it; the CRD leaves it open
    return jsonschema.Draft202012Validator(served)


def rendered(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(ConfigMap, RayJob) that the command prints."""
    assert main(["rayjob", str(RECIPE), "--image", IMAGE, *arguments]) == 0
    config_map, job = yaml.safe_load_all(capsys.readouterr().out)
    return config_map, job


def pods(job: dict[str, Any]) -> list[tuple[int, dict[str, str], dict[str, str]]]:
    """(replicas, limits, what `ray start` is told) of each group, the head's first."""
    cluster = job["spec"]["rayClusterSpec"]
    return [
        (group.get("replicas", 1), group["template"]["spec"]["containers"][0]["resources"]["limits"], group["rayStartParams"])
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    ]


GPUS = ["-s", "cluster.use_gpu=true", "-s", "cluster.workers=4", "-s", "cluster.cpus_per_worker=6"]
SHARED = ["-s", "cluster.rewards.gpus=0.25", "-s", "cluster.rewards.replicas=6", "-s", "cluster.rewards.resources={judge: 0.5}"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        GPUS,
        [*GPUS, *SHARED],
        ["-s", "cluster.rewards.placement=process"],
        [*GPUS, "--workers-per-pod", "2"],
        ["--resume", "/mnt/shared/runs/r"],
        ["-s", "tracking.uri=http://tracking.example:5000"],
        ["-s", "tracking.uri=databricks"],
    ],
)
def test_the_manifest_passes_kuberays_own_schema(schema, capsys, arguments):
    _, job = rendered(capsys, *arguments)
    schema.validate(job)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("spec.rayClusterSpec.headGroupSpec.rayStartParams.num-cpus", 0),
        ("spec.rayClusterSpec.workerGroupSpec", []),
        ("spec.rayClusterSpec.authOptions.mode", "tokens"),
        ("spec.rayClusterSpec.headGroupSpec.template.spec.container", []),
        ("spec.shutdownAfterJobFinishes", "yes"),
    ],
)
def test_a_planted_mistake_is_caught_by_the_schema(schema, capsys, path, value):
    _, job = rendered(capsys)
    *parents, last = path.split(".")
    part = job
    for parent in parents:
        part = part[parent]
    part[last] = value
    with pytest.raises(jsonschema.ValidationError) as mistake:
        schema.validate(job)
    assert last in f"{mistake.value.json_path} {mistake.value.message}"


def test_pods_are_what_the_cluster_section_asks_for(capsys):
    """Four GPU workers in a pod; four reward actors share a GPU, so six of them are two pods."""
    config_map, job = rendered(capsys, *GPUS, *SHARED)
    head, trainers, rewards = pods(job)
    assert head == (1, {"cpu": "2"}, {"num-cpus": "0"})
    assert trainers[:2] == (1, {"cpu": "24", "nvidia.com/gpu": "4"})
    assert rewards[:2] == (2, {"cpu": "4", "nvidia.com/gpu": "1"})
    told = [json.loads(*shlex.split(start["resources"])) for _, _, start in (trainers, rewards)]  # as a shell reads it
    assert told == [{"trainer": 4}, {"judge": 2}]
    asked = yaml.safe_load(config_map["data"]["experiment.yaml"])["cluster"]
    assert (asked["worker_resources"], asked["rewards"]["resources"]) == ({"trainer": 1}, {"judge": 0.5})


SHARDED = ["cluster.workers=16", "global_batch_size=48", "cluster.fully_shard=true"]


@pytest.mark.parametrize(
    ("arguments", "trainers"),
    [
        (["-s", "cluster.workers=16"], (2, {"cpu": "8", "nvidia.com/gpu": "8"}, 8)),
        (["-s", "cluster.workers=12", "-s", "global_batch_size=12"], (2, {"cpu": "6", "nvidia.com/gpu": "6"}, 6)),
        (["-s", "cluster.workers=16", "--workers-per-pod", "1"], (16, {"cpu": "1", "nvidia.com/gpu": "1"}, 1)),
        (["-s", "cluster.workers=16", "--workers-per-pod", "16"], (1, {"cpu": "16", "nvidia.com/gpu": "16"}, 16)),
        (
            [*(part for key in SHARDED for part in ("-s", key)), "-s", "cluster.shard_degree=4"],
            (4, {"cpu": "4", "nvidia.com/gpu": "4"}, 4),
        ),
    ],
)
def test_a_pod_has_as_many_training_processes_as_gpus_so_that_they_share_its_nvlink(capsys, arguments, trainers):
    _, job = rendered(capsys, "-s", "cluster.use_gpu=true", *arguments)
    _, (replicas, limits, start), *_ = pods(job)
    assert (replicas, limits, json.loads(*shlex.split(start["resources"]))["trainer"]) == trainers


def test_without_gpus_a_pod_has_one_training_process(capsys):
    _, job = rendered(capsys, "-s", "cluster.workers=4")
    assert pods(job)[1][:2] == (4, {"cpu": "1"})


def test_downloads_lie_in_the_claim_and_the_hubs_token_is_a_reference_to_the_secret(capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_hidden")
    for arguments, folder in ([[], "/mnt/shared"], [["-s", "output_dir=/data"], "/data"]):
        documents = rendered(capsys, *arguments)
        assert "hf_hidden" not in yaml.safe_dump_all(documents)
        for group in spec_groups(documents[1]):
            (container,) = group["template"]["spec"]["containers"]
            assert {"name": "HF_HOME", "value": f"{folder}/huggingface"} in container["env"]
            assert "HF_TOKEN" not in {entry["name"] for entry in container["env"]}  # it would hide the secret's
            assert container["envFrom"] == [{"secretRef": {"name": SECRET, "optional": True}}]


def test_without_reward_actors_there_is_no_group_for_them(capsys):
    _, job = rendered(capsys, "-s", "cluster.rewards.placement=process")
    assert [group["groupName"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]] == ["trainer"]


def test_the_job_is_the_train_command_on_the_recipe_and_its_runs_lie_in_the_claim(capsys, tmp_path):
    config_map, job = rendered(capsys, "-s", "name=a.B", "--claim", "team.runs", "--resume", "/mnt/shared/runs/it's")
    command = shlex.split(job["spec"]["entrypoint"])
    assert command[:4] == ["python", "-m", "diffinstruct", "train"] and command[5:] == ["--resume", "/mnt/shared/runs/it's"]
    (tmp_path / "experiment.yaml").write_text(config_map["data"]["experiment.yaml"])
    experiment = load(tmp_path / "experiment.yaml")
    assert experiment.config_hash == load(RECIPE, ["name=a.B"]).config_hash
    for template in (group["template"]["spec"] for group in spec_groups(job)):
        (container,) = template["containers"]
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        volumes = {volume.pop("name"): volume for volume in copy.deepcopy(template["volumes"])}
        assert command[4] == f"{mounts['experiment']}/experiment.yaml"
        assert volumes["experiment"] == {"configMap": {"name": config_map["metadata"]["name"]}}
        assert (mounts["shared"], experiment.output_dir) == ("/mnt/shared", "/mnt/shared/runs")
        assert volumes["shared"] == {"persistentVolumeClaim": {"claimName": "team.runs"}}
    _, job = rendered(capsys, "-s", "output_dir=/data/runs")
    (container,) = spec_groups(job)[0]["template"]["spec"]["containers"]
    assert {"name": "shared", "mountPath": "/data/runs"} in container["volumeMounts"]


def spec_groups(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_a_token_is_asked_for_a_stopped_job_has_time_and_no_secret_is_shown(capsys, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN", "hidden-token")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "https://me:hidden-word@mlflow.example")
    documents = rendered(capsys)
    assert "hidden" not in yaml.safe_dump_all(documents)
    cluster = documents[1]["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"} and re.fullmatch(r"\d+\.\d+\.\d+", cluster["rayVersion"])
    for group in spec_groups(documents[1]):
        template = group["template"]["spec"]
        assert template["containers"][0]["envFrom"] == [{"secretRef": {"name": SECRET, "optional": True}}]
        assert template["terminationGracePeriodSeconds"] == 300
    head = {entry["name"]: entry["value"] for entry in cluster["headGroupSpec"]["template"]["spec"]["containers"][0]["env"]}
    assert head["RAY_JOB_STOP_WAIT_TIME_S"] == "300"


@pytest.mark.parametrize("name", ["pocket", "4.SDXL_long", "A" * 80, "x-", "Ab" * 16 + "-" + "c" * 9])
def test_names_are_such_as_kubernetes_takes(name):
    experiment = Experiment(name=name)
    job = job_name(name, experiment.config_hash)
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])", job)
    assert job.endswith(experiment.config_hash)
    assert job != job_name(name, experiment.model_copy(update={"steps": 7}).config_hash)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--image", "two words"], r"--image: should be as .*, got 'two words'"),
        (["--image", "UPPER:bad:tag/"], r"--image: should be as registry\.example/diffinstruct:1, got 'UPPER:bad:tag/'"),
        (["--resume", "runs/one"], r"--resume: should lie in /mnt/shared, where the claim is mounted, got 'runs/one'"),
        (["-s", "prompts.embeddings=/tmp/e"], r"prompts\.embeddings: should lie in /mnt/shared, .*'/tmp/e'"),
        (["-s", "prompts.embeddings=e"], r"prompts\.embeddings: should be an absolute path, of the claim .*, got 'e'"),
        (
            ["-s", "reference.model=a/b", "-s", "generator.init_from=m/a.safetensors"],
            r"generator\.init_from: should be an absolute path, of the claim .*, got 'm/a\.safetensors'",
        ),
        (["-s", "prompts.train=t.txt"], r"prompts\.train: should be an absolute path, .*, got 't\.txt'"),
        (
            ["-s", "cluster.workers=4", "--workers-per-pod", "3"],
            r"--workers-per-pod: should divide cluster\.workers \(4\), got 3",
        ),
        (
            ["-s", "output_dir=/data", "-s", "tracking.uri=sqlite:////tmp/m.db"],
            r"tracking\.uri: should lie in /data, .*'/tmp/m\.db'",
        ),
        (["--claim", "My_Runs"], r"--claim: should be small letters, digits, '-' and '\.', got 'My_Runs'"),
        (["-s", "tracking.uri=https://me:word@host"], r"-s: tracking\.uri: should hold no user and password, .*'https://host'"),
        (
            ["-s", "cluster.rewards.resources={it's: 1}"],
            r"-s: cluster\.rewards\.resources\.it's: should be named in letters, .*",
        ),
    ],
)
def test_what_kubernetes_would_refuse_is_said_in_one_line(capsys, arguments, said):
    assert main(["rayjob", str(RECIPE), "--image", IMAGE, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(said + "\n", err)
    assert "word@" not in err
