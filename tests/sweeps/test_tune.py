"""Sweeps: tables of child runs, what ends them and goes on, schedulers and searches, studies with kept rows.

Ray as conftest.py starts it, once for several files.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import re
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler, PopulationBasedTraining
from tiny import rewards as tiny_rewards
from tiny.runs import agree, journal, starts

from diffinstruct.errors import UserError
from diffinstruct.reports.frames import TrialRows
from diffinstruct.run_folder.signals import Paused
from diffinstruct.sweeps import study as studies
from diffinstruct.sweeps.criterion import SelectionCriterion
from diffinstruct.sweeps.points import Optuna, changed, grid, random_points
from diffinstruct.sweeps.searchers import OptunaSearcher
from diffinstruct.sweeps.trials import Trials
from diffinstruct.sweeps.tune import SweepError, sweep
from diffinstruct.training import local

ANYWHERE = SelectionCriterion(floors={}, ceilings={})
WITHOUT_ACTORS = {"cluster__rewards__placement": "process"}
"""They take longer to start than a small trial; two tests here have them."""


def slow(world, **changes):
    """Rounds long enough for a scheduler to follow."""
    changes |= WITHOUT_ACTORS | {"rewards__trained": [{"name": "tiny.rewards:Slow", "weight": 1.0}]}
    return world[1](overoptimization__every=5, logging__every=5, logging__checkpoint_every=5, **changes)


def test_a_grid_takes_numpys_values():
    points = grid({"objective.reward_scale": np.linspace(0, 1, 3), "seed": np.arange(2)})
    assert points[-1] == {"objective.reward_scale": 1.0, "seed": 1} and len(points) == 6
    assert all(type(value) in (int, float) for point in points for value in point.values())
    with pytest.raises(UserError, match="seed: a grid takes a list of values, got 3"):
        grid(cast(Any, {"seed": 3}))


def test_a_sweep_is_a_table_of_child_runs_and_tells_of_a_failed_one(session, world, tmp_path, capfd):
    from mlflow import MlflowClient

    rows: list[dict] = []
    with pytest.raises(SweepError, match=r"^\{'generator.timestep': 5000\}: generator.timestep: got 5000, [^\n]*$"):
        points = grid({"generator.timestep": [600, 5000]})
        sweep(world[1](), points, tmp_path / "sweep", tiny_rewards.steps_done, lambda i, row: rows.append(row))
    good = changed(world[1](), {"generator.timestep": 600}).config_hash
    table = pd.read_csv(tmp_path / "sweep" / "table.csv")
    assert rows == table.to_dict("records") and rows[0]["examined"] == 2
    assert table["generator.timestep"].tolist() == [600] and table["step"].tolist() == [2]
    assert table["x0_gap"].tolist() == [journal(tmp_path / "sweep" / good)[0][2]["x0_gap"]]

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])
    parent = next(run for run in runs if run.info.run_name == "sweep")
    child = next(run for run in runs if run.info.run_name == "timestep=600")
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert (parent.info.status, child.info.status) == ("FAILED", "FINISHED")
    assert child.data.metrics["eval/examined"] == 2
    assert child.data.tags["diffinstruct.experiment_id"] == good and "got 5000" in parent.data.tags["reason"]
    assert "table.csv" in [file.path for file in client.list_artifacts(parent.info.run_id)]
    shown = capfd.readouterr().out
    assert " done  {'generator.timestep': 600}" in shown and " failed  {'generator.timestep': 5000}" in shown

    again = sweep(world[1](), points[:1], tmp_path / "sweep", tiny_rewards.steps_done)
    assert again.to_dict("records") == rows
    assert starts(tmp_path / "sweep" / good) == 1  # it had finished: nothing to do
    assert client.get_run(parent.info.run_id).info.status == "FINISHED"  # the same parent, which has not failed any more


def test_what_tune_writes_down_holds_no_password(world, tmp_path):
    base = world[1]().tracked_at("http://me:hunter2@host")
    trials = Trials(base, grid({"seed": [1]}), tmp_path, None)
    assert trials.experiment(0).tracking.uri == "http://me:hunter2@host"
    assert b"hunter2" not in pickle.dumps(trials)


def test_a_trial_is_named_by_what_tells_it_from_the_others(world, tmp_path):
    several = grid({"objective.name": ["diff_instruct_pp"], "objective.reward_scale": [1.0, 2.0], "seed": [0, 1]})
    space = Optuna({"objective.reward_scale": tune.loguniform(1, 2)}, trials=1)
    names = [Trials(world[1](), points, tmp_path, None).name(several[-1]) for points in (several, several[:1], space)]
    assert names == ["reward_scale=2.0 seed=1", "objective=diff_instruct_pp reward_scale=2.0 seed=1", "reward_scale=2.0"]


@pytest.mark.long
def test_a_sweep_that_was_ended_is_finished_by_the_same_call(session, world, tmp_path, capfd):
    """SIGTERM (`ray job stop`) saves first, so that no step is done twice; Ctrl-C goes back to the last checkpoint."""
    from mlflow import MlflowClient

    base = world[1](steps=100, logging__checkpoint_every=10, **WITHOUT_ACTORS)
    points = grid({"generator.timestep": [500]})
    folder = tmp_path / "sweep" / changed(base, points[0]).config_hash
    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")

    def tracked():
        return client.search_runs([client.get_experiment_by_name("diffinstruct").experiment_id])

    def newest():
        return max((int(path.name[5:]) for path in (folder / "checkpoints").glob("step-" + 8 * "[0-9]")), default=0)

    def interrupt(number, after):
        while newest() <= after:
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    for life, (number, error) in enumerate([(signal.SIGTERM, Paused), (signal.SIGINT, KeyboardInterrupt)]):
        interrupter = threading.Thread(target=interrupt, args=(number, newest()), daemon=True)
        interrupter.start()
        with pytest.raises(error):
            sweep(base, points, tmp_path / "sweep")
        interrupter.join(1)
        assert f"{('paused', 'interrupted')[life]}: 1 of 1 trials are unfinished" in capfd.readouterr().out
        assert {run.info.status for run in tracked()} == {"KILLED"} and len(tracked()) == 2
        if life == 0:
            assert newest() == max(journal(folder)[0])

    table = sweep(base, points, tmp_path / "sweep")
    assert table["step"].tolist() == [100] and starts(folder) == 3
    assert {run.info.status for run in tracked()} == {"FINISHED"} and len(tracked()) == 2
    local.run(changed(base, points[0]), tmp_path / "local")
    agree(folder, tmp_path / "local")


@pytest.mark.long
def test_a_scheduler_ends_trials_that_are_behind_as_finished_runs(session, world, tmp_path):
    """One after the other, the best first; so the second comes to a rung where it is behind. A second life tells the
    scheduler of those that have ended, runs none of them, and the table is the same."""
    base = slow(world, steps=30, cluster__cpus_per_worker=5)  # of 8; a killed trial's place is not freed without a dashboard
    points = grid({"objective.reward_scale": [10.0, 0.2]})

    def halving():
        return ASHAScheduler(time_attr="step", max_t=30, grace_period=5, reduction_factor=2)

    table = sweep(base, points, tmp_path / "sweep", scheduler=halving(), criterion=ANYWHERE)
    assert table["step"].max() == 30 and table["step"].min() < 30
    early = table[table["step"] < 30].iloc[0]
    assert (Path(early["run"]) / "export" / "model_index.json").exists() and journal(Path(early["run"]))[1] == ["FINISHED"]
    assert json.loads((Path(early["run"]) / "metrics.json").read_text())["step"] == early["step"]

    (Path(early["run"]) / "metrics.json").unlink()  # as if it had been killed just before its end
    again = sweep(base, points, tmp_path / "sweep", scheduler=halving(), criterion=ANYWHERE)
    pd.testing.assert_frame_equal(again, table)
    assert [starts(Path(run)) for run in table["run"]] == [1 + (run == early["run"]) for run in table["run"]]


def test_optuna_asks_for_the_same_points_in_a_second_life(world, tmp_path):
    """One trial at a time, simulated: what it asks for next depends on what was told, not on who is asking."""
    space = {"objective.reward_scale": tune.loguniform(0.1, 100), "objective.distance_args.c": tune.choice([0.03, 0.1])}
    criterion = SelectionCriterion(maximize="held", minimize="kid", floors={"diversity": 4.0}, ceilings={})

    def life(folder, until, trials=14):
        searches = Trials(world[1](), Optuna(space, trials, seed=7), folder, None)
        searches.open(keeps=True)
        asking = OptunaSearcher(searches, criterion)
        while (found := asking.suggest(f"tune-{len(searches.known)}")) != "FINISHED":
            i, scale = found["trial"], found["objective.reward_scale"]
            figures = {"held": -abs(math.log(scale / 5)), "kid": scale, "diversity": 3.0 if scale > 30 else 5.0}
            searches.run_folder(i).mkdir()
            (searches.run_folder(i) / "metrics.json").write_text(json.dumps(figures))
            if i == until:  # it has ended and nobody was told: the driver died
                break
            asking.on_trial_complete(next(name for name, number in asking.numbers.items() if number == i), figures)
        return [searches.point(i) for i in sorted(searches.known)]

    whole = life(tmp_path / "whole", until=None)
    assert len(whole) == 14 and len({point["objective.reward_scale"] for point in whole}) == 14
    assert life(tmp_path / "parts", until=11) == whole[:12]
    assert life(tmp_path / "parts", until=None) == whole
    longer = life(tmp_path / "parts", until=None, trials=16)
    assert longer[:14] == whole and len(longer) == 16


@pytest.mark.long
def test_optuna_and_the_aim_through_tune(session, world, tmp_path):
    table = sweep(
        world[1](steps=4, overoptimization__every=2),
        Optuna({"objective.reward_scale": tune.loguniform(0.1, 100)}, trials=2), tmp_path / "sweep",
    )  # fmt: skip
    assert table["step"].tolist() == [4, 4] and table["objective.reward_scale"].nunique() == 2


def test_what_the_aim_cannot_see_is_refused(world, tmp_path):
    points = [{"seed": 1}]
    for base, scheduler, message in [
        (world[1](overoptimization__every=0), ASHAScheduler(time_attr="step"),
         "overoptimization.every: is 0, but the sweep looks at overoptimization/held_out"),
        (world[1](rewards__held_out=[]), ASHAScheduler(time_attr="step"),
         "rewards.held_out: is empty, but the sweep looks"),
        (world[1](), ASHAScheduler(), 'scheduler: time_attr should be "step", got \'training_iteration\''),
        (world[1](logging__checkpoint_every=9),
         PopulationBasedTraining(time_attr="step", perturbation_interval=5, hyperparam_mutations={"seed": [1, 2]}),
         "logging.checkpoint_every: 9 steps, more than the scheduler's perturbation_interval, 5"),
    ]:  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            sweep(base, points, tmp_path, scheduler=scheduler)


POPULATION = {"time_attr": "step", "perturbation_interval": 5}
SCALE = "objective.reward_scale"


@pytest.mark.parametrize(
    ("points", "more", "message"),
    [
        (lambda: grid({SCALE: 2.0}), {}, f"{SCALE}: a grid takes a list of values, got 2.0"),  # type: ignore[dict-item]
        (lambda: grid({"prompts.train": "my.csv"}), {}, "prompts.train: a grid takes a list of values, got 'my.csv'"),
        (lambda: grid({"prompts.train": ["nowhere.csv"]}), {}, "prompts.train: nowhere.csv: no such file"),
        (lambda: grid({"seed": []}), {}, "sweep: should have one trial or more, got 0"),
        (lambda: grid({"output_dir": ["a", "b"]}), {}, "output_dir: cannot be varied, all trials of a sweep share it"),
        (lambda: grid({"mirror": ["s3://a", None]}), {}, "mirror: cannot be varied, all trials of a sweep share it"),
        (lambda: grid({"tracking": [{}]}), {}, "tracking: cannot be varied, all trials of a sweep share it"),
        (lambda: grid({"generator.start": ["a"]}), {}, "generator.start: unknown key, it is now 'generator.init_from'"),
        (lambda: grid({"cluster.workers": [1]}), {}, "cluster.workers: is the same in all trials of a sweep"),
        (lambda: ["seed"], {}, "sweep: point 0 should be a mapping of dotted keys, got 'seed'"),
        (lambda: random_points({"seed": [1, 2]}, 3), {}, "seed: should be a domain of Tune's, as tune.uniform(0, 1)"),
        (lambda: random_points({"seed": tune.randint(0, 2)}, 3), {}, "sample: asked for 3 points, found 2 that differ"),
        (lambda: Optuna({SCALE: [1, 2]}, 3), {}, f"{SCALE}: should be a domain of Tune's"),
        (lambda: Optuna({"objective.reward_scal": tune.uniform(0, 1)}, 3), {},
         "objective.reward_scal: unknown key, did you mean 'objective.reward_scale'?"),
        (lambda: Optuna({"generator.learning_rate": tune.uniform(-2, -1)}, 3), {}, "generator.learning_rate: "),
        (lambda: Optuna({"rewards.held_out": tune.choice([[]])}, 3), {},
         "rewards: which rewards there are is the same"),
        (lambda: Optuna({SCALE: tune.uniform(0, 1)}, 0), {}, "sweep: should have one trial or more, got 0"),
        (lambda: [{"seed": 1}],
         {"scheduler": PopulationBasedTraining(hyperparam_mutations={SCALE: [1, 2]}, **POPULATION)},
         "scheduler: it changes objective.reward_scale, which the points do not"),
        (lambda: [{SCALE: 1.0}],
         {"scheduler": PopulationBasedTraining(hyperparam_mutations={SCALE: [-1, -2]}, **POPULATION)},
         f"{SCALE}: "),
        (lambda: [{"seed": 1}],
         {"scheduler": ASHAScheduler(time_attr="step"), "criterion": SelectionCriterion(maximize="overoptimization/heldout")},
         "criterion: the over-optimization monitor has no metric 'overoptimization/heldout', did you mean 'over"),
    ],
)  # fmt: skip
def test_what_cannot_be_swept_is_said_before_anything_starts(points, more, message, world, tmp_path):
    with pytest.raises(UserError, match=f"^{re.escape(message)}[^\n]*$"):
        sweep(world[1](), points(), tmp_path / "sweep", **more)
    assert not (tmp_path / "sweep").exists()


def test_values_that_go_together_are_no_mistake(world, tmp_path):
    """Neither range is good with the base's other value."""
    space = {"objective.t_min": tune.randint(985, 990), "objective.t_max": tune.randint(991, 999)}
    assert Trials(world[1](), Optuna(space, 2), tmp_path, None).count == 2


