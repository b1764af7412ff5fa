"""The cluster files: what `ray up` would say of them, and which machines the autoscaler would start; without a
cloud."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pathspec
import pytest
import yaml
from tiny.autoscaler import prepare_config, started_nodes, validate_config

from diffinstruct.cluster.attach import HEAD, check_fits
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.sections import ClusterConfig
from diffinstruct.errors import UserError

ROOT = Path(__file__).parents[2]
AWS = ROOT / "ray_cluster.yaml"
OWN = ROOT / "experiments" / "clusters" / "own_machines.yaml"


@pytest.mark.parametrize(
    ("file", "planted"),
    [(AWS, ("available_node_types", "reward", "max_worker")), (OWN, ("auth", "ssh_usr"))],
    ids=["ray_cluster", "own_machines"],
)
def test_a_cluster_file_passes_rays_own_validation_and_a_planted_mistake_does_not(file, planted):
    content = yaml.safe_load(file.read_text())
    validate_config(prepare_config(content))
    *parents, last = planted
    part = content
    for parent in parents:
        part = part[parent]
    part[last] = "1"
    with pytest.raises(Exception, match=last):
        validate_config(prepare_config(content))


@pytest.mark.parametrize("file", [AWS, OWN], ids=lambda file: file.stem)
def test_a_cluster_asks_for_the_token_shows_nothing_outside_and_gives_a_stopped_job_time(file):
    content = yaml.safe_load(file.read_text())
    head = content["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head and re.search(r"; RAY_JOB_STOP_WAIT_TIME_S=\d{3} ray start --head", head)
    assert any("RAY_AUTH_MODE=token" in command for command in content["setup_commands"])
    assert content["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    mounted = [local for local in content["file_mounts"].values() if not local.startswith("~")]
    assert mounted and all((ROOT / local).is_file() for local in mounted)


def test_no_weights_but_the_pocket_worlds_travel_with_a_job():
    """Ray takes 512 MiB at most."""
    excludes = yaml.safe_load((ROOT / "runtime_env.yaml").read_text())["excludes"]
    spec = pathspec.PathSpec.from_lines("gitwildmatch", excludes)
    heavy = ["models/a.safetensors", "b.ckpt", "deep/down/c.bin", "embeddings/x/0a.safetensors", "runs/r/journal.jsonl", "d.pt"]
    assert [path for path in heavy if not spec.match_file(path)] == []
    listed = subprocess.run(
        ["git", "ls-files", "platform", "reward_models", "experiments"], cwd=ROOT, capture_output=True, text=True
    )
    needed = listed.stdout.splitlines()
    assert len(needed) > 100 and [path for path in needed if spec.match_file(path)] == []


@pytest.mark.parametrize("file", [AWS, OWN], ids=lambda file: file.stem)
def test_each_machine_has_the_hubs_downloads_and_token_in_the_shared_folder(file):
    assert any("HF_HOME=/mnt/shared/huggingface" in command for command in yaml.safe_load(file.read_text())["setup_commands"])


IMAGES = {
    "canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3": ((2, 39), None),
    "deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest": ((2, 39), 580),
}
"""Images of AWS that were looked up: their glibc, and the oldest NVIDIA driver in them, where they have one."""
GLIBC, DRIVER = (2, 28), 580
"""What torch 2.13's wheels ask for: manylinux_2_28, and the driver of CUDA 13."""


def unfit(types):
    """The node types on whose image the pinned torch does not run, and why."""
    reasons = {}
    for name, node_type in types.items():
        image = node_type["node_config"].get("ImageId", "")
        known = IMAGES.get(image.removeprefix("resolve:ssm:/aws/service/").removesuffix("/ami-id"))
        if known is None:
            reasons[name] = f"no image that is known: {image!r}"
        elif known[0] < GLIBC or ("GPU" in node_type["resources"] and (known[1] or 0) < DRIVER):
            reasons[name] = f"glibc {known[0]}, driver {known[1]}"
    return reasons


