"""Rows that outlive their machine, and figures over training seeds."""

import math
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import sweeps as tiny_sweep

from diffinstruct.errors import UserError
from diffinstruct.reports.frames import (
    Measures,
    TrialRows,
    described,
    flat,
    learning_curves,
    load_sweep,
    measures,
    pareto_front,
    points,
    ran_with,
    renamed,
    reward_gap,
    swept,
)
from diffinstruct.statistics import Estimate, at_distance, by_seed, over_seeds, paired_by_seed, seed_noise
from diffinstruct.tracking.journal import Journal
from diffinstruct.tracking.records import read_journal

ROOT = Path(__file__).parents[2]


def test_rows_are_kept_and_what_is_missing_is_known(tmp_path):
    rows = TrialRows(tmp_path / "results" / "rows.csv")
    assert rows.missing(["a", "b"]) == ["a", "b"]
    rows.add("b", {"arm": "x", "seed": 1, "kid": 1 / 3})
    assert TrialRows(rows.path).missing(["a", "b"]) == ["a"]
    rows.add("a", {"arm": "x", "seed": 0, "kid": 2.0, "new": 5})  # a later row may know more
    frame = TrialRows(rows.path).read()
    assert frame["trial"].tolist() == ["b", "a"] and frame["kid"].tolist() == pytest.approx([1 / 3, 2.0], rel=1e-5)
    assert math.isnan(frame["new"][0]) and frame["commit"].notna().all() and frame["at"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    assert [path.name for path in rows.path.parent.iterdir() if path.suffix != ".lock"] == ["rows.csv"]


def test_studies_side_by_side_lose_no_row(tmp_path, monkeypatch):
    rows, reading = TrialRows(tmp_path / "rows.csv"), TrialRows.read

    def slowly(self):  # so that everybody has read before anybody has written, unless they wait for each other
        frame = reading(self)
        time.sleep(0.05)
        return frame

    monkeypatch.setattr(TrialRows, "read", slowly)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: TrialRows(rows.path).add(f"trial {i}", {"kid": i}), range(8)))
    assert sorted(rows.read()["trial"]) == [f"trial {i}" for i in range(8)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "No columns to parse from file"),
        ("arm,kid\nx,1\n", "no column 'trial'"),
        ("trial,kid\na,1\nb,2\na,3\n", "has a trial twice: a"),
        ("trial,kid\na,1,2\nb,2,3,4\n", "Error tokenizing data"),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, text, said):
    (tmp_path / "rows.csv").write_text(text)
    with pytest.raises(UserError, match=rf"^{tmp_path}/rows.csv: {said}[^\n]*$"):
        TrialRows(tmp_path / "rows.csv").missing(["a"])


def test_a_run_names_the_commits_of_its_code_and_rows_alone_do_not_make_one_dirty(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, "-C", str(tmp_path), *command], check=True, capture_output=True, text=True).stdout

    def started():
        Journal(f"sqlite:///{tmp_path}/mlflow.db", "x", "run", tmp_path / "run", {}, {}).finish()
        return ran_with(read_journal(tmp_path / "run"))

    code, rows = tmp_path / "platform" / "code.py", TrialRows(tmp_path / "docs" / "rows.csv")
    code.parent.mkdir()
    code.write_text("1")
    monkeypatch.setattr("diffinstruct.tracking.journal.__file__", str(code))
    monkeypatch.chdir(tmp_path)
    assert started() == "unknown"
    rows.add("first", {})
    git("init")
    git("add", "platform", "docs")
    git("commit", "-m", "x")
    commit = git("rev-parse", "--short", "HEAD").strip()
    assert started() == commit
    rows.add("second", {})
    assert started() == commit
    code.write_text("2")
    assert started() == f"{commit}+{commit}-dirty"


def test_a_write_that_fails_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    rows = TrialRows(tmp_path / "rows.csv")
    rows.add("a", {"kid": 1.0})
    before = rows.path.read_bytes()

    def full(*args):
        raise OSError("no space")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        rows.add("b", {"kid": 2.0})
    assert rows.path.read_bytes() == before


