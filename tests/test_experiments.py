"""Every experiment trains: each file of experiments/ that is a study, with --smoke.

One of them through Ray Tune; the others' trials one after the other in this process: what they ask and what they say
differs, the sweep is the same.
"""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from diffinstruct.config.prompts import read_prompts
from diffinstruct.errors import UserError
from diffinstruct.models.world import POCKET
from diffinstruct.sweeps.points import changed
from diffinstruct.training import local

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
SCORED = "evaluate_published"
"""It trains nothing."""
STUDIES = {path.stem for path in EXPERIMENTS.glob("*.py") if "--smoke" in path.read_text()} - {SCORED}
SWEPT = "reward_against_regularization"
DRAWN = {SWEPT: ["pareto", "heat_maps"], "guidance": ["pareto"], "k_ta": ["pareto"]}
"""Those that draw what every sweep may draw; the others' figures are their own."""


def in_this_process(base, points, folder, examine, on_row):
    for i, point in enumerate(points):
        experiment = changed(base, point)
        run = folder / experiment.config_hash
        local.run(experiment, run)
        on_row(i, {**point, "run": str(run), **json.loads((run / "metrics.json").read_text()), **examine(experiment, run)})


def smoke(study, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [study, "--smoke"])
    runpy.run_path(str(EXPERIMENTS / f"{study}.py"), run_name="__main__")


def check(study, tmp_path, said):
    assert "missing" not in said and "| --- | --:" in said
    (kept,) = {*tmp_path.glob("runs/*/pocket_study.csv"), *tmp_path.glob("runs/*recipe-smoke/overoptimization.csv")}
    assert (pd.read_csv(kept)["step"] == 2).all()
    for what in DRAWN.get(study, []):
        assert (kept.parent / f"{study}_{what}.png").stat().st_size > 10_000


def test_what_has_no_smoke_is_no_study():
    others = {path.stem for path in EXPERIMENTS.glob("*.py")} - STUDIES
    assert others == {"build_pocket_world", "hackable", "quickstart", SCORED}


@pytest.mark.parametrize("study", sorted(STUDIES - {SWEPT}))
def test_smoke(study, tmp_path, tmp_path_factory, monkeypatch, capsys):
    monkeypatch.setattr("diffinstruct.sweeps.study.sweep", in_this_process)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.getbasetemp() / 'studies.db'}")  # seconds to make
    for module in [module for name, module in sys.modules.items() if name.startswith("diffinstruct.")]:
        if hasattr(module, "PICTURES"):  # of the validation and the probes: no study has its own number
            monkeypatch.setattr(module, "PICTURES", 8)
    smoke(study, monkeypatch, tmp_path)
    check(study, tmp_path, capsys.readouterr().out)


@pytest.mark.long
def test_smoke_through_tune(session, tmp_path, monkeypatch, capsys):
    smoke(SWEPT, monkeypatch, tmp_path)
    check(SWEPT, tmp_path, capsys.readouterr().out)
    (report,) = tmp_path.glob("runs/*/report.html")
    assert "A sweep of 2 trials" in report.read_text()


def test_smoke_of_what_scores(tmp_path, monkeypatch, capsys):
    smoke(SCORED, monkeypatch, tmp_path)
    said = capsys.readouterr().out
    assert said.count("scoring ") == 3 and "| --- | --:" in said and " (3.57) |" in said
    table = pd.read_csv(tmp_path / "runs" / "published-smoke" / "table.csv", index_col=["measure", "model"])
    assert set(table.loc["judge"].index) == {"distilled", "export-raw", "export-distilled"}
    for measure in ("preference", "judge", "diversity"):  # a file of weights on the pipeline, and the whole pipeline
        assert table.value[measure, "distilled"] == pytest.approx(table.value[measure, "export-distilled"], rel=1e-4)
    assert table.value["judge", "distilled"] > table.value["judge", "export-raw"]
    monkeypatch.setattr("diffinstruct.evaluation.evaluate.evaluate", None)  # nothing is scored twice
    smoke(SCORED, monkeypatch, tmp_path)
    assert capsys.readouterr().out == said[said.index("|") :]
    kept, names = tmp_path / "runs" / "published-smoke", runpy.run_path(str(EXPERIMENTS / f"{SCORED}.py"))
    shutil.copytree(kept / "export-distilled", tmp_path / "other" / "export-raw")
    prompts = read_prompts("pocket:eval").iloc[::50]
    with pytest.raises(UserError, match=r"export-raw.csv: is of other prompts, another seed or other weights"):
        names["scores"]([str(tmp_path / "other" / "export-raw")], names["SMOKE"], prompts, kept, 2_000_000, 1)


def test_published_weights_may_be_pickled_tensors(tmp_path):
    names = runpy.run_path(str(EXPERIMENTS / f"{SCORED}.py"))
    weights = load_file(POCKET / "generator" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, tmp_path / "published.bin")
    torch.save({"code": Path}, tmp_path / "code.bin")
    smoke, figures = names["SMOKE"], (3.57, 3.02)
    for file, opens in (("published.bin", nullcontext()), ("code.bin", pytest.raises(ValueError, match="code"))):
        protocol = replace(smoke, published={"distilled": (str(tmp_path), file, figures)})
        with opens:
            _, generator = names["opened"]("distilled", protocol, tmp_path)
            opened = generator.denoiser.network.state_dict()
            assert all(torch.equal(opened[name].cpu(), value) for name, value in weights.items())
