"""What is written down about the configuration is what the code says."""

import runpy
from collections.abc import Iterator
from pathlib import Path

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import Section

ROOT = Path(__file__).parents[1]


def rows(section: type[Section], prefix: str = "") -> Iterator[str]:
    """A line of docs/defaults.md for each key."""
    values = Experiment().to_params()
    for name, field in section.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            yield from rows(kind, f"{prefix}{name}.")
        elif name in ("args", "distance_args"):  # their values are keys of their own
            yield f"| `{prefix}{name}` | `{getattr(Experiment().objective, name)}` | {field.description} |"
        else:
            default = str(values[prefix + name]).replace("|", "\\|")
            yield f"| `{prefix}{name}` | `{default}` | {field.description} |"


def test_every_default_is_in_the_paper_index():
    written = (ROOT / "docs" / "defaults.md").read_text().splitlines()
    table = [line for line in written if line.startswith("| `")]
    assert table == list(rows(Experiment)), "docs/defaults.md: replace its table by:\n" + "\n".join(rows(Experiment))


def test_the_results_are_what_the_rows_say(tmp_path, monkeypatch, capsys):
    """The studies' tables and the differences below them, computed again from the kept rows: these lines and no
    other."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffinstruct.tracking.journal.publish", lambda *arguments: None)
    monkeypatch.setattr("diffinstruct.sweeps.study.sweep", None)  # nothing is missing, so nothing is run
    for study in (
        *("score_against_kl", "paper_ablation", "open_choices", "overoptimization"),
        *("reward_against_regularization", "guidance", "k_ta"),
    ):
        monkeypatch.setattr("sys.argv", [study])
        runpy.run_path(str(ROOT / "experiments" / f"{study}.py"), run_name="__main__")

    def figures(text: str) -> list[str]:
        return [
            line
            for line in text.splitlines()
            if line.startswith(("|", "- ")) and not line.startswith(("- **", "| ---"))
        ]

    said = figures(capsys.readouterr().out)
    assert len(said) > 80
    assert figures((ROOT / "docs" / "results.md").read_text()) == said