def test_students_interval_over_seeds():
    """Of 1, 2, 4: mean 7/3, standard error sqrt(7/9), and t(2) = 4.3027 at 97.5 %, from any table of it."""
    figure = over_seeds([1.0, 2.0, 4.0])
    assert figure.value == pytest.approx(7 / 3) and figure.n == 3
    assert figure.high - figure.value == pytest.approx(4.3027 * math.sqrt(7 / 9), rel=1e-4)
    assert figure.value - figure.low == pytest.approx(figure.high - figure.value)
    assert str(over_seeds([1.5])) == "1.500 [?]"


def test_students_interval_covers_the_mean_of_three_seeds():
    rng = np.random.default_rng(0)
    figures = [over_seeds(rng.normal(5, 2, 3).tolist()) for _ in range(2000)]
    assert np.mean([f.low <= 5 <= f.high for f in figures]) == pytest.approx(0.95, abs=0.02)


def frame():
    import pandas as pd

    rows = [("one", s, 1.0 + s, 0.1) for s in (0, 1, 2)] + [("other", s, 0.5 + 1.1 * s, 0.2) for s in (2, 1, 0, 3)]
    return pd.DataFrame(rows, columns=["arm", "seed", "judge", "kid"])


def test_tables_by_seed_keep_the_order_of_the_arms():
    table = by_seed(frame(), "arm", ["judge", "kid"])
    assert list(table) == ["one", "other"]
    assert table["one"]["judge"] == over_seeds([1.0, 2.0, 3.0]) and table["other"]["kid"].n == 4


def test_a_difference_is_paired_by_seed_over_those_that_both_have():
    difference = paired_by_seed(frame(), "arm", "one", "other", "judge")
    expected = over_seeds([0.5, 0.4, 0.3])
    assert (difference.value, difference.low, difference.n) == pytest.approx((expected.value, expected.low, 3))


def test_the_noise_of_seeds_is_what_arms_and_seeds_leave():
    """Arms and seeds shift as they like; a trial with one seed says nothing of noise. Checked against drawn sigma
    0.3."""
    import pandas as pd

    rng = np.random.default_rng(1)
    arms, seeds = rng.normal(0, 5, 40), rng.normal(0, 5, 4)
    rows = [(f"arm {i}", s, a + b + rng.normal(0, 0.3)) for i, a in enumerate(arms) for s, b in enumerate(seeds)]
    rows.append(("once", 0, 1e6))
    frame = pd.DataFrame(rows, columns=["arm", "seed", "judge"])
    sigma, freedom = seed_noise(frame, "arm", "judge")
    assert freedom == 39 * 3 and sigma == pytest.approx(0.3, rel=0.15)
    with pytest.raises(ValueError, match="the noise of judge takes two arms"):
        seed_noise(frame[frame["seed"] == 0], "arm", "judge")


def test_one_seed_has_an_interval_where_the_noise_is_known():
    """At 95 % it covers the true difference of two arms, 0, of known noise."""
    import pandas as pd

    rng = np.random.default_rng(2)
    covered = 0
    columns = ["arm", "seed", "kid"]
    for _ in range(400):
        known = pd.DataFrame([(f"arm {i}", s, rng.normal()) for i in range(6) for s in range(3)], columns=columns)
        pair = pd.DataFrame([("one", 0, rng.normal()), ("other", 0, rng.normal())], columns=columns)
        figure = paired_by_seed(pair, "arm", "one", "other", "kid", seed_noise(known, "arm", "kid"))
        covered += figure.low <= 0 <= figure.high
    assert covered / 400 == pytest.approx(0.95, abs=0.035) and figure.n == 1


def test_a_path_is_read_between_its_trials_and_nowhere_else():
    import pandas as pd

    path = pd.DataFrame({"kid": [2.0, 0.0, 1.0], "judge": [5.0, 1.0, 2.0]})  # in no order
    assert at_distance(path, "kid", 0.5, ["judge"]) == {"judge": 1.5}
    assert at_distance(path, "kid", [0.5, 1.5], ["judge"]) == {"judge": 2.5}  # the mean of 1.5 and 3.5
    for outside in (2.1, -0.1, [1.0, 2.1]):
        assert math.isnan(at_distance(path, "kid", outside, ["judge"])["judge"])
    assert math.isnan(at_distance(path[:0], "kid", 1.0, ["judge"])["judge"])


