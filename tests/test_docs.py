"""What is written down about the configuration is what the code says."""

import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffinstruct.experiment import Experiment, Section

ROOT = Path(__file__).parents[1]


def rows(section: type[Section], prefix: str = "") -> Iterator[str]:
    """A line of docs/defaults.md for each key."""
    values = Experiment().to_params()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from rows(kind, f"{prefix}{name}.")
        else:
            default = str(values[prefix + name]).replace("|", "\\|")
            yield f"| `{prefix}{name}` | `{default}` | {field.description} |"


def test_every_default_is_in_the_paper_index():
    written = (ROOT / "docs" / "defaults.md").read_text().splitlines()
    table = [line for line in written if line.startswith("| `")]
    assert table == list(rows(Experiment)), "docs/defaults.md: replace its table by:\n" + "\n".join(rows(Experiment))


@pytest.mark.parametrize("study", ["score_against_kl", "paper_ablation", "open_choices"])
def test_the_results_are_what_the_rows_say(study, tmp_path, monkeypatch, capsys):
    """Every line of a study's table and every difference below it, computed again from the kept rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [study])
    monkeypatch.setattr("diffinstruct.tracking.publish", lambda *arguments: None)
    monkeypatch.setattr("diffinstruct.cluster.study.sweep", None)  # nothing is missing, so nothing is run
    runpy.run_path(str(ROOT / "experiments" / f"{study}.py"), run_name="__main__")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| ", "- "))]
    written = (ROOT / "docs" / "results.md").read_text()
    assert len(said) > 10
    assert not [line for line in said if line not in written], "docs/results.md: put in its place:\n" + "\n".join(said)
