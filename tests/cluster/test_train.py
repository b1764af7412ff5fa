"""On Ray: workers against `local.py`, what dies and comes back. (Reward actors: test_reward_actors.py, sweeps:
test_tune.py.)

Ray as conftest.py starts it, one pair of reward actors for most of it.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from tiny.runs import SAME, agree, journal, starts

from diffinstruct.cluster.attach import attached, check_fits
from diffinstruct.cluster.reward_pool import reward_pool
from diffinstruct.cluster.train import data_parallel, fit, run
from diffinstruct.errors import UserError
from diffinstruct.method.nonfinite import NonFiniteGradient
from diffinstruct.method.rewards import RewardError
from diffinstruct.run_folder.checkpoint import CheckpointStore
from diffinstruct.run_folder.state_tree import TensorShard
from diffinstruct.training import local

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pool(session, world):
    with reward_pool(world[1](cluster__rewards__replicas=2)) as pool:
        yield pool


# -------------------------------------------------------------------------------------------------- training
def test_one_worker_gives_the_numbers_of_local(pool, world, tmp_path):
    experiment = world[1](steps=20)
    expected = local.run(experiment, tmp_path / "local")
    result = fit(experiment, tmp_path / "ray", pool, "ray somewhere")
    agree(tmp_path / "ray", tmp_path / "local")
    assert [*journal(tmp_path / "ray")[0]] == [*range(21)]  # the watch has looked at the start, too
    assert result.folder == tmp_path / "ray" and (result.export / "model_index.json").exists()
    assert result.metrics["x0_gap"] == pytest.approx(expected.metrics["x0_gap"], rel=SAME)
    assert "ray somewhere" in (tmp_path / "ray" / "output.txt").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("adapters", "more"),
    [
        pytest.param({}, {"micro_batch_size": 3}, marks=pytest.mark.long),
        ({}, {"cluster__fully_shard": True}),
        pytest.param(
            {}, {"cluster__fully_shard": True, "cluster__workers": 4, "cluster__shard_degree": 2}, marks=pytest.mark.long
        ),
        pytest.param({"generator__lora_rank": 4, "score_network__lora_rank": 2}, {}, marks=pytest.mark.long),
    ],
    ids=["micro-batches", "sharded", "copies", "adapters"],
)
def test_two_workers_with_half_the_batch_each_have_the_gradient_of_one(pool, world, tmp_path, adapters, more):
    """beta_1 is 0: the first moment that Adam keeps is the gradient itself. The networks stand still, because Adam makes
    a whole step of a gradient that is 0 but for rounding, and the order of sums is another with two workers."""
    still = {"generator__learning_rate": 1e-12, "score_network__learning_rate": 1e-12, **adapters}
    local.run(world[1](**still), tmp_path / "local")
    fit(world[1](**still, **{"cluster__workers": 2, **more}), tmp_path / "ray", pool, "")
    agree(tmp_path / "ray", tmp_path / "local", rel=1e-4)  # a worker counted twice or not at all would show at 0.5
    (_, one), (_, two) = (CheckpointStore(tmp_path / run / "checkpoints").latest() for run in ("local", "ray"))
    for optimizer in ("generator_optimizer", "score_optimizer"):
        whole, halves = (moments(state["train_state"][optimizer]) for state in (one, two))
        assert len(whole) > 20
        norms = [moment.norm() for moment in whole]
        for ours, theirs, norm in zip(whole, halves, norms, strict=True):
            assert (ours - theirs).norm() <= 1e-4 * norm + 1e-6 * max(norms)


def moments(optimizer):
    """Adam's first ones, whole: of a sharded network the checkpoint has them in rows."""
    found = [of["exp_avg"] for of in optimizer["state"].values()]
    return [moment.own if isinstance(moment, TensorShard) else moment for moment in found]


@pytest.mark.long
def test_a_killed_worker_goes_on_from_the_checkpoint(session, world, tmp_path, capfd):
    """The whole way through `run`: its own reward actor, its lines in the terminal, and the numbers of an unbroken
    run."""
    experiment = world[1](steps=30, logging__checkpoint_every=4)
    local.run(experiment, tmp_path / "local")
    folder = tmp_path / "ray"

    def kill():
        while not (folder / "checkpoints" / "step-00000008").exists():
            time.sleep(0.01)
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                if "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(experiment, folder)
    killer.join(1)
    assert starts(folder) == 2
    agree(folder, tmp_path / "local")
    assert journal(folder)[1] == ["FINISHED"]
    shown = capfd.readouterr().out.splitlines()
    assert any(line.startswith("step 30/30") for line in shown)
    assert "ray " in next(line for line in shown if line.startswith(f"done: run {folder}"))


def test_an_error_that_would_come_again_is_not_tried_again(pool, world, tmp_path):
    experiment = world[1](prompts__train=str(world[0] / "broken.txt"))
    # In the validation, or in the rounds where the pool's actors have had theirs with another test's prompts
    with pytest.raises((NonFiniteGradient, RewardError), match=r"reward tiny.rewards:Broken: \d of \d scores are not finite"):
        fit(experiment, tmp_path, pool, "")
    assert starts(tmp_path) == 1
    assert journal(tmp_path)[1][-1] == "FAILED"


def test_what_does_not_fit_the_cluster_is_said_in_one_line(session, world):
    with pytest.raises(UserError, match=r"^cluster: asks for 9 CPUs \(4 workers x 2 \+ 1 reward actors x 1\), Ray has 8$"):
        check_fits(world[1](cluster__workers=4, cluster__cpus_per_worker=2).cluster, 1)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", r"^RAY_ADDRESS: http://127.0.0.1:8265 is for `ray job submit`; [^\n]*$"),
        (
            "ray://10.0.0.5:10001",
            r"^RAY_ADDRESS: ray://10.0.0.5:10001 is for Ray Client, [^\n]*; give the cluster's own, [^\n]*$",
        ),
        ("127.0.0.1", r"^RAY_ADDRESS: 127.0.0.1 should be HOST:PORT; give the cluster's own, like 127.0.0.1:6379$"),
        (":6379", r"^RAY_ADDRESS: :6379 should be HOST:PORT; [^\n]*$"),
        ("127.0.0.1:9", r"^RAY_ADDRESS: no Ray at 127.0.0.1:9: [^\n]*refused$"),
    ],
)
def test_a_ray_address_that_is_none_is_said_at_once(address, said, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=said), attached():
        pass


def test_rays_sockets_find_room_where_the_temporary_folder_is_deep(monkeypatch):
    """As Slurm's; the path of a socket ends at 107 bytes. Ray itself is not started here."""
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **options: None)
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("diffinstruct.cluster.attach.described", lambda: "")
    for variable in ("RAY_ADDRESS", "RAY_TMPDIR"):
        monkeypatch.delenv(variable, raising=False)
    for depth, moved in (("/tmp", None), ("/scratch/slurm_jobdir/1355700_partition_gpu/tmp.node0016", "/tmp")):
        monkeypatch.setattr("tempfile.tempdir", depth)
        with attached():
            assert os.environ.get("RAY_TMPDIR") == moved
    monkeypatch.delenv("RAY_TMPDIR")


def test_the_buckets_of_data_parallelism_are_the_gradients(tmp_path):
    """In each round; else they would be a second copy of them."""
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        network = data_parallel(torch.nn.Linear(3, 2))
        for _ in range(3):
            network.zero_grad()
            network(torch.ones(1, 3)).sum().backward()
            gradients = [weight.grad.untyped_storage().data_ptr() for weight in network.parameters()]
            assert len(set(gradients)) == 1
    finally:
        torch.distributed.destroy_process_group()