def test_a_summary_becomes_columns():
    assert flat({"kid": Estimate(1.0, 0.5, 1.5, 7, 3)}) == {"kid": 1.0, "kid.low": 0.5, "kid.high": 1.5, "kid.n": 7}


# ------------------------------------------------------------------------------------------------- runs as a frame
def test_a_sweeps_folder_is_a_frame_with_a_row_a_run(tmp_path):
    tiny_sweep.run(tmp_path / "a", {"objective.reward_scale": 4.0}, evaluation=tiny_sweep.evaluated(4.5, 3.25, 1.5))
    alarm = [(20, "hacking", "later"), (10, "hacking", "first"), (5, "rewards", "here")]
    tiny_sweep.run(tmp_path / "b", end="FAILED", reason="NonFinite: x", events=alarm)
    tiny_sweep.run(tmp_path / "c", end="KILLED", reason="KeyboardInterrupt: ")
    tiny_sweep.run(tmp_path / "d", end=None, courses={})
    (tmp_path / "ray").mkdir()
    frame = load_sweep(tmp_path)
    assert frame["run"].tolist() == [str(tmp_path / name) for name in "abcd"]
    assert frame["status"].tolist() == ["finished", "failed", "unfinished", "unfinished"]
    assert frame["reason"][1] == "NonFinite: x" and frame["step"].tolist() == [20, 20, 20, 0]
    assert frame["alarm"][1] == 10 and frame["alarm"].isna().sum() == 3
    assert frame["objective.reward_scale"].tolist() == [4.0, 2.0, 2.0, 2.0]
    assert frame["held_out/pocket_judge"].tolist()[:3] == [2.5] * 3 and math.isnan(frame["held_out/pocket_judge"][3])
    assert frame.loc[0, ["kid", "kid.low", "kid.high", "kid.n"]].tolist() == [1.5, 1.0, 2.0, 9]
    assert load_sweep(tmp_path / "b")["status"].tolist() == ["failed"]


def test_a_run_of_the_version_before_has_todays_columns(tmp_path):
    """Its configuration, metrics and events had other names."""
    courses = {"divergence": [0.2, 0.3], "watch/unexplained": [0.5, 1.5], "reward/pocket_preference": [3.0, 4.0]}
    folder = tiny_sweep.run(tmp_path / "old", courses=courses, events=[(20, "hacking", "reward hacking: x")])
    (folder / "experiment.yaml").write_text((Path(__file__).parents[1] / "config" / "pocket_0_1.yaml").read_text())
    row = load_sweep(folder).iloc[0]
    assert (row["x0_gap"], row["overoptimization/unexplained"], row["alarm"]) == (0.3, 1.5, 20)
    assert row["reference.guidance_scale"] == 3.0
    assert not {"divergence", "watch/unexplained", "reference.cfg_scale"} & {*row.index}
    kept = pd.DataFrame({"trial": ["a"], "divergence": [0.2], "reference.cfg_scale": [2.0], "objective.space": ["v"]})
    kept.to_csv(tmp_path / "kept.csv", index=False)
    row = load_sweep(tmp_path / "kept.csv").iloc[0]
    assert (row["x0_gap"], row["reference.guidance_scale"], row["objective.weighting"]) == (0.2, 3.0, "v")
    told = [renamed(name) for name in ("watch", "overoptimization.blind", "blind")]
    assert told == ["overoptimization.no_held_out"] * 2 + ["overoptimization.probe_skipped"]
    keys = set(learning_curves(folder)["key"])
    assert keys == {"x0_gap", "overoptimization/unexplained", "reward/pocket_preference"}
    assert renamed("divergence_of_mine") == "divergence_of_mine" and renamed("reward/watch/x") == "reward/watch/x"


