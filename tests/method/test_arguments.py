"""Arguments by name against a signature, without torch."""

import subprocess
import sys

import pytest

from diffinstruct.method.arguments import ArgumentError, complete_arguments, parameters


def takes(given, strength: float, count: int = 2, name: str = "x", *, on=False, weights=(1.0,), loose=None, **rest):
    """Anything."""


TAKES = parameters(takes, without=["given"])


def test_defaults_are_filled_in_and_types_kept():
    assert list(TAKES) == ["strength", "count", "name", "on", "weights", "loose"]
    complete = complete_arguments("takes", TAKES, {"strength": 2, "loose": "any"})
    assert complete == {"strength": 2.0, "count": 2, "name": "x", "on": False, "weights": (1.0,), "loose": "any"}
    assert isinstance(complete["strength"], float)


@pytest.mark.parametrize(
    ("args", "name", "reason"),
    [
        ({}, "strength", "is missing: takes has no default for it"),
        ({"strength": 1, "cuont": 1}, "cuont", "is no parameter of takes, which takes 'strength', 'count', .*"),
        ({"strength": 1, "rest": 1}, "rest", "is no parameter of takes.*"),
        ({"strength": True}, "strength", "should be a number"),
        ({"strength": 1, "count": 1.5}, "count", "should be a whole number"),
        ({"strength": 1, "on": 1}, "on", "should be true or false"),
        ({"strength": 1, "name": 1}, "name", "should be a text"),
    ],
)
def test_what_does_not_fit_is_told_by_name(args, name, reason):
    with pytest.raises(ArgumentError, match=reason) as caught:
        complete_arguments("takes", TAKES, args)
    assert caught.value.name == name


def test_the_tables_are_read_without_torch():
    program = (
        "import sys, diffinstruct.method.objectives as o, diffinstruct.method.distances as d; "
        "o.objective_arguments('sid', {}), d.distance('pseudo_huber', {}); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
