"""The public face: light to import, each name where it says, one verb a layer."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffinstruct

HOMES = diffinstruct._HOMES


def test_the_import_loads_nothing_heavy():
    heavy = ("torch", "ray", "mlflow", "pydantic", "numpy", "pandas", "typer", "yaml")
    code = f"import sys, diffinstruct; dir(diffinstruct); print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "[]\n"


@pytest.mark.parametrize("name", HOMES)
def test_a_name_is_what_its_home_has(name):
    module, _, attribute = HOMES[name].partition(":")
    value = getattr(diffinstruct, name)
    assert value is getattr(importlib.import_module(f"diffinstruct.{module}"), attribute)
    assert value.__module__ == f"diffinstruct.{module}" and inspect.getdoc(value)


def test_the_names_are_those_that_type_checkers_and_dir_see():
    assert [*diffinstruct.__all__] == sorted({*HOMES, "train"})
    assert {*diffinstruct.__all__} <= {*dir(diffinstruct)}
    tree = ast.parse(Path(diffinstruct.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = {
        alias.asname: f"{node.module.removeprefix('diffinstruct.')}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    assert seen == HOMES


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="'diffinstruct' has no attribute 'trian'"):
        diffinstruct.trian  # noqa: B018


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("compare", (["runs/a", "runs/b"],)),
        ("evaluate", (["runs/a"], "pocket:eval")),
        ("generate", ("runs/a/export", ["a prompt"])),
        ("sweep", (None, [], "runs/sweep")),
        ("train", (None,)),
        ("validate_reward", ("my_reward:Warmth",)),
    ],
)
def test_a_call_needs_no_more_than_this(name, arguments):
    inspect.signature(getattr(diffinstruct, name)).bind(*arguments)


def test_folders_may_be_strings(tmp_path):
    with pytest.raises(diffinstruct.UserError, match="is neither a run nor an exported pipeline"):
        diffinstruct.evaluate([str(tmp_path)], "pocket:eval")


@pytest.mark.parametrize(("local", "module"), [(True, "training.local"), (False, "cluster.train")])
def test_train_runs_where_it_is_told_to_and_returns_the_result(local, module, monkeypatch, tmp_path):
    calls = []
    runner = SimpleNamespace(run=lambda *arguments: calls.append(arguments) or "the result")
    monkeypatch.setitem(sys.modules, f"diffinstruct.{module}", runner)
    if not local:
        monkeypatch.setitem(sys.modules, "diffinstruct.cluster", SimpleNamespace())
    experiment = diffinstruct.Experiment(name="mine", output_dir=str(tmp_path))
    assert diffinstruct.train(experiment, local=local) == "the result"
    monkeypatch.chdir(tmp_path)
    diffinstruct.train(experiment, "here", local=local)
    own = tmp_path / f"mine-{experiment.config_hash}"
    assert calls == [(experiment, own), (experiment, tmp_path / "here")]


def test_load_and_grid_make_experiments():
    experiment = diffinstruct.load(Path(__file__).parents[1] / "experiments" / "recipes" / "pocket.yaml", ["steps=7"])
    assert isinstance(experiment, diffinstruct.Experiment) and experiment.steps == 7
    assert diffinstruct.grid({"steps": [1, 2]}) == [{"steps": 1}, {"steps": 2}]
