"""On Ray: workers against `local.py`, what dies and comes back, a sweep. (The actors themselves: test_reward_actors.py.)

One Ray session for the module, one pair of reward actors for most of it.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import tiny
import tiny_rewards

from diffinstruct import local
from diffinstruct.checkpoint import CheckpointStore
from diffinstruct.cluster import rewards as actors
from diffinstruct.cluster import study as studies
from diffinstruct.cluster import sweep as sweeps
from diffinstruct.cluster import train as cluster
from diffinstruct.experiment import Experiment, UserError
from diffinstruct.results import Rows
from diffinstruct.rewards import RewardError

ROOT = Path(__file__).parents[1]
SAME = 1e-6


@pytest.fixture(scope="module")
def session():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_worker_niceness", "0")  # by default Ray's workers stand back behind everything else, at 15
        # pytest's own path does not reach the workers; and what they import is to be this checkout.
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT / "tests", ROOT / "platform", ROOT))))
        patch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less to start for each run
        ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
        yield ray
        ray.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(folder, experiment(**sections)) on the tiny pipeline."""
    folder = tmp_path_factory.mktemp("world")
    tiny.build(folder / "tiny")
    (folder / "prompts.txt").write_text("".join(f"a {colour} thing\n" for colour in ("red", "blue", "pale", "dark")))
    (folder / "broken.txt").write_text("a broken thing\n")

    def experiment(**changes):
        values = {
            "seed": 1, "steps": 2, "global_batch_size": 8, "reference.model": str(folder / "tiny"),
            "generator.start": "reference", "prompts.train": str(folder / "prompts.txt"),
            "prompts.grid": str(folder / "prompts.txt"), "objective.reward_scale": 10.0, "logging.every": 1,
            "logging.grid_every": 1000, "logging.grid_prompts": 2, "logging.checkpoint_every": 1,
            "rewards.trained": [{"name": f"tiny_rewards:{name}", "weight": w} for name, w in [("Red", 1.0), ("Broken", 0.5)]],
            "rewards.held_out": ["tiny_rewards:Calm"], "cluster.reward_place": "actor",
        }  # fmt: skip
        content = Experiment().model_dump()
        for key, value in (values | {key.replace("__", "."): value for key, value in changes.items()}).items():
            *section, last = key.split(".")
            (content[section[0]] if section else content)[last] = value
        return Experiment.model_validate(content)

    return folder, experiment


@pytest.fixture(scope="module")
def pool(session, world):
    with actors.reward_pool(world[1](cluster__reward_replicas=2)) as pool:
        yield pool


def journal(folder):
    """Metrics by step, and how the run ended."""
    records = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines() if line]
    metrics: dict[int, dict] = {}
    for record in records:
        if "metrics" in record:
            metrics.setdefault(record["step"], {}).update(record["metrics"])
    return metrics, [record["finish"] for record in records if "finish" in record]


def agree(folder, other, rel=SAME):
    """Every number of two runs but the times."""
    ours, theirs = journal(folder)[0], journal(other)[0]
    assert ours.keys() == theirs.keys() and ours
    for step, metrics in ours.items():
        numbers = {key: value for key, value in metrics.items() if not key.startswith(("time/", "throughput/"))}
        assert numbers == pytest.approx({key: theirs[step][key] for key in numbers}, rel=rel, abs=rel), f"step {step}"


def starts(folder):
    return sum(line.startswith("run ") for line in (folder / "output.txt").read_text().splitlines())


# -------------------------------------------------------------------------------------------------- training
def test_one_worker_gives_the_numbers_of_local(pool, world, tmp_path):
    experiment = world[1](steps=20)
    expected = local.run(experiment, tmp_path / "local")
    result = cluster.fit(experiment, tmp_path / "ray", pool, "ray somewhere")
    agree(tmp_path / "ray", tmp_path / "local")
    assert [*journal(tmp_path / "ray")[0]] == [*range(21)]  # the watch has looked at the start, too
    assert result.folder == tmp_path / "ray" and (result.export / "model_index.json").exists()
    assert result.metrics["divergence"] == pytest.approx(expected.metrics["divergence"], rel=SAME)
    assert "ray somewhere" in (tmp_path / "ray" / "output.txt").read_text().splitlines()[0]


