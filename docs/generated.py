"""The parts of the documentation that the code says itself, written into the pages when the site is built (mkdocs.yml
`hooks`).

A page has a mark, `<!-- generated: WHAT -->`, and the mark is replaced: `keys`, the configuration; `help COMMAND`, the
command line's own help; `public`, the public names of the package; `rewards`, the built-in rewards. Nothing that is
generated is committed, so nothing can drift. Figures are put into the page as SVG, so that they follow its colours.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
for folder in (ROOT / "platform", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

MARK = re.compile(r"^<!-- generated: (.*) -->$", re.MULTILINE)
FIGURE = re.compile(r'<img alt="([^"]*)" src="[^"]*?figures/([\w-]+\.svg)" ?/?>')
SOURCE = re.compile(r"^(.*) \(([^()]*)\)$", re.DOTALL)


def on_page_markdown(markdown: str, **page: Any) -> str:
    return MARK.sub(lambda mark: generated(mark[1]), markdown)


def on_page_content(html: str, **page: Any) -> str:
    def inline(image: re.Match[str]) -> str:
        svg = (ROOT / "docs" / "figures" / image[2]).read_text()
        return f'<span class="figure" role="img" aria-label="{image[1]}">{svg}</span>'

    return FIGURE.sub(inline, html)


def generated(name: str) -> str:
    """The Markdown that a mark stands for."""
    kind, _, argument = name.partition(" ")
    return {"keys": keys, "help": lambda: help_text(argument.split()), "public": public, "rewards": rewards}[kind]()


# ------------------------------------------------------------------------------------------------- configuration
def keys() -> str:
    """A section and a table of keys for each section of the configuration, from its schema."""
    from diffinstruct.config.experiment import Experiment

    return "\n\n".join(_section(Experiment, "", Experiment().to_params()))


def _section(section: Any, prefix: str, values: dict[str, Any]) -> Iterator[str]:
    from diffinstruct.config.fields import Section

    fields = section.model_fields
    inner = {name: field.annotation for name, field in fields.items() if _is(field.annotation, Section)}
    title = f"## {prefix.rstrip('.')}\n\n{section.__doc__}" if prefix else "## Keys of no section"
    rows = [_row(prefix + name, field, values) for name, field in fields.items() if name not in inner]
    head = "| key | default | meaning | source | may it change? |\n|---|---|---|---|---|\n"
    yield f"{title}\n\n{head}" + "\n".join(rows)
    for name, kind in inner.items():
        yield from _section(kind, f"{prefix}{name}.", values)


def _row(key: str, field: Any, values: dict[str, Any]) -> str:
    """Default and meaning of a key; its description ends with where the default comes from, in brackets."""
    description = SOURCE.match(field.description)
    meaning, source = description.groups() if description else (field.description, "")
    # The arguments of objective and distance are keys of their own
    arguments = {name.removeprefix(f"{key}."): value for name, value in values.items() if name.startswith(f"{key}.")}
    value = values.get(key, json.dumps(arguments))
    default = "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    cells = (f"`{key}`", f"`{default}`", meaning, source, _change(field.json_schema_extra or {}))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _change(traits: Mapping[str, Any]) -> str:
    """Whether a run that has begun may go on with another value."""
    if not traits.get("identity", True):
        return "freely"
    return "with `--allow`" if traits.get("resume") else "no"


def _is(kind: Any, base: type) -> bool:
    return isinstance(kind, type) and issubclass(kind, base)


# -------------------------------------------------------------------------------------------------- command line
def help_text(words: list[str]) -> str:
    """What a command answers to --help."""
    from diffinstruct.cli.main import main

    plain = {"COLUMNS": "96", "TERMINAL_WIDTH": "96", "NO_COLOR": "1", "TERM": "dumb"}
    text = io.StringIO()
    with mock.patch.dict(os.environ, plain), contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*words, "--help"])
    return f"```text\n{text.getvalue().rstrip()}\n```"


# -------------------------------------------------------------------------------------------------------- Python
def public() -> str:
    """mkdocstrings' directive for each name that the package shows; none where it shows none."""
    import diffinstruct

    names = getattr(diffinstruct, "__all__", ())
    return "\n\n".join(f"::: diffinstruct.{name}\n    options: {{heading: diffinstruct.{name}}}" for name in names)


# ------------------------------------------------------------------------------------------------------- rewards
def rewards() -> str:
    """The built-in rewards: what each measures, then where it comes from."""
    from reward_models import NAMES

    lines = ["| name | what it measures | range |", "|---|---|---|"]
    lines += [f"| `{name}` | {entry.line} | {entry.range} |" for name, entry in NAMES.items()]
    lines += ["", "| name | paper (arXiv) | weights | licences |", "|---|---|---|---|"]
    lines += [f"| `{name}` | {e.paper} | {e.weights} | {e.licences} |" for name, e in NAMES.items()]
    return "\n".join(lines)