@pytest.mark.long
def test_a_trial_without_the_metric_that_is_looked_for_has_failed(session, world, tmp_path):
    with pytest.raises(SweepError, match=r": criterion: no metric 'reward/hpsv2.1' came of this trial$"):
        sweep(
            world[1](overoptimization__every=1, **WITHOUT_ACTORS), [{"seed": 1}], tmp_path / "sweep",
            scheduler=ASHAScheduler(time_attr="step"), criterion=SelectionCriterion(maximize="reward/hpsv2.1"),
        )  # fmt: skip


def test_a_trial_out_of_bounds_cannot_win():
    criterion = SelectionCriterion()
    good = {"overoptimization/held_out": 0.5, "overoptimization/variety": 0.8, "overoptimization/distance": 1.2}
    assert criterion.score(good) == 0.5 and criterion.broken_bound(good) is None
    assert (
        criterion.score(good | {"overoptimization/held_out": 9.0, "overoptimization/variety": 0.3})
        < -9
        < criterion.score(good | {"overoptimization/held_out": -8.0})
    )
    assert criterion.broken_bound(good | {"overoptimization/variety": 0.3}) == "overoptimization/variety 0.3, at least 0.4"
    assert criterion.broken_bound(good | {"overoptimization/distance": 3.5}) == "overoptimization/distance 3.5, at most 3"
    start = {"overoptimization/held_out": 0.0, "overoptimization/variety": 1.0}  # no distance yet
    assert criterion.score(start) == 0.0


