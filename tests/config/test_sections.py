"""Objectives and distances by name, and their arguments: complete in the value, and checked before torch is there."""

import json
from pathlib import Path

import pytest
import yaml

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load, load_run
from diffinstruct.errors import ConfigErrors


def objective(tmp_path: Path, text: str, *overrides: str):
    (tmp_path / "run.yaml").write_text(f"objective: {{reward_scale: 0, {text}}}\n")
    return load(tmp_path / "run.yaml", overrides).objective


def test_defaults_come_from_the_signature(tmp_path):
    assert Experiment().objective.args == {} and Experiment().objective.distance_args == {"c": 0.1}
    assert objective(tmp_path, "name: sid").args == {"alpha": 1.0}
    whole = objective(tmp_path, "name: sid, args: {alpha: 1}").args["alpha"]
    assert whole == 1.0 and isinstance(whole, float)  # one value, one run
    assert objective(tmp_path, "distance: squared").distance_args == {}


def test_arguments_of_ones_own_are_kept_as_they_are(tmp_path):
    """What takes them is imported later, with torch."""
    args = {"power": 2, "name": "x", "centred": True, "weights": [1, 0.5]}
    chosen = objective(tmp_path, f"name: 'mine:loss', args: {json.dumps(args)}", "objective.distance=mine:d")
    assert chosen.args == args and chosen.distance_args == {}
    assert Experiment(objective=chosen).to_params()["objective.args.weights"] == "[1, 0.5]"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "name: di_stat",
            "objective.name: should be 'di_star' or 'sim' or 'diff_instruct' or 'diff_instruct_pp' or 'sid' or 'dmd' "
            "or 'reward_only' or 'module:attribute', got 'di_stat', did you mean 'di_star'?",
        ),
        (
            "name: sid, args: {alpa: 1.2}",
            "objective.args.alpa: is no parameter of sid, which takes 'alpha', got 1.2, did you mean 'alpha'?",
        ),
        ("args: {alpha: 1.2}", "objective.args.alpha: is no parameter of di_star, which takes none, got 1.2"),
        ("name: sid, args: {alpha: big}", "objective.args.alpha: should be a number, got 'big'"),
        ("name: sid, args: {alpha: true}", "objective.args.alpha: should be a number, got True"),
        ("distance_args: {c: 0}", "objective.distance_args: c should be greater than 0 and at most 1000000, got {'c': 0}"),
        (
            "distance: squared, distance_args: {c: 1}",
            "objective.distance_args.c: is no parameter of squared, which takes none, got 1",
        ),
        (
            "name: 'mine:loss', args: {x: .nan}",
            "objective.args.x: should be a finite number, a text, true, false or a list of those, got nan",
        ),
        (
            "name: 'mine:loss', args: {x: [[1]]}",
            "objective.args.x: should be a finite number, a text, true, false or a list of those, got [[1]]",
        ),
        ("huber_c: 0.1", "objective.huber_c: unknown key, it is now 'objective.distance_args.c'"),
        ("sid_alpha: 1", "objective.sid_alpha: unknown key, it is now 'objective.args.alpha'"),
        ("name: sim, reward_scale: 1", "objective.reward_scale: should be 0 for sim (with a reward it is 'di_star'), got 1"),
    ],
)
def test_a_mistake_is_told_with_its_line_and_the_nearest_name(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(f"\nobjective: {{{text}}}\n")
    with pytest.raises(ConfigErrors) as caught:
        load(path, ["objective.reward_scale=0"] if "reward_scale" not in text else [])
    assert caught.value.errors == [f"{path}:2: {said}"]


@pytest.mark.parametrize("overrides", [["distance=squared"], ["distance_args.c=0.3", "distance=pseudo_huber"]])
def test_another_distance_starts_with_its_own_arguments(tmp_path, overrides):
    """Those of the file's distance go with it, whatever the order of the overrides."""
    text = "distance_args: {c: 0.2}" if overrides[0] == "distance=squared" else "distance: 'mine:d', distance_args: {x: 1}"
    chosen = objective(tmp_path, text, *(f"objective.{override}" for override in overrides))
    assert chosen.distance_args == ({} if chosen.distance == "squared" else {"c": 0.3})


def test_changes_name_arguments_that_only_one_of_two_has():
    other = Experiment.model_validate({"objective": {"distance": "squared"}})
    changes = {"objective.distance": ("pseudo_huber", "squared"), "objective.distance_args.c": (0.1, None)}
    assert other.changes(Experiment()) == changes


@pytest.mark.parametrize(
    ("name", "distance", "args", "distance_args"),
    [("di_star", "pseudo_huber", {}, {"c": 0.2}), ("sid", "squared", {"alpha": 1.2}, {})],
)
def test_a_run_folder_of_version_0_1_is_read(tmp_path, name, distance, args, distance_args):
    """It has both parameters whatever its objective."""
    content = Experiment().model_dump(mode="json")
    objective = content["objective"] | {"name": name, "distance": distance, "huber_c": 0.2, "sid_alpha": 1.2}
    content["objective"] = {key: value for key, value in objective.items() if not key.endswith("args")}
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    read = load_run(tmp_path).objective
    assert (read.args, read.distance_args) == (args, distance_args)
