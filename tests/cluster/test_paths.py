"""Paths that mean nothing on another machine, or in a job's copy of its folder, are refused in one line."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from diffinstruct.cli.main import main
from diffinstruct.cluster import shared_folder
from diffinstruct.cluster.attach import stand_in
from diffinstruct.cluster.train import OUTPUT, _begin, run
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.inputs import import_named, relative_paths
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.sweeps.tune import sweep

RECIPES = sorted((Path(__file__).parents[2] / "experiments" / "recipes").glob("*.yaml"))
MEND = r"; give an absolute path that all machines see, as /mnt/shared/\.\.\."


@pytest.fixture
def job(tmp_path, monkeypatch) -> Path:
    """The working directory, as of a job's driver: Ray's copy of the folder that was submitted."""
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    (copy / "few.txt").write_text("a red hat\n")
    (copy / "recipe.yaml").write_text("prompts: {train: few.txt, grid: few.txt}\n")
    return copy


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generator.init_from=models/a.safetensors", "generator.init_from: models/a.safetensors has not come with the job: .*"),
        ("reference.model=./sdxl", "reference.model: ./sdxl has not come with the job: .*"),
        ("prompts.train=more.txt", "prompts.train: more.txt has not come with the job: .*"),
        ("prompts.embeddings=embeddings", "prompts.embeddings: .*/embeddings lies in Ray's passing copy .*"),
    ],
)
def test_a_job_refuses_a_file_that_has_not_come_with_it_and_a_folder_that_would_be_lost(job, capsys, override, said):
    model = [] if override.startswith(("reference", "prompts")) else ["-s", "reference.model=me/model"]
    start = ["-s", "generator.init_from=reference"] if override.startswith("reference") else []
    assert main(["train", "recipe.yaml", *model, *start, "-s", override]) == 2
    err = capsys.readouterr().err
    assert re.fullmatch(said + MEND + "\n", err), err
    assert {path.name for path in job.iterdir()} == {"few.txt", "recipe.yaml"}


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "mine.yaml"],  # the recipe itself
        ["train", "recipe.yaml", "-s", "rewards.trained=[{name: 'mine:Reward'}]", "-s", "rewards.held_out=[]"],
    ],
    ids=["recipe", "reward"],
)
def test_a_job_says_that_git_may_ignore_what_it_lacks(job, capsys, arguments):
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    for said in (line, complaint_of(lambda: import_named("tracking.also", "mine:Tracker"))):
        assert said.endswith("; it has not come with the job: it was not there, or runtime_env.yaml or .gitignore excludes it")


def complaint_of(call):
    with pytest.raises(UserError) as error:
        call()
    return str(error.value)


def test_a_job_writes_no_run_and_no_sweep_into_its_passing_copy(job):
    for key, start in (
        ("output_dir", lambda: run(Experiment(), job / "runs" / "pocket-1")),
        ("sweep", lambda: sweep(Experiment(), [{"seed": 1}], "runs/s")),
    ):
        with pytest.raises(UserError, match=rf"^{key}: {job}/runs/\S+ lies in Ray's passing copy .*{MEND}$"):
            start()
    assert not (job / "runs").exists()


def test_which_paths_are_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub = {"model": "stabilityai/sdxl@abc"}
    content = {"reference": hub, "generator": {"init_from": "reference"}, "prompts": {"train": "datasets:me/it:train"}}
    assert relative_paths(Experiment.model_validate(content)) == {}
    (tmp_path / "stabilityai").mkdir()
    (tmp_path / "stabilityai" / "sdxl@abc").mkdir()  # a folder that is there is no hub id
    content["prompts"] = {"train": "a.txt", "grid": "/b.txt", "embeddings": "c"}
    expected = {"reference.model": "stabilityai/sdxl@abc", "prompts.train": "a.txt", "prompts.embeddings": "c"}
    assert relative_paths(Experiment.model_validate(content)) == expected


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_the_recipes_name_no_file_by_a_relative_path(recipe):
    experiment = load(recipe)
    assert relative_paths(experiment) == {}
    if "# Run: never" in recipe.read_text():  # they are for more than one machine
        assert Path(experiment.output_dir).is_absolute()


def test_a_training_process_refuses_paths_that_its_machine_does_not_see(tmp_path, monkeypatch):
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: "10.0.0.7")
    monkeypatch.chdir(tmp_path)
    relative = Experiment.model_validate(yaml.safe_load("prompts: {embeddings: embeddings}"))
    stand_in("/not/here", Experiment())
    stand_in(str(tmp_path), relative)
    said = rf"^prompts.embeddings: embeddings is relative to /not/here, which 10.0.0.7 does not have{MEND}$"
    with pytest.raises(UserError, match=said):
        stand_in("/not/here", relative)
    with pytest.raises(UserError, match=rf"^output_dir: {tmp_path}/run is not seen by 10.0.0.7{MEND}$"):
        _begin(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / OUTPUT).touch()
    _begin(tmp_path / "run")


def test_machines_that_do_not_see_the_runs_folder_are_named_before_the_start(tmp_path, monkeypatch):
    """Three that may train, the driver's own, one that is lost while it is asked, and one too small to matter."""
    seen, folder = {}, tmp_path / "runs" / "a"
    nodes = [
        {
            "NodeID": name,
            "Alive": alive,
            "Resources": {"CPU": cpus},
            "NodeManagerAddress": f"10.0.0.{i}",
            "NodeManagerHostname": name,
        }
        for i, (name, alive, cpus) in enumerate(
            [
                ("head", True, 4),
                ("sees", True, 4),
                ("blind", True, 4),
                ("bare", True, 4),
                ("lost", True, 4),
                ("small", True, 0),
                ("dead", False, 4),
            ]
        )
    ]
    answers = {"sees": True, "blind": False, "bare": False, "lost": None}

    def answered(others, token):
        seen[token] = token.read_text(), [node["NodeID"] for node in others]
        return [answers[node["NodeID"]] for node in others]

    monkeypatch.setattr(shared_folder.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(shared_folder.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    monkeypatch.setattr(shared_folder, "_answers", answered)
    blind = r"10.0.0.2 \(blind\), 10.0.0.3 \(bare\)"
    said = rf"^output_dir: {folder} is not seen by {blind}, where training processes may run{MEND}, or keep them [^\n]*$"
    with pytest.raises(UserError, match=said):
        shared_folder.check_seen("output_dir", folder, Experiment().cluster)
    ((token, (content, asked)),) = seen.items()
    assert token.parent == folder and content == token.name and asked == [*answers]
    assert [*folder.iterdir()] == []
    del answers["blind"], answers["bare"]
    nodes[:] = [node for node in nodes if node["NodeID"] not in ("blind", "bare")]
    shared_folder.check_seen("output_dir", folder, Experiment().cluster)
    nodes[:] = nodes[:1]  # one machine is not asked what it sees
    shared_folder.check_seen("output_dir", folder, Experiment().cluster)
    assert len(seen) == 2


def test_a_token_that_another_machine_has_written_is_looked_for_a_while(tmp_path, monkeypatch):
    monkeypatch.setattr(shared_folder, "APPEARS_WITHIN_S", 0.0)
    assert not shared_folder.sees(tmp_path / "runs" / "token")
    (tmp_path / "token").touch()
    assert shared_folder.sees(tmp_path / "token")