def test_points_by_chance_are_the_same_for_the_same_seed():
    space = {"objective.reward_scale": tune.loguniform(0.1, 10), "seed": tune.randint(0, 100)}
    assert random_points(space, 5, seed=3) == random_points(space, 5, seed=3) != random_points(space, 5, seed=4)
    assert all(0.1 <= point["objective.reward_scale"] <= 10 for point in random_points(space, 50))


@pytest.mark.long
def test_trials_that_have_a_row_are_not_run_again_wherever_it_came_from(session, world, tmp_path):
    """A budget of one trial at a time; then the rows alone, in another folder, are enough, also for another study's
    arms."""
    arms = {"early": {"generator.timestep": 500}, "late": {"generator.timestep": 600}}
    rows = TrialRows(tmp_path / "rows.csv")

    def complete(folder, most=None, arms=arms):
        return studies.run_missing_trials(
            rows, world[1](**WITHOUT_ACTORS), arms, (3,), tmp_path / folder, tiny_rewards.steps_done, most
        )

    assert complete("sweep", most=1) is None
    assert rows.read()["trial"].tolist() == ["generator.timestep=500 seed=3"]
    frame = complete("sweep")
    assert frame["arm"].tolist() == ["early", "late"] and frame["seed"].tolist() == [3, 3]
    assert frame["examined"].tolist() == [2, 2] and frame["x0_gap"].nunique() == 2
    assert complete("elsewhere").equals(frame)
    other = complete("elsewhere", arms={"again": arms["late"], "and again": arms["late"]})
    assert other["arm"].tolist() == ["again", "and again"] and other["x0_gap"].tolist() == [frame["x0_gap"][1]] * 2
    assert not (tmp_path / "elsewhere").exists()