def test_two_workers_with_half_the_batch_each_have_the_gradient_of_one(pool, world, tmp_path):
    """beta_1 is 0: the first moment that Adam keeps is the gradient itself. The players stand still, because Adam makes a
    whole step of a gradient that is 0 but for rounding, and the order of sums is another with two workers."""
    still = {"generator__learning_rate": 1e-12, "score_network__learning_rate": 1e-12}
    local.run(world[1](**still), tmp_path / "local")
    cluster.fit(world[1](**still, cluster__workers=2), tmp_path / "ray", pool, "")
    agree(tmp_path / "ray", tmp_path / "local", rel=1e-4)  # a worker counted twice or not at all would show at 0.5
    (_, one), (_, two) = (CheckpointStore(tmp_path / run / "checkpoints").latest() for run in ("local", "ray"))
    for player in ("generator_optimizer", "score_optimizer"):
        whole, halves = (state["players"][player]["state"] for state in (one, two))
        assert len(whole) > 20
        norms = [of["exp_avg"].norm() for of in whole.values()]
        for i, norm in zip(whole, norms, strict=True):
            assert (whole[i]["exp_avg"] - halves[i]["exp_avg"]).norm() <= 1e-4 * norm + 1e-6 * max(norms)


def test_a_killed_worker_goes_on_from_the_checkpoint(session, world, tmp_path, capfd):
    """The whole way through `run`: its own reward actor, its lines in the terminal, and the numbers of an unbroken run."""
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
    cluster.run(experiment, folder)
    killer.join(1)
    assert starts(folder) == 2
    agree(folder, tmp_path / "local")
    assert journal(folder)[1] == ["FINISHED"]
    shown = capfd.readouterr().out.splitlines()
    assert any(line.startswith("step 30/30") for line in shown)
    assert "ray " in next(line for line in shown if line.startswith(f"done: run {folder}"))


def test_an_error_that_would_come_again_is_not_tried_again(pool, world, tmp_path):
    experiment = world[1](prompts__train=str(world[0] / "broken.txt"))
    with pytest.raises(RewardError, match=r"^reward tiny_rewards:Broken: 8 of 8 scores are not finite$"):
        cluster.fit(experiment, tmp_path, pool, "")
    assert starts(tmp_path) == 1
    assert journal(tmp_path)[1][-1] == "FAILED"


def test_what_does_not_fit_the_cluster_is_said_in_one_line(session, world):
    with pytest.raises(UserError, match=r"^cluster: asks for 9 CPUs \(4 workers x 2 \+ 1 reward actors x 1\), Ray has 5$"):
        cluster.check_fits(world[1](cluster__workers=4, cluster__cpus_per_worker=2))


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("http://127.0.0.1:8265", r"^RAY_ADDRESS: http://127.0.0.1:8265 is for `ray job submit`; [^\n]*$"),
        ("127.0.0.1:9", r"^RAY_ADDRESS: no Ray at 127.0.0.1:9: [^\n]*refused$"),
    ],
)
def test_a_ray_address_that_is_none_is_said_at_once(address, said, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError, match=said), cluster.attached():
        pass


# ----------------------------------------------------------------------------------------------------- sweep
def test_a_sweep_is_a_table_of_child_runs_and_tells_of_a_failed_one(session, world, tmp_path, capfd):
    from mlflow import MlflowClient

    rows: list[dict] = []
    with pytest.raises(sweeps.SweepError, match=r"^\{'generator.timestep': 5000\}: generator.timestep: got 5000, [^\n]*$"):
        points = sweeps.grid({"generator.timestep": [600, 5000]})
        sweeps.sweep(world[1](), points, tmp_path / "sweep", tiny_rewards.steps_done, lambda i, row: rows.append(row))
    good = sweeps.changed(world[1](), {"generator.timestep": 600}).derived_id
    table = sweeps.table([{"generator.timestep": 600}], [tmp_path / "sweep" / good])
    assert rows == table.to_dict("records") and rows[0]["examined"] == 2
    assert table["generator.timestep"].tolist() == [600] and table["step"].tolist() == [2]
    assert table["divergence"].tolist() == [journal(tmp_path / "sweep" / good)[0][2]["divergence"]]

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "sweep")
    child = next(run for run in runs if run.info.run_name == good)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FAILED", "FINISHED")
    shown = capfd.readouterr().out
    assert " done  {'generator.timestep': 600}" in shown and " failed  {'generator.timestep': 5000}" in shown

    again = sweeps.sweep(world[1](), points[:1], tmp_path / "sweep", tiny_rewards.steps_done)
    assert again.to_dict("records") == rows
    assert starts(tmp_path / "sweep" / good) == 1  # it had finished: nothing to do


