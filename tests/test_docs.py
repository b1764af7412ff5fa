"""What is written down is what the code says: keys, commands, metrics, links and results."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import keys_of
from reward_models import NAMES

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
TRACKED = [ROOT / "README.md", ROOT / "SECURITY.md", *PAGES]
SCHEMA = {name for name, _ in keys_of(Experiment)}
KEYS = SCHEMA | set(Experiment().to_params())
SECTIONS = {key.split(".")[0] for key in KEYS if "." in key}
PACKAGE = ROOT / "platform" / "diffinstruct"
SITE = SimpleNamespace(**runpy.run_path(str(DOCS / "generated.py")))


def named(pages: list[Path]) -> list:
    return [pytest.param(page, id=str(page.relative_to(ROOT))) for page in pages]


def markdown_files() -> list[Path]:
    """Every Markdown file of the repository that git keeps."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True)
    return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()] or TRACKED


# --------------------------------------------------------------------------------------------- generated from the code
def test_every_key_is_in_the_reference_with_its_default_and_its_meaning():
    table = SITE.generated("keys")
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", table, re.MULTILINE))
    assert set(rows) == SCHEMA
    assert rows["steps"].startswith("`100` | alternating rounds | ours |")
    assert all(cell.strip() for row in rows.values() for cell in row.split(" | ")[:2])
    assert "<!-- generated: keys -->" in (DOCS / "reference" / "configuration.md").read_text()


def listed(*group: str) -> set[str]:
    """The commands that a help text lists, in its columns."""
    text = SITE.generated(" ".join(("help", *group)))
    return set(re.findall(r"^[^\w-]{1,4}([a-z]\w+) {2,}\S", text, re.MULTILINE))


def commands() -> set[str]:
    """The command line's own list, with the parts of `rewards`."""
    return listed() | {f"rewards {part}" for part in listed("rewards")}


def test_every_command_is_in_the_reference():
    page = (DOCS / "reference" / "cli.md").read_text()
    marked = set(re.findall(r"^<!-- generated: help (.+) -->$", page, re.MULTILINE))
    assert {"train", "check", "rewards score"} <= marked
    assert marked == commands()
    for name in marked:
        assert "--help" in SITE.generated(f"help {name}"), name


def test_every_built_in_reward_is_in_the_reference():
    table = SITE.generated("rewards")
    assert set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE)) == set(NAMES)
    assert "<!-- generated: rewards -->" in (DOCS / "reference" / "rewards.md").read_text()


def test_every_metric_of_a_run_is_explained():
    """The keys that the code of a round, its log and the monitor write, but for what a name stands for."""
    page = (DOCS / "reference" / "metrics.md").read_text()
    explained = set(re.findall(r"`([a-z_0-9]+(?:/[\w.]+)?)`", page))
    source = "".join(
        file.read_text() for room in ("method", "training", "reward_service") for file in sorted((PACKAGE / room).glob("*.py"))
    )
    groups = "loss|time|gradient_norm|overoptimization|throughput|steps"
    written = set(re.findall(rf'"((?:{groups})/\w+)"', source)) | {"x0_gap", "reference_error", "distance"}
    assert len(written) >= 12
    assert not written - explained
    from diffinstruct.reward_service.monitor import PROBE_METRICS

    assert set(PROBE_METRICS) <= explained


