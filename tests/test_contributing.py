"""The guides of CONTRIBUTING.md, and the page on trackers, followed as they are written: each ends in a run of two
rounds."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from diffinstruct.config.reading import RENAMED
from diffinstruct.tracking.records import read_journal

TEXT = (ROOT / "CONTRIBUTING.md").read_text()
GUIDES = dict(re.findall(r"<!-- guide: (\w+) -->\n(.*?)(?=<!-- guide:|\Z)", TEXT, re.DOTALL))


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of its own, which a guide may change: the package and the tiny worlds."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "platform", tmp_path / "platform", ignore=ignored)
    shutil.copytree(ROOT / "tests" / "tiny", tmp_path / "tests" / "tiny", ignore=ignored)
    return tmp_path


def write(tree: Path, block: str) -> None:
    """A block whose first line names the file to make, or the function in one above which it goes."""
    head, content = block.split("\n", 1)
    if made := re.fullmatch(r"# file: (\S+)", head):
        (tree / made[1]).write_text(content)
        return
    mark, name = re.fullmatch(r"# above (\w+) in: (\S+)", head).groups()
    text = (tree / name).read_text()
    assert text.count(f"\ndef {mark}(") == 1
    (tree / name).write_text(text.replace(f"\ndef {mark}(", f"\n{content}\n\ndef {mark}("))


def change(tree: Path, block: str) -> None:
    """Lines with a minus become the lines with a plus that follow them; what is around them on the line stays."""
    head, content = block.split("\n", 1)
    file = tree / head.removeprefix("# in: ")
    text = file.read_text()
    for old, new in re.findall(r"^-(.*)\n((?:\+.*\n)+)", content, re.MULTILINE):
        assert text.count(old) == 1, f"{file} has {text.count(old)} times {old!r}"
        text = text.replace(old, "\n".join(line[1:] for line in new.splitlines()))
    file.write_text(text)


def follow(tree: Path, guide: str) -> None:
    """Raises CalledProcessError where a command fails."""
    paths = [tree / "platform", tree / "tests", ROOT]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```$", guide, re.MULTILINE | re.DOTALL):
        if language == "diff":
            change(tree, block)
        elif language == "console":
            for line in block.splitlines():
                program, *arguments = shlex.split(line)
                how = {"python": [], "diffinstruct": ["-m", "diffinstruct"]}[program]
                done = subprocess.run(
                    [sys.executable, *how, *arguments], cwd=tree, env=environment, capture_output=True, text=True
                )
                assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        else:
            write(tree, block)


def run_of(tree: Path) -> Path:
    """The only run that a guide has left, which has finished."""
    (run,) = (path.parent for path in (tree / "runs").glob("*/metrics.json"))
    assert (run / "export" / "model_index.json").exists()
    return run


@pytest.mark.parametrize("name", ["reward", "family", "objective"])
def test_a_guide_ends_in_a_run(name: str, tree: Path) -> None:
    follow(tree, GUIDES[name])
    run_of(tree)


def test_the_tracker_of_the_page_gets_every_metric_once(tree: Path) -> None:
    follow(tree, (ROOT / "docs" / "how-to" / "own-tracker.md").read_text())
    journaled = [
        f"{record['step']},{key},{value}"
        for record in read_journal(run_of(tree))
        for key, value in record.get("metrics", {}).items()
    ]
    assert (run_of(tree) / "metrics.csv").read_text().splitlines() == journaled and len(journaled) > 20


def test_these_are_the_guides() -> None:
    assert GUIDES.keys() == {"reward", "family", "objective"}
    assert all(len(guide.splitlines()) <= 90 for guide in GUIDES.values())  # a page each


def test_the_changelog_has_every_renamed_key() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    missing = [old for old, new in RENAMED.items() if f"| `{old}` | `{new}`" not in changelog]
    assert not missing
