"""What is shipped works elsewhere: a wheel with all that the package reads, an sdist with all that its tests read."""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
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
