"""Ray's private API, as far as it is used: each name exists and takes what it is given; nobody else imports it."""

from __future__ import annotations

import ast
import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray import tune
from ray._private.state import GlobalState  # this file says what ray_private.py may rely on
from ray.exceptions import OutOfMemoryError, WorkerCrashedError
from ray.train import WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining

from diffinstruct.cluster import ray_private
from diffinstruct.cluster.failures import NoSecondTry, final_error
from diffinstruct.errors import UserError

ROOT = Path(__file__).parents[2]
HOME = ROOT / "platform" / "diffinstruct" / "cluster" / "ray_private.py"
MAY_IMPORT = {HOME, ROOT / "tests" / "tiny" / "autoscaler.py", Path(__file__)}
PRIVATE = re.compile(r"ray\.(_private|train\.v2|autoscaler\._private|tune\.\w+\._\w+)\b")
SOURCES = [
    path
    for folder in ("platform", "reward_models", "experiments", "benchmarks", "tests")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if path not in MAY_IMPORT
]


def test_ray_is_the_version_that_its_private_api_was_read_in():
    requirement = re.search(r'"ray\[default,train,tune\]>=([\d.]+),<([\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert requirement
    installed, low, high = (tuple(map(int, text.split(".")[:2])) for text in (version("ray"), *requirement.groups()))
    assert low <= installed < high == (low[0], low[1] + 1)


@pytest.mark.parametrize(
    ("function", "arguments", "keywords"),
    [
        (GlobalState.actor_table, (None, "id", None, None), {}),
        (GlobalState.actor_table, (None, None), {}),
        (GlobalState._connect_and_get_accessor, (None,), {}),
        (GlobalState.get_max_resources_from_cluster_config, (None,), {}),
        (ray_private.get_dashboard_url, (), {}),
        *(
            (upload, ({},), {"include_gitignore": True, "scratch_dir": "folder", "logger": None})
            for upload in (ray_private.upload_py_modules_if_needed, ray_private.upload_working_dir_if_needed)
        ),
    ],
)
def test_functions_take_what_they_are_given(function, arguments, keywords):
    inspect.signature(function).bind(*arguments, **keywords)


def test_the_state_is_of_the_class_whose_methods_are_called():
    assert isinstance(ray_private.state, GlobalState)


def test_what_a_training_process_was_lost_by_is_told_and_too_much_memory_ends_the_run():
    """Train polls its workers, and says that a poll has failed."""
    killed = OutOfMemoryError("Task was killed due to the node running low on memory.\nMemory on the node (IP: 10.0.0.7) ...")
    lost = WorkerHealthCheckFailedError("A worker health check failed.", killed)
    assert ray_private.failure_of_poll(lost) is killed
    assert ray_private.failure_of_poll(WorkerCrashedError()) is None
    with pytest.raises(
        UserError, match=r"^out of memory on a machine, [^\n]*IP: 10.0.0.7[^\n]*; fewer cluster.workers [^\n]*$"
    ):
        NoSecondTry().after_exception(None, {1: lost})
    assert isinstance(final_error(WorkerGroupError("", {1: lost})), UserError)
    NoSecondTry().after_exception(None, {1: WorkerHealthCheckFailedError("", WorkerCrashedError())})


KILLED = """\
import time
import ray
from diffinstruct.cluster.ray_private import killed_for_memory
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
class Actor:
    def work(self):
        time.sleep(120)
actor = ray.remote(max_restarts=-1, max_task_retries=0)(Actor).remote()
assert killed_for_memory(actor) is None
try:
    ray.get(actor.work.remote())
except ray.exceptions.RayActorError as error:
    assert "memory" not in str(error)  # else Ray has come to say it itself
print(killed_for_memory(actor))
"""


def test_an_actor_that_the_memory_monitor_has_ended_is_told(ray_environment):
    """Of a Ray to which any use of memory is too much."""
    limits = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    done = subprocess.run([sys.executable, "-c", KILLED], env=os.environ | limits, capture_output=True, text=True)
    assert re.search(r"[Mm]emory on the node \(IP: .*\) was [\d.]+GB used / [\d.]+GB limit", done.stdout), done.stderr


def test_schedulers_say_what_they_count_and_change():
    assert ray_private.time_attribute(ASHAScheduler(time_attr="epoch"), "step") == "epoch"
    assert ray_private.time_attribute(SimpleNamespace(), "step") == "step"
    mutations = {"generator.learning_rate": tune.uniform(0, 1)}
    population = PopulationBasedTraining(
        time_attr="step", perturbation_interval=7, hyperparam_mutations=mutations, metric="score", mode="max"
    )
    assert ray_private.perturbation_interval(population) == 7
    assert ray_private.hyperparameter_mutations(population).keys() == mutations.keys()


def test_an_actor_has_a_state_and_a_number(session):
    actor = session.remote(num_cpus=0)(type("Idle", (), {"ready": lambda self: True})).remote()
    session.get(actor.ready.remote())
    assert ray_private.actor_process(actor) == ("ALIVE", 0)
    assert ray_private.autoscaler_limits() is None
    session.kill(actor)


def test_results_have_their_trials(session, tmp_path):
    results = tune.Tuner(
        lambda config: {"score": config["x"]},
        param_space={"x": tune.grid_search([1, 2])},
        run_config=tune.RunConfig(storage_path=str(tmp_path), verbose=0),
    ).fit()
    assert [trial.config for trial in ray_private.tune_trials(results)] == [result.config for result in results]


def test_nobody_else_uses_rays_private_api():
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(HOME.read_text()))
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    assert "_experiment_analysis" in attributes
    offences = []
    for path in SOURCES:
        source = path.read_text()
        offences += [f"{path}: {match[0]}" for match in PRIVATE.finditer(source)]
        if path.is_relative_to(ROOT / "platform"):
            offences += [
                f"{path}:{node.lineno}: {node.attr}"
                for node in ast.walk(ast.parse(source))
                if isinstance(node, ast.Attribute) and node.attr in attributes
            ]
    assert offences == []


@pytest.mark.parametrize(
    "line",
    [
        "from ray._private.state import state",
        "import ray.train.v2.api",
        "from ray.autoscaler._private.util import validate_config",
    ],
)
def test_a_planted_import_is_found(line):
    assert PRIVATE.search(line)