def test_ctrl_c_ends_a_sweep_that_the_same_call_finishes(session, world, tmp_path, capfd):
    from mlflow import MlflowClient

    base, points = world[1](steps=200, logging__checkpoint_every=20), sweeps.grid({"generator.timestep": [500]})
    folder = tmp_path / "sweep" / sweeps.changed(base, points[0]).derived_id

    def interrupt():
        while not (folder / "checkpoints" / "step-00000020").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    interrupter = threading.Thread(target=interrupt, daemon=True)
    interrupter.start()
    with pytest.raises(KeyboardInterrupt):
        sweeps.sweep(base, points, tmp_path / "sweep")
    interrupter.join(1)
    assert "interrupted: 1 of 1 trials are unfinished" in capfd.readouterr().out
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    assert {run.info.status for run in runs} == {"KILLED"} and len(runs) == 2

    table = sweeps.sweep(base, points, tmp_path / "sweep")
    assert table["step"].tolist() == [200] and starts(folder) == 2
    local.run(sweeps.changed(base, points[0]), tmp_path / "local")
    agree(folder, tmp_path / "local")


def test_trials_that_have_a_row_are_not_run_again_wherever_it_came_from(session, world, tmp_path):
    """A budget of one trial at a time; then the rows alone, in another folder, are enough, also for another study's arms."""
    arms = {"early": {"generator.timestep": 500}, "late": {"generator.timestep": 600}}
    rows = Rows(tmp_path / "rows.csv")

    def complete(folder, most=None, arms=arms):
        return studies.complete(rows, world[1](), arms, (3,), tmp_path / folder, tiny_rewards.steps_done, most)

    assert complete("sweep", most=1) is None
    assert rows.read()["trial"].tolist() == ["generator.timestep=500 seed=3"]
    frame = complete("sweep")
    assert frame["arm"].tolist() == ["early", "late"] and frame["seed"].tolist() == [3, 3]
    assert frame["examined"].tolist() == [2, 2] and frame["divergence"].nunique() == 2
    assert complete("elsewhere").equals(frame)
    other = complete("elsewhere", arms={"again": arms["late"], "and again": arms["late"]})
    assert other["arm"].tolist() == ["again", "and again"] and other["divergence"].tolist() == [frame["divergence"][1]] * 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_study_whose_rows_are_all_there_answers_at_once(tmp_path, monkeypatch, capsys):
    """Nothing is run, and the table is printed and kept where the runs would have been."""
    monkeypatch.setattr(studies, "sweep", None)
    (tmp_path / "recipe.yaml").write_text(f"name: mine\nruns: {tmp_path / 'runs'}\n")
    rows = Rows(tmp_path / "rows.csv")
    for t in (500, 600):
        for seed in (0, 1):
            rows.add(f"generator.timestep={t} seed={seed}", {"generator.timestep": t, "seed": seed, "kid": t + seed})
    study = studies.Study(
        name="when", question="?", recipe=tmp_path / "recipe.yaml", seeds=(0, 1), measures={"kid": "KID"}, rows=rows.path,
        arms={"early": {"generator.timestep": 500}, "late": {"generator.timestep": 600}}, examine=tiny_rewards.steps_done,
    )  # fmt: skip
    answer = study.answer()
    assert answer.table["late"]["kid"].value == 600.5 and answer.table["late"]["kid"].n == 2
    answer.say("- more")
    written = (tmp_path / "runs" / "mine" / "when.md").read_text()
    assert written in capsys.readouterr().out and "| late | 600 [594, 607] |" in written and written.endswith("- more\n")
    rows.path.write_text(rows.path.read_text().rstrip("\n").rpartition(",")[0] + "\n")  # a torn last line
    with pytest.raises(UserError, match=r"rows.csv: no kid for generator.timestep=600 seed=1; take that row out"):
        study.answer()
    missing = replace(study, seeds=(0, 1, 2))
    assert missing.answer(most=0) is None
    assert "4 of 6 trials are there\ntrials are missing" in capsys.readouterr().out


def test_a_sweep_refuses_what_it_cannot_vary(world, tmp_path):
    for key, value, message in [
        ("objective.reward_scal", 1.0, "did you mean 'objective.reward_scale'"),
        ("cluster.workers", 2, "cluster.workers: is the same in all trials of a sweep, because they share"),
        ("rewards.held_out", [], "rewards: which rewards there are is the same in all trials of a sweep, because they share"),
    ]:
        with pytest.raises(UserError, match=message):
            sweeps.sweep(world[1](), [{key: value}], tmp_path)
    with pytest.raises(UserError, match=r"two trials have the same configuration, the second is \{'seed': 2\}"):
        sweeps.sweep(world[1](), [{"seed": 2}, {}, {"seed": 2}], tmp_path)
    with pytest.raises(UserError, match=r"objective.reward_scale: .*greater than or equal to 0, got -1"):
        sweeps.changed(world[1](), {"objective.reward_scale": -1.0})
