"""Every experiment trains: each file of experiments/ that is a study, with --smoke."""

from __future__ import annotations

import runpy
from pathlib import Path

import pandas as pd
import pytest

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
STUDIES = {path.stem for path in EXPERIMENTS.glob("*.py") if "--smoke" in path.read_text()}
DRAWN = {"reward_against_regularization": ["pareto", "heat_maps"], "guidance": ["pareto"], "k_ta": ["pareto"]}
"""Those that draw what every sweep may draw; the others' figures are their own."""


def test_what_has_no_smoke_is_no_study():
    others = {path.stem for path in EXPERIMENTS.glob("*.py")} - STUDIES
    assert others == {"build_pocket_world", "hackable", "quickstart"}


@pytest.mark.parametrize("study", sorted(STUDIES))
def test_smoke(session, study, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [study, "--smoke"])
    runpy.run_path(str(EXPERIMENTS / f"{study}.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "missing" not in said and "| --- | --:" in said
    (folder, *_) = (path.parent for path in tmp_path.glob("runs/*/table.csv"))
    rows = pd.read_csv(next(folder.glob("*.csv")))
    assert (rows["step"] == 2).all()
    for what in DRAWN.get(study, []):
        assert (folder / f"{study}_{what}.png").stat().st_size > 10_000