def test_training_and_evaluation_never_share_a_column(tmp_path):
    """Both call it reward/pocket_preference, and it is another thing: a batch's mean of the live generator."""
    tiny_sweep.run(tmp_path / "a", evaluation={"reward/pocket_preference": 4.5})
    tiny_sweep.run(tmp_path / "b")
    values = load_sweep(tmp_path)["reward/pocket_preference"]
    assert values[0] == 4.5 and math.isnan(values[1])
    assert load_sweep(tmp_path / "b")["reward/pocket_preference"][0] == 4.0  # nobody evaluated: training's
    (tmp_path / "a" / "evaluation.json").rename(tmp_path / "a" / "examination.json")  # as version 0.1 called it
    assert load_sweep(tmp_path)["reward/pocket_preference"][0] == 4.5


def test_a_resumed_run_is_what_it_was_last(tmp_path):
    folder = tiny_sweep.run(tmp_path / "a", end="FAILED", reason="out of memory")
    lines = ['{"time": 1, "start": {}}', '{"time": 1, "step": 20, "metrics": {"x0_gap": 7.0}}', '{"step": 30, "met']
    with (folder / "journal.jsonl").open("a") as file:
        file.write("\n".join(lines))  # the last one is torn
    row = load_sweep(folder).iloc[0]
    assert row["status"] == "unfinished" and row["reason"] is None and row["step"] == 20 and row["x0_gap"] == 7.0
    curves = learning_curves(folder)
    assert set(curves["step"]) == {10, 20}
    with (folder / "journal.jsonl").open("a") as file:
        file.write('\n{"time": 1, "step": 20, "metrics": {"x0_gap": 8.0}}\n')  # after the torn line
    curves = learning_curves(folder)
    assert curves[curves["key"] == "x0_gap"][["step", "value"]].to_numpy().tolist() == [[20, 8.0]]


@pytest.mark.parametrize("left", [0, 2])
def test_a_run_whose_journal_was_cut_is_not_taken_for_one_that_goes_on(tmp_path, left):
    folder = tiny_sweep.run(tmp_path / "a")
    journal = folder / "journal.jsonl"
    journal.write_text("".join(journal.read_text().splitlines(keepends=True)[:left]))
    run = load_sweep(folder).iloc[0]
    assert run["status"] == "unfinished" and "cut or deleted" in run["reason"]
    going_on = load_sweep(tiny_sweep.run(tmp_path / "b", end=None)).iloc[0]
    assert going_on["status"] == "unfinished" and going_on["reason"] is None


def test_kept_rows_are_a_frame_too(tmp_path):
    """A key that older rows do not have makes them another configuration."""
    rows = TrialRows(tmp_path / "rows.csv")
    rows.add("old", {"seed": 0, "reward/pocket_judge": 3.0, "held_out/pocket_judge": 2.0})
    rows.add("new", {"seed": 0, "reward/pocket_judge": 4.0, "objective.distance_args.c": 0.3})
    frame = load_sweep(rows.path)
    assert frame["run"].tolist() == ["old", "new"] and set(frame["status"]) == {"finished"}
    assert swept(frame) == ["objective.distance_args.c"]
    assert points(frame)["runs"].tolist() == [("old",), ("new",)]
    assert [described(row, swept(frame)) for _, row in frame.iterrows()] == ["the recipe", "c 0.3"]


def test_arguments_of_an_own_objective_are_swept_keys(tmp_path):
    """One that only another objective has is told by the objective's name."""
    for factor in (0.25, 0.5):
        own = {"objective.name": "mine:gap", "objective.args": {"factor": factor, "kind": "l2"}}
        tiny_sweep.run(tmp_path / "own" / str(factor), own)
    frame = load_sweep(tmp_path / "own")
    assert swept(frame) == ["objective.args.factor"]
    assert [described(row, swept(frame)) for _, row in frame.iterrows()] == ["factor 0.25", "factor 0.5"]
    tiny_sweep.run(tmp_path / "own" / "sid", {"objective.name": "sid"})
    assert swept(load_sweep(tmp_path / "own")) == ["objective.name", "objective.args.factor"]


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("swep", r"swep: no such folder, did you mean '\S*sweep'\?"),
        ("rows.csv", r"rows.csv: no such file, did you mean '\S*row.csv'\?"),
        ("row.csv", "row.csv: no rows in it"),
        ("empty", r"empty: no run in it \(neither it nor a folder in it has an experiment.yaml\)"),
        ("notes.txt", "notes.txt: should be a run's folder, a sweep's, or a .csv of kept rows"),
        ("sweep", r"sweep/a/metrics.json: not JSON: Expecting value.*"),
    ],
)
def test_a_path_without_runs_is_refused_in_one_line(tmp_path, path, said):
    tiny_sweep.run(tmp_path / "sweep" / "a")
    (tmp_path / "sweep" / "a" / "metrics.json").write_text('{"step": ')
    (tmp_path / "empty" / "ray").mkdir(parents=True)
    (tmp_path / "row.csv").write_text("trial,kid\n")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=rf"^{tmp_path}/{said}$"):
        load_sweep(tmp_path / path)


