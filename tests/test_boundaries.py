"""The import rule: a room imports rooms before it, and a third-party package has its callers; lazy imports included."""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "diffinstruct"
OURS = {"diffinstruct", "reward_models", "experiments", "benchmarks", "tests"}

ROOMS = (
    *(
        "errors",
        "locks",
        "statistics",
        "metrics",
        "method",
        "ranks",
        "config",
        "tracking",
        "run_folder",
        "models",
        "reward_service",
        "training",
        "cluster",
    ),
    *("reports", "evaluation", "sweeps", "planning", "cli"),
)
"""A room (a folder, or a file at the top) imports itself and rooms before it."""
CALLERS = {
    "ray": ("cluster", "sweeps"),
    "optuna": ("sweeps",),
    "mlflow": ("tracking.mlflow",),
    "fcntl": ("locks",),
    "fsspec": ("config", "run_folder.mirror"),
    "diffusers": ("models", "reward_models"),
    "transformers": ("models", "reward_models"),
    "peft": ("models", "reward_models"),
}
"""Third-party package -> the rooms, files or packages of ours that may import it."""
METHOD_ALSO = {"method.noise": ("numpy",)}  # for Philox: torch's CPU generator takes 32 bits of a seed
SCRIPTS_MAY_USE = {"experiments": {"diffinstruct", "reward_models"}, "benchmarks": {"diffinstruct", "reward_models"}}


def imported(source: str, package: str) -> Iterator[str]:
    """Dotted names of all that `source`, a module of `package`, imports; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module, names, level):
                around = package.split(".")[: package.count(".") + 2 - level] if level else []
                name = ".".join([*around, *([module] if module else [])])
                yield name
                yield from (f"{name}.{alias.name}" for alias in names)
            case ast.Call(ast.Name("__import__") | ast.Attribute(attr="import_module"), [ast.Constant(str(name)), *_]):
                yield name


def offences(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path` (relative to the repository), imports and may not, in words."""
    top, *below_top = path.with_suffix("").parts
    found = set()
    if top in SCRIPTS_MAY_USE:
        roots = {name.partition(".")[0] for name in imported(source, top)}
        return [f"{top} may not use {root}" for root in sorted(roots & OURS - SCRIPTS_MAY_USE[top])]
    me = ".".join(below_top[1:]) if top == "platform" else top
    room = me.partition(".")[0]
    for name in imported(source, ".".join(below_top[:-1]) or top):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0] if root == "diffinstruct" else ""
        if root in ("experiments", "benchmarks", "tests"):
            found.add(f"nobody imports {root}")
        if not any(f"{me}.".startswith(f"{caller}.") for caller in CALLERS.get(root, (me,))):
            found.add(f"{root} belongs to {', '.join(CALLERS[root])}, not to {me}")
        if me == "reward_models" and root == "diffinstruct":
            found.add("rewards know nothing of the trainer")
        if room == "method" and root not in {"torch", "diffinstruct", *METHOD_ALSO.get(me, ()), *sys.stdlib_module_names}:
            found.add(f"method is torch only, not {root}")
        if target in ROOMS and room in ROOMS and ROOMS.index(target) > ROOMS.index(room):
            found.add(f"{target} comes after {room}")
        if room == "method" and target in ROOMS and target != "method":
            found.add(f"method uses nothing else, not {target}")
    return sorted(found)


