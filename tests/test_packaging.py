"""What is shipped works elsewhere: a wheel with all that the package reads, an sdist with all that its tests read."""

from __future__ import annotations

import json
import os
import re
import site
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from hatchling import build

ROOT = Path(__file__).parents[1]
PACKAGES = {"diffinstruct": ROOT / "platform" / "diffinstruct", "reward_models": ROOT / "reward_models"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("wheel")
        return folder / build.build_wheel(str(folder))


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        folder = tmp_path_factory.mktemp("sdist")
        return folder / build.build_sdist(str(folder))


def files(folder: Path) -> set[str]:
    """Paths of the files below `folder`, without hidden ones (locks of tables) and compiled Python."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name[0] != "." and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in paths}


def test_the_wheel_has_every_file_of_both_packages_and_no_other(wheel):
    expected = {f"{name}/{path}" for name, folder in PACKAGES.items() for path in files(folder)}
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (archive.read(name).decode() for name in archive.namelist() if "entry_points" in name)
    assert names == expected
    assert "diffinstruct/py.typed" in names and "diffinstruct/pocket/prompts.csv" in names
    assert "diffinstruct = diffinstruct.cli.main:main" in entry_points


def test_the_sdist_has_what_the_tests_and_the_build_need_and_makes_the_same_wheel(wheel, sdist, tmp_path, monkeypatch):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = tmp_path.iterdir()
    for folder in ("tests", "docs", "experiments", "benchmarks"):
        assert files(unpacked / folder) == files(ROOT / folder)
    for name in ("README.md", "LICENSE", "Makefile", "constraints.txt", "pyproject.toml", "ray_cluster.yaml"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes()
    monkeypatch.chdir(unpacked)
    again = tmp_path / build.build_wheel(str(tmp_path))
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {info.filename: info.CRC for info in one.infolist()} == {info.filename: info.CRC for info in other.infolist()}


PRIVATE = {
    "torch": ("torch._subclasses", "torch.utils._python_dispatch", "torch.utils._pytree", "torch._C", "torch._foreach_lerp_"),
    "diffusers": ("._no_split_modules",),
    "peft": ("._active_adapter",),
    "ray": (),  # tests/cluster/test_ray_private.py has them
}
"""Packages whose private names are used -> the names."""


def requirements() -> dict[str, str]:
    """Package -> the versions that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    matches = [re.fullmatch(r"([\w-]+)(?:\[.*\])?(.*)", line) for line in project["dependencies"]]
    return {match[1]: match[2] for match in matches if match}


def test_a_package_whose_private_names_are_used_ends_at_the_next_release():
    text = "\n".join(path.read_text(encoding="utf-8") for folder in PACKAGES.values() for path in folder.rglob("*.py"))
    imported = {name.partition(".")[0] for name in re.findall(r"(?:from|import) (\w[\w.]*\._\w+)", text)}
    assert imported <= PRIVATE.keys(), "say so in PRIVATE, and bound its version"
    for package, names in PRIVATE.items():
        assert [name for name in names if name not in text] == [], package
        low, high = (tuple(map(int, part.split("."))) for part in re.findall(r"[\d.]+", requirements()[package]))
        installed = tuple(map(int, version(package).partition("+")[0].split(".")))
        assert low <= installed < high == (installed[0], installed[1] + 1), package


def test_what_is_installed_is_what_is_allowed_and_each_package_has_a_lowest_version():
    for package, allowed in requirements().items():
        low, *high = (tuple(map(int, part.split("."))) for part in re.findall(r"[\d.]+", allowed))
        installed = tuple(int(part) for part in re.findall(r"\d+", version(package).partition("+")[0]))
        assert low <= installed and all(installed < limit for limit in high), package


def test_every_supported_python_is_named_once():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    low, high = (int(minor) for minor in re.findall(r"3\.(\d+)", project["requires-python"]))
    expected = [f"3.{minor}" for minor in range(low, high)]
    assert [line.rsplit(" ", 1)[1] for line in project["classifiers"] if ":: Python :: 3." in line] == expected
    assert re.search(r"^PYTHONS := (.*)$", (ROOT / "Makefile").read_text(), re.M)[1].split() == expected
    assert f"python: {json.dumps(expected)}" in (ROOT / ".github" / "workflows" / "ci.yml").read_text()


@pytest.mark.long
def test_the_installed_wheel_trains_from_another_folder(wheel, tmp_path):
    """In an environment of its own that has the packages of this one, but not the editable install."""
    venv.create(tmp_path / "bare", symlinks=True)
    python = tmp_path / "bare" / "bin" / "python"
    (packages,) = (tmp_path / "bare" / "lib").glob("python*/site-packages")
    # A folder that a .pth file names is searched; its own .pth files, an editable install's among them, are not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "-q", wheel]
    subprocess.run(install, check=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "recipe.yaml").write_text("")

    def run(*command: object) -> str:
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run(python, "-c", "import diffinstruct, reward_models as r; print(diffinstruct.__file__, r.__file__)")
    assert all(path.startswith(str(packages)) for path in where.split())
    command = packages.parents[2] / "bin" / "diffinstruct"
    short = ("steps=2", "global_batch_size=4", "overoptimization.every=0", "logging.grid_prompts=1")
    run(python, command, "train", "recipe.yaml", "--local", *(f"-s{override}" for override in short))
    (made,) = (folder / "runs").glob("pocket-*/export")
    code = f"import diffinstruct; diffinstruct.generate({str(made)!r}, ['a tulip'])[0].save('tulip.png')"
    run(python, "-c", code)
    assert (folder / "tulip.png").stat().st_size > 1000