def test_what_judges_a_sweep_is_evaluated_or_else_trainings(tmp_path):
    tiny_sweep.run(tmp_path / "a" / "one", courses=tiny_sweep.WATCHED)
    assert measures(load_sweep(tmp_path / "a")) == Measures(
        "reward/pocket_preference", "held_out/pocket_judge", "x0_gap", "overoptimization/variety"
    )
    tiny_sweep.run(tmp_path / "a" / "two", courses=tiny_sweep.WATCHED, evaluation=tiny_sweep.evaluated(4, 3, 1))
    of = measures(load_sweep(tmp_path / "a"))
    assert of == Measures("reward/pocket_preference", "reward/pocket_judge", "kid", "diversity")
    # evaluated by a reward that it was not trained on
    of = measures(load_sweep(ROOT / "docs" / "results" / "overoptimization_planted.csv"))
    assert of.trained == "reward/experiments.hackable:Hackable" and of.held_out == "reward/pocket_judge"


def test_points_average_seeds_and_leave_out_what_is_not_finished(tmp_path):
    folder = tiny_sweep.sweep(tmp_path / "s")
    tiny_sweep.run(folder / "x", {"seed": 2, "objective.reward_scale": 1.0}, end="FAILED", courses=tiny_sweep.WATCHED)
    frame = load_sweep(folder)
    found = points(frame)
    assert swept(frame) == ["objective.regularization_weight", "objective.reward_scale"]
    assert len(found) == 4 and all(len(runs) == 2 for runs in found["runs"])
    one = found[(found["objective.regularization_weight"] == 1) & (found["objective.reward_scale"] == 1)].iloc[0]
    expected = over_seeds([2.5, 2.6])
    assert one["reward/pocket_judge"] == expected.value and one["reward/pocket_judge.low"] == expected.low
    assert one["reward/pocket_judge.n"] == 2
    single = points(frame[frame["seed"] == 0])
    assert single["kid.low"].tolist() == [kid - 0.5 for kid in single["kid"]]  # over prompts
    assert points(frame[frame["status"] == "failed"]).empty


def test_the_front_is_what_no_other_beats():
    import pandas as pd

    rows = [("low", 1.0, 0.0), ("beaten", 1.0, 0.5), ("twin", 2.0, 1.0), ("twin too", 2.0, 1.0), ("far", 3.0, 9.0)]
    rows += [("less for more", 2.5, 9.5), ("no distance", 9.0, math.nan)]
    table = pd.DataFrame(rows, columns=["name", "judge", "kid"])
    assert pareto_front(table.sample(frac=1, random_state=0), "judge", "kid")["name"].tolist()[0] == "low"
    assert set(pareto_front(table, "judge", "kid")["name"]) == {"low", "twin", "twin too", "far"}


def test_the_gap_between_rewards_says_its_unit(tmp_path):
    folder = tiny_sweep.sweep(tmp_path / "s")
    gap, unit = reward_gap(load_sweep(folder))
    assert gap.tolist() == [1.5] * 8 and unit == "within-prompt standard deviations of the start's scores"
    frame = load_sweep(folder).drop(columns="overoptimization/unexplained")
    gap, unit = reward_gap(frame)
    assert unit == "standard deviations over the sweep" and gap.mean() == pytest.approx(0, abs=1e-12)
    trained, held_out = frame["reward/pocket_preference"], frame["reward/pocket_judge"]
    by_hand = (trained - trained.mean()) / trained.std(ddof=0) - (held_out - held_out.mean()) / held_out.std(ddof=0)
    assert gap.tolist() == pytest.approx(by_hand.tolist())
