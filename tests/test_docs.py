"""What is written down about the configuration is what the code says."""

from collections.abc import Iterator
from pathlib import Path

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