def test_the_pinned_torch_runs_on_each_types_image():
    """Where a type names none Ray fills in Ubuntu 18.04."""
    assert "torch==2.13" in (ROOT / "constraints.txt").read_text() + AWS.read_text()  # else the two constants are to change
    types = yaml.safe_load(AWS.read_text())["available_node_types"]
    assert not unfit(types)
    del types["reward"]["node_config"]["ImageId"]
    types["trainer_spot"]["node_config"]["ImageId"] = types["head"]["node_config"]["ImageId"]  # which has no driver
    assert unfit(types).keys() == {"reward", "trainer_spot"}


# --------------------------------------------------------------------------------------------------- autoscaling
TRAINER = ClusterConfig(use_gpu=True, worker_resources={"trainer": 1.0}).per_worker
CERTAIN = ClusterConfig(use_gpu=True, worker_resources={"trainer": 1.0, "on_demand": 1.0}).per_worker
REWARD = ClusterConfig.model_validate({"rewards": {"gpus": 0.5, "resources": {"reward": 0.5}}}).per_reward_actor


def started(demands, *refused):
    """Type -> how many machines Ray's autoscaler starts, where AWS has just refused those of some types."""
    types = prepare_config(yaml.safe_load(AWS.read_text()))["available_node_types"]
    return started_nodes(types, demands, refused)


@pytest.mark.parametrize(
    ("demands", "machines"),
    [
        ([TRAINER] * 3, {"trainer_spot": 3}),
        ([TRAINER] * 6, {"trainer_spot": 4, "trainer_on_demand": 2}),
        ([CERTAIN] * 2, {"trainer_on_demand": 2}),
        ([REWARD] * 3, {"reward": 2}),
        ([TRAINER, REWARD, REWARD], {"trainer_spot": 1, "reward": 1}),
    ],
)
def test_the_autoscaler_starts_what_is_asked_for_and_spot_first(demands, machines):
    assert started(demands) == machines


def test_the_autoscaler_does_not_fall_back_from_spot_as_the_file_says():
    """When this fails Ray has learnt to, and the file and docs/how-to/cluster.md are to say so."""
    assert started([TRAINER] * 2, "trainer_spot") == {"trainer_spot": 2}


# ------------------------------------------------------------------------------------------------- before a start
@pytest.fixture
def on_the_head(tmp_path, monkeypatch):
    """As on the head of a cluster that `ray up` has just made: only the head is there. A function of the cluster
    file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {HEAD: 1.0, "memory": 1e9}}])

    def bootstrapped(file):
        (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(prepare_config(yaml.safe_load(file.read_text()))))

    return bootstrapped


def asking(**cluster_section):
    experiment = Experiment(cluster=ClusterConfig(use_gpu=True, **cluster_section))
    return experiment.cluster, experiment.reward_actors


def test_on_an_autoscaled_cluster_what_may_come_counts(on_the_head):
    on_the_head(AWS)
    fits = {"worker_resources": {"trainer": 1.0}, "rewards": {"gpus": 0.5, "resources": {"reward": 0.5}}}
    check_fits(*asking(workers=8, **fits))
    for wrong, said in (
        ({"workers": 16}, r"asks for 16.5 GPUs \(16 workers x 1 \+ 1 reward actors x 0.5\), Ray has 10"),
        ({"worker_resources": {"traner": 1.0}}, r"asks for 1 traner \(.*\), Ray has 0, did you mean 'trainer'\?"),
        ({"worker_resources": {"trainer": 1.0, "reward": 1.0}}, r"no node has all that one training worker .*"),
    ):
        with pytest.raises(UserError, match=rf"^cluster: ({said})$"):
            check_fits(*asking(**{**fits, **wrong}))


def test_of_own_machines_nothing_is_known_before_they_have_joined(on_the_head):
    on_the_head(OWN)
    check_fits(*asking(workers=16, worker_resources={"whatever": 1.0}))
