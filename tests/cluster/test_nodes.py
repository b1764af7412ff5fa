"""Several nodes: processes run where their resources are declared, and so many trials at once as those allow.

One cluster of three nodes on this machine: a head with room for everybody, and two that declare what they are.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import actors as tiny_actors
from tiny import pipelines

from diffinstruct.cluster.attach import check_fits
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.sweeps.points import grid
from diffinstruct.sweeps.tune import at_once, sweep

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def nodes(ray_environment):
    """Name -> id of the head and of the nodes that declare a resource of that name."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster()
    try:
        found = {"head": made.add_node(num_cpus=16, include_dashboard=False).node_id}  # draws whoever asks for a CPU alone
        found["trainer"] = made.add_node(num_cpus=3, resources={"trainer": 2}).node_id
        found["reward"] = made.add_node(num_cpus=3, resources={"reward": 1}).node_id
        ray.init(address=made.address, log_to_driver=False)
        yield found
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    (folder / "prompts.txt").write_text("a red thing\na blue thing\n")
    (folder / "tiny.yaml").write_text(f"""\
steps: 2
global_batch_size: 4
reference: {{model: {pipelines.build(folder / "tiny")}}}
generator: {{init_from: reference}}
rewards: {{trained: [{{name: "tiny.rewards:Red"}}], held_out: []}}
prompts: {{train: {folder / "prompts.txt"}, grid: {folder / "prompts.txt"}}}
logging: {{every: 1, grid_prompts: 1}}
overoptimization: {{every: 0}}
cluster: {{worker_resources: {{trainer: 1}}, rewards: {{placement: actor, resources: {{reward: 0.5}}}}}}
""")
    return folder / "tiny.yaml"


@pytest.mark.long
def test_each_process_of_a_sweep_runs_on_the_node_that_declares_what_it_asks_for(nodes, file, tmp_path):
    from diffinstruct.cluster.ray_private import state

    table = sweep(load(file), grid({"seed": [1, 2]}), tmp_path / "sweep", tiny_actors.whereabouts)
    assert table["step"].tolist() == [2, 2]
    assert table["examined_on"].tolist() == [int(nodes["trainer"][:8], 16)] * 2
    placed: dict[str, list[str]] = {}
    for actor in state.actor_table(None).values():
        placed.setdefault(actor["ActorClassName"], []).append(actor["Address"]["NodeID"])
    assert placed["RayTrainWorker"] == [nodes["trainer"]] * 2
    assert placed["RewardActor"] == [nodes["reward"]]
    assert {*placed.get("ImplicitFunc", [])} <= {nodes["head"]}  # a trial's own process; one that has ended may not be listed


@pytest.mark.parametrize(
    ("asked", "trials"),
    [
        ({}, 2),  # the trainer's places, not all CPUs
        ({"workers": 2}, 1),
        ({"worker_resources": {"trainer": 0.1}}, 20),
        ({"worker_resources": {"trainer": 0.1}, "cpus_per_worker": 3}, 7),  # 22 CPUs less one for the reward actor
        ({"worker_resources": {"reward": 0.1}}, 5),  # half is the actor's
    ],
)
def test_so_many_trials_at_once_as_have_their_resources(nodes, file, asked, trials):
    base = load(file).model_dump()
    experiment = Experiment.model_validate({**base, "cluster": {**base["cluster"], **asked}})
    assert at_once(experiment.cluster, experiment.reward_actors) == trials


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("worker_resources={trainr: 1}", r"asks for 1 trainr \(.* x 0\), Ray has 0, did you mean 'trainer'\?"),
        ("rewards.replicas=3", r"asks for 1.5 reward \(1 workers x 0 \+ 3 reward actors x 0.5\), Ray has 1"),
        ("workers=4", r"asks for 4 trainer \(4 workers x 1 \+ 1 reward actors x 0\), Ray has 2"),
        ("cpus_per_worker=4", r"no node has all that one training worker asks for \(4 CPU, 1 trainer\)"),
        ("rewards.resources={reward: 1, trainer: 1}",
         r"no node has all that .* actor asks for \(1 CPU, 1 reward, 1 trainer\)"),
    ],
)  # fmt: skip
def test_what_the_nodes_do_not_declare_is_said_before_the_start(nodes, file, override, said):
    with pytest.raises(UserError, match=rf"^cluster: {said}$"):
        experiment = load(file, [f"cluster.{override}"])
        check_fits(experiment.cluster, experiment.reward_actors)
    inside = load(file, ["cluster.rewards.placement=process", "cluster.rewards.resources={reward: 9}"])
    check_fits(inside.cluster, inside.reward_actors)
