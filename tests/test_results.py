"""Rows that outlive their machine, and figures over training seeds."""

import math
import subprocess

import numpy as np
import pytest

from diffinstruct.evaluation import Figure
from diffinstruct.experiment import UserError
from diffinstruct.results import Rows, at_distance, by_seed, flat, over_seeds, paired_by_seed, seed_noise


def test_rows_are_kept_and_what_is_missing_is_known(tmp_path):
    rows = Rows(tmp_path / "results" / "rows.csv")
    assert rows.missing(["a", "b"]) == ["a", "b"]
    rows.add("b", {"arm": "x", "seed": 1, "kid": 1 / 3})
    assert Rows(rows.path).missing(["a", "b"]) == ["a"]
    rows.add("a", {"arm": "x", "seed": 0, "kid": 2.0, "new": 5})  # a later row may know more
    frame = Rows(rows.path).read()
    assert frame["trial"].tolist() == ["b", "a"] and frame["kid"].tolist() == pytest.approx([1 / 3, 2.0], rel=1e-5)
    assert math.isnan(frame["new"][0]) and frame["commit"].notna().all() and frame["at"].str.fullmatch(r"\d{4}-\d\d-\d\d").all()
    assert [path.name for path in rows.path.parent.iterdir()] == ["rows.csv"]


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
        Rows(tmp_path / "rows.csv").missing(["a"])


def test_a_row_names_the_commit_and_rows_alone_do_not_make_it_dirty(tmp_path, monkeypatch):
    def git(*command):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, "-C", str(tmp_path), *command], check=True, capture_output=True, text=True).stdout

    code, rows = tmp_path / "platform" / "code.py", Rows(tmp_path / "docs" / "rows.csv")
    code.parent.mkdir()
    code.write_text("1")
    monkeypatch.setattr("diffinstruct.results.__file__", str(code))
    rows.add("before", {})
    git("init")
    git("add", "-A")
    git("commit", "-m", "x")
    commit = git("rev-parse", "--short", "HEAD").strip()
    rows.add("second", {})
    rows.add("third", {})
    code.write_text("2")
    rows.add("fourth", {})
    assert rows.read()["commit"].tolist() == ["unknown", commit, commit, f"{commit}-dirty"]


def test_a_write_that_fails_leaves_the_rows_as_they_were(tmp_path, monkeypatch):
    rows = Rows(tmp_path / "rows.csv")
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
    figures = [over_seeds(rng.normal(5, 2, 3)) for _ in range(2000)]
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
    """Arms and seeds shift as they like; a trial with one seed says nothing of noise. Checked against drawn sigma 0.3."""
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
    assert flat({"kid": Figure(1.0, 0.5, 1.5, 7, 3)}) == {"kid": 1.0, "kid.low": 0.5, "kid.high": 1.5, "kid.n": 7}
