"""Rows that outlive their machine, and figures over training seeds."""

import math

import numpy as np
import pytest

from diffinstruct.evaluation import Figure
from diffinstruct.results import Rows, by_seed, flat, over_seeds, paired_by_seed


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


def test_a_summary_becomes_columns():
    assert flat({"kid": Figure(1.0, 0.5, 1.5, 7, 3)}) == {"kid": 1.0, "kid.low": 0.5, "kid.high": 1.5, "kid.n": 7}