# -------------------------------------------------------------------------------------------------------- what is said
@pytest.mark.parametrize("page", named(TRACKED))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.is_file(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(there), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The headings of a page as links name them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    words = [re.sub(r"[^\w\s-]", "", heading.replace("`", "").lower()).strip() for heading in headings]
    return {re.sub(r"[\s-]+", "-", heading) for heading in words}


@pytest.mark.parametrize("page", named(TRACKED))
def test_keys_and_commands_exist(page):
    text = page.read_text().replace("\\\n", " ")
    overrides = set(re.findall(r"(?:-s|--allow) '?\"?([a-z_][\w.]*)(?==| |`)", text)) - {"key"}
    assert overrides <= KEYS
    dotted = {key for key in re.findall(r"`([a-z_]+\.[a-z_.]+)(?:: [^`]*)?`", text) if key.split(".")[0] in SECTIONS}
    others = {"overoptimization.no_held_out", "overoptimization.probe_skipped", "overoptimization.py"}  # events, a study
    assert not dotted - KEYS - others
    typed = re.findall(r"(?:^ +|`|\| |bin/|-m )diffinstruct ((?:rewards )?[a-z]+)\b", text, re.MULTILINE)
    assert set(typed) <= commands() | {"rewards"}


@pytest.mark.parametrize("page", named(TRACKED))
def test_python_blocks_parse_and_import_what_exists(page):
    for block in re.findall(r"^ *```python\n(.*?)^ *```", page.read_text(), re.MULTILINE | re.DOTALL):
        code = "\n".join(line.removeprefix("   ") if block.startswith("   ") else line for line in block.splitlines())
        compile(code, page.name, "exec")
        for line in re.findall(r"^from (?:diffinstruct|reward_models)[\w.]* import .*$", code, re.MULTILINE):
            exec(line, {})


def test_no_line_is_longer_than_120():
    """Tables excepted: a row of them cannot be broken."""
    long = [
        f"{file.relative_to(ROOT)}:{n}: {len(line)}"
        for file in markdown_files()
        for n, line in enumerate(file.read_text().splitlines(), 1)
        if len(line) > 120 and not line.lstrip().startswith("|")
    ]
    assert not long


def test_pages_that_files_name_exist():
    """Recipes, cluster files and docstrings send a reader to pages of docs/."""
    search = ["git", "grep", "-ohI", r"docs/[a-z_/-]*\.md", ":!tests/config"]  # a recipe of version 0.1 lies there
    found = subprocess.run(search, cwd=ROOT, capture_output=True, text=True)
    assert not {path for path in found.stdout.split() if not (ROOT / path).is_file()}


def test_the_readme_is_a_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_table_of_the_quickstart_is_one():
    """The README and the first page have it: the same figures in both."""
    readme, page = (
        [line for line in file.read_text().splitlines() if line.startswith("|") and "[" in line]
        for file in (ROOT / "README.md", DOCS / "start" / "quickstart.md")
    )
    assert len(readme) >= 5
    assert set(readme) <= set(page)


# ------------------------------------------------------------------------------------------------------------- results
def figures(text: str) -> list[str]:
    """Table rows and differences; a difference that is broken into lines is one again."""
    lines = re.sub(r"\n  (?=\S)", " ", text).splitlines()
    return [line for line in lines if line.startswith(("|", "- ")) and not line.startswith(("- **", "| ---"))]


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
    said = figures(capsys.readouterr().out)
    assert len(said) > 80
    assert figures((DOCS / "results.md").read_text()) == said


# ---------------------------------------------------------------------------------------------------------------- site
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="pip install 'diffinstruct[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) >= len(PAGES)
    for page in pages:
        html = page.read_text()
        assert not re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="(?:https?:)?//[^"]*', html), page
        assert "<!-- generated" not in html, page
    assert "objective.reward_scale" in (tmp_path / "site" / "reference" / "configuration.html").read_text()


def test_each_recipe_says_who_has_run_it():
    """A recipe that nobody has run is a guess, and says so."""
    for recipe in sorted((ROOT / "experiments" / "recipes").glob("*.yaml")):
        head = recipe.read_text().split("\nname:")[0]
        assert len(re.findall(r"^# Run: (?:never\b|\d{4}-\d\d-\d\d on .+ by .+)", head, re.MULTILINE)) == 1, recipe.name


def test_no_file_names_the_host_of_a_package_index():
    hosts = "|".join(("download.pytorch" + ".org", "pypi" + ".org", "files.python" + "hosted.org"))
    found = subprocess.run(["git", "grep", "-lIE", hosts], cwd=ROOT, capture_output=True, text=True)
    assert not found.stdout