def test_a_study_whose_rows_are_all_there_answers_at_once(tmp_path, monkeypatch, capsys):
    """Nothing is run, and the table is printed and kept where the runs would have been."""
    monkeypatch.setattr(studies, "sweep", None)
    (tmp_path / "recipe.yaml").write_text(f"name: mine\noutput_dir: {tmp_path / 'runs'}\n")
    rows = TrialRows(tmp_path / "rows.csv")
    for t in (500, 600):
        for seed in (0, 1):
            rows.add(f"generator.timestep={t} seed={seed}", {"generator.timestep": t, "seed": seed, "kid": t + seed})
    study = studies.Study(
        name="when", question="?", recipe=tmp_path / "recipe.yaml", seeds=(0, 1), measures={"kid": "KID"},
        rows=rows.path,
        arms={"early": {"generator.timestep": 500}, "late": {"generator.timestep": 600}},
        evaluate=tiny_rewards.steps_done,
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
            sweep(world[1](), [{key: value}], tmp_path)
    with pytest.raises(UserError, match=r"two trials have the same configuration, the second is \{'seed': 2\}"):
        sweep(world[1](), [{"seed": 2}, {}, {"seed": 2}], tmp_path)
    with pytest.raises(UserError, match=r"objective.reward_scale: .*greater than or equal to 0, got -1"):
        changed(world[1](), {"objective.reward_scale": -1.0})


@pytest.mark.long
def test_a_population_takes_over_weights_and_keeps_its_lineage(session, world, tmp_path):
    """The worse of two goes on with the other's weights, under a configuration and in a run of its own. The last of
    this file,
    in a Ray with room: Tune kills who is taken over, and without a dashboard the place of a killed one is never free
    again."""
    session.shutdown()
    session.init(address="local", num_cpus=10, include_dashboard=False, log_to_driver=False, object_store_memory=10**8)
    base = slow(world, steps=30)
    points = grid({"objective.reward_scale": [0.01, 10.0]})
    scheduler = PopulationBasedTraining(
        time_attr="step", perturbation_interval=10, quantile_fraction=0.5,
        hyperparam_mutations={"objective.reward_scale": tune.loguniform(1, 20)},
    )  # fmt: skip
    table = sweep(base, points, tmp_path / "sweep", scheduler=scheduler, criterion=ANYWHERE)
    assert table["step"].tolist() == [30, 30]
    _, *takeovers = [json.loads(line) for line in (tmp_path / "sweep" / "trials.jsonl").read_text().splitlines()]
    last = takeovers[-1]
    row = table.iloc[last["trial"]]
    run = tmp_path / "sweep" / last["run"]
    assert row["run"] == str(run) and row["objective.reward_scale"] == last["point"]["objective.reward_scale"]
    for after in takeovers:  # what was before is in the other's journal
        assert min(journal(tmp_path / "sweep" / after["run"])[0], default=10) >= 10
    (before,) = (
        record["reason"]
        for path in (tmp_path / "sweep").glob("*/journal.jsonl")
        for record in map(json.loads, filter(None, path.read_text().splitlines()))
        if last["run"] in (record.get("reason") or "")
    )
    assert "with the weights of" in before
    with pytest.raises(UserError, match=r"trials.jsonl: is of another search; this one needs a folder of its own$"):
        sweep(base, points[:1], tmp_path / "sweep", scheduler=scheduler)