SOURCES = [
    path.relative_to(ROOT)
    for folder in ("platform", "reward_models", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path):
    assert offences(path, (ROOT / path).read_text()) == []


def test_every_room_has_its_place():
    rooms = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    rooms |= {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms == set(ROOMS), "place it in ROOMS"


def test_the_source_root_is_no_package():
    """With an __init__.py it would hide the standard library's `platform`, which torch and Ray import."""
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("training/local.py", "def f():\n    import ray.train", "ray belongs to cluster"),
        ("training/loop.py", "import importlib\nimportlib.import_module('ray')", "ray belongs to cluster"),
        ("tracking/journal.py", "from mlflow import log_metric", "mlflow belongs to tracking.mlflow"),
        ("training/loop.py", "from diffusers.models import UNet2DModel", "diffusers belongs to models"),
        ("method/objectives.py", "import numpy", "method is torch only"),
        ("method/step.py", "from diffinstruct import errors", "method uses nothing else"),
        ("method/step.py", "from ..training import loop", "training comes after method"),
        ("models/pipeline.py", "from diffinstruct.training.loop import train", "training comes after models"),
        ("training/local.py", "from diffinstruct.cluster import train", "cluster comes after training"),
        ("cluster/train.py", "from ..cli.main import main", "cli comes after cluster"),
        ("cluster/train.py", "def f():\n    import diffinstruct.reports.page", "reports comes after cluster"),
        ("training/loop.py", "from experiments.quickstart import main", "nobody imports experiments"),
    ],
)
def test_a_planted_import_is_found(path, source, offence):
    found = offences(Path("platform/diffinstruct", path), source)
    assert any(offence in one for one in found), found


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("reward_models/x.py", "from diffinstruct.method.rewards import scored", "rewards know nothing"),
        ("reward_models/x.py", "try:\n    import ray\nexcept ImportError: pass", "ray belongs to cluster"),
        ("experiments/x.py", "import benchmarks", "experiments may not use benchmarks"),
    ],
)
def test_a_planted_import_outside_the_package_is_found(path, source, offence):
    assert any(offence in one for one in offences(Path(path), source)), offences(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("platform/diffinstruct/cluster/train.py", "import ray\nfrom .reward_pool import x\nfrom ..training import loop"),
        ("platform/diffinstruct/method/step.py", "import torch\nfrom diffinstruct.method.guidance import guided"),
        ("platform/diffinstruct/tracking/mlflow.py", "import mlflow"),
        ("reward_models/x.py", "import transformers\nfrom . import load"),
        ("benchmarks/x.py", "import ray\nimport reward_models"),
        ("experiments/x.py", "import diffusers\nfrom diffinstruct.sweeps import tune"),
    ],
)
def test_a_rightful_import_is_not(path, source):
    assert offences(Path(path), source) == []


# ------------------------------------------------------------------------------------------ files are UTF-8
def locale_dependent(source: str) -> list[int]:
    """The lines that read or write text in whatever encoding the machine's locale has."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name not in ("read_text", "write_text", "open") or any(keyword.arg == "encoding" for keyword in call.keywords):
            continue
        if name == "open":
            owner = ast.unparse(call.func.value) if isinstance(call.func, ast.Attribute) else "builtins"
            others = {"Image", "os", "trials", "self.state.rewards", "tarfile"}  # whose `open` is another thing
            modes = [
                value.value for value in (*call.args, *(k.value for k in call.keywords)) if isinstance(value, ast.Constant)
            ]
            if owner in others or any(isinstance(mode, str) and set(mode) <= set("rwab+x") and "b" in mode for mode in modes):
                continue
        found.append(call.lineno)
    return found


def test_all_text_files_are_utf_8() -> None:
    files = [file for room in ("platform", "reward_models", "experiments") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    assert not {str(file): lines for file in files if (lines := locale_dependent(file.read_text(encoding="utf-8")))}
    assert locale_dependent("path.read_text()\nopen(path)\nopen(path, 'rb')\npath.open('w', encoding='utf-8')") == [1, 2]


# ------------------------------------------------------------------------------------------ programs within strings
def no_programs(source: str) -> list[int]:
    """The lines of strings that look like a program and do not compile; no linter looks into them."""

    def compiles(program: str) -> bool:
        try:
            compile(dedent(program), "<string>", "exec")
        except SyntaxError:
            return False
        return True

    strings = [(node.value, node.lineno) for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant)]
    programs = [(text, line) for text, line in strings if isinstance(text, str) and re.search(r"\n *import \w", text)]
    return [line for program, line in programs if not compiles(program)]


def test_programs_within_strings_compile() -> None:
    """The long tests and the benchmarks hand some to new processes, and would only tell after an hour."""
    files = [file for room in ("tests", "benchmarks", "experiments") for file in (ROOT / room).rglob("*.py")]
    assert len(files) > 100
    assert not {str(file): lines for file in files if (lines := no_programs(file.read_text(encoding="utf-8")))}
    assert no_programs("x = '''\nimport os\nprint(os) while 1:\n'''\ny = '''\nimport os\n'''") == [1]
