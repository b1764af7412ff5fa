"""What every test has: one thread for torch, no network, no server or cluster of the person who runs them."""

import os
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

os.environ["OMP_NUM_THREADS"] = (
    "1"  # more would change sums; unset, tiny steps take three times as long. Ray inherits it
)
os.environ["HF_HUB_OFFLINE"] = "1"
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)

ROOT = Path(__file__).parents[1]


BUSY = {
    "RAY_raylet_start_wait_time_s": "300",
    "RAY_agent_register_timeout_ms": "300000",
    "RAY_worker_register_timeout_seconds": "300",
}
"""Ray gives a process 15 to 60 seconds to start; a busy machine is no failure."""

LONG = ("test_tune", "test_experiments", "test_train", "test_attach", "test_nodes", "test_reward_actors")


def pytest_collection_modifyitems(items):
    """Files that take minutes come first: `make test` has two processes, and neither is to wait for the other's last
    file."""
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))


@pytest.fixture(scope="module")
def session():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # by default Ray's workers stand back behind everything else, at 15
        # pytest's own path does not reach the workers; and what they import is to be this checkout.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "tests", ROOT / "platform", ROOT))))
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to start for each run
        for limit, value in BUSY.items():
            patch.setenv(limit, value)
        ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, experiment(**sections)) on the tiny pipeline."""
    from tiny import pipelines

    from diffinstruct.config.experiment import Experiment

    folder = tmp_path_factory.mktemp("world")
    pipelines.build(folder / "tiny")
    (folder / "prompts.txt").write_text("".join(f"a {colour} thing\n" for colour in ("red", "blue", "pale", "dark")))
    (folder / "broken.txt").write_text("a broken thing\n")

    def experiment(**changes):
        values = {
            "seed": 1, "steps": 2, "global_batch_size": 8, "reference.model": str(folder / "tiny"),
            "generator.init_from": "reference", "prompts.train": str(folder / "prompts.txt"),
            "prompts.grid": str(folder / "prompts.txt"), "objective.reward_scale": 10.0, "logging.every": 1,
            "logging.grid_every": 1000, "logging.grid_prompts": 2, "logging.checkpoint_every": 1,
            "rewards.trained": [{"name": f"tiny.rewards:{name}", "weight": w} for name, w in [("Red", 1.0), ("Broken", 0.5)]],
            "rewards.held_out": ["tiny.rewards:Calm"], "cluster.rewards.placement": "actor",
        }  # fmt: skip
        content = Experiment().model_dump()
        for key, value in (values | {key.replace("__", "."): value for key, value in changes.items()}).items():
            *sections, last = key.split(".")
            reduce(getitem, sections, content)[last] = value
        return Experiment.model_validate(content)

    return folder, experiment


def pytest_generate_tests(metafunc):
    """A test that asks for `family` runs for each of the tiny pipelines' families."""
    by_hand = any("family" in mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    if "family" in metafunc.fixturenames and not by_hand:
        from tiny.pipelines import FAMILIES

        metafunc.parametrize("family", list(FAMILIES), scope="module")


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    """The tiny pipeline of the family."""
    from tiny import pipelines

    return pipelines.build(tmp_path_factory.mktemp(family), family=family)
