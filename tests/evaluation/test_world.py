"""A second world beside the built-in one: a folder with world.json, a tiny pipeline and a tiny classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.evaluation.features import AttributeClassifier
from diffinstruct.evaluation.generators import evaluate_generators
from diffinstruct.evaluation.pocket import TITLES
from diffinstruct.evaluation.world import evaluate_in, store_evaluation, stored_evaluation, world_prompts
from diffinstruct.models.export import export
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.world import POCKET, read_world, world_of

CONTENT = {
    "pipeline": "pipeline",
    "classifier": "truth",
    "prompts": "prompts.csv",
    "evaluation": "stored",
    "evaluation_splits": ["unseen", "open"],
    "rewards": ["tiny.rewards:Red"],
    "open_attributes": {"colour": {"preferred": "red", "metric": "reddened", "title": "red, where open"}},
    "titles": {"reward/tiny.rewards:Red": "redness"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    pipelines.build(folder / "pipeline")
    AttributeClassifier({"colour": ["red", "blue"]}, pixels=32).save(folder / "truth")
    rows = ["open,a hat,", "unseen,a red hat,red", "train,a blue dog,blue", "unseen,a blue hat,blue", "open,a dog,"]
    (folder / "prompts.csv").write_text("\n".join(["split,prompt,colour", *rows]))
    (folder / "world.json").write_text(json.dumps(CONTENT))
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run against the world, as far as `evaluate` reads it."""
    content = Experiment().model_dump()
    content["reference"]["model"] = str(folder)
    content["generator"]["init_from"] = "reference"
    content["rewards"] = {"trained": [{"name": "tiny.rewards:Red"}], "held_out": []}
    run = folder / "run"
    run.mkdir()
    (run / "experiment.yaml").write_text(Experiment.model_validate(content).to_yaml())
    export(str(folder / "pipeline"), load_reference(str(folder)).generator(625), run / "export")
    return run


def test_evaluate_takes_the_truth_of_the_runs_world(folder: Path, run: Path, tmp_path: Path, capsys) -> None:
    from diffinstruct.cli.main import main

    prompts = ["--prompts", str(folder / "prompts.csv"), "--reference-pictures", "0"]
    assert main(["evaluate", str(run), *prompts, "-o", str(tmp_path / "o")]) == 0
    assert "| reward/tiny.rewards:Red | accuracy/colour | accuracy | reddened | diversity |" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "o" / "run.csv")
    assert table["reddened"].tolist()[1:4] == pytest.approx([float("nan")] * 3, nan_ok=True)
    assert set(table["reddened"][[0, 4]]) <= {0.0, 1.0} and set(table["seen/colour"]) <= {"red", "blue"}
    (evaluation,) = evaluate_generators([run], None, [], 0, 0).values()
    assert evaluation.table["prompt"].tolist() == ["a red hat", "a blue hat"]  # the first evaluation split
    assert evaluation.columns()["reward/tiny.rewards:Red"].title == "redness"


def test_a_world_keeps_its_references_evaluation(folder: Path) -> None:
    world = world_of(str(folder / "pipeline"))
    assert world is not None and world == read_world(folder) == world_of(str(folder))
    assert world_prompts(world)["prompt"].tolist() == ["a red hat", "a blue hat", "a hat", "a dog"]
    reference = load_reference(str(folder))
    assert reference.source == str(folder / "pipeline")
    made = evaluate_in(world, reference.sampler(reference.generator(625)), np.zeros((3, 256), np.float32))
    store_evaluation(world, made)
    kept = stored_evaluation(world)
    pd.testing.assert_frame_equal(kept.table, made.table, check_dtype=False)
    assert kept.columns()["reddened"].title == "red, where open" and kept.features.shape == (4, 256)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"classifer": "truth"}, "classifer: unknown key, did you mean 'classifier'?"),
        ({"seed": "one"}, "seed: input should be a valid integer"),
        ({"titles": {"kidd": "x"}}, "titles: 'kidd' is no metric, did you mean 'kid'?"),
        ({"pipeline": None}, "pipeline: should be a path, relative to the file"),
    ],
)
def test_a_mistake_in_world_json_is_one_line(tmp_path: Path, change: dict, expected: str) -> None:
    (tmp_path / "world.json").write_text(json.dumps(CONTENT | change))
    with pytest.raises(UserError) as refused:
        read_world(tmp_path).metrics()
    assert str(refused.value).startswith(f"{tmp_path / 'world.json'}: {expected}")


def test_a_world_json_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"world.json: No such file"):
        read_world(tmp_path)
    for text, expected in (("{", "not JSON"), ("[]", "should be an object"), ("{}", "pipeline: is missing")):
        (tmp_path / "world.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            read_world(tmp_path)


def test_the_built_in_world_is_one_of_them() -> None:
    world = world_of("pocket")
    assert world is not None and world.folder == POCKET
    assert world_of(str(POCKET / "pipeline")) == read_world(POCKET) and world_of(str(POCKET / "generator")) is None
    assert all(path.exists() for path in (world.pipeline, world.classifier, world.prompts, world.generator))
    assert len(world_prompts(world)) == 756
    assert TITLES["smiling"] == "smiling, where open" and TITLES["kid"] == "KID to the reference" and len(TITLES) == 10
