"""The import arrows: who may import what, lazy imports inside functions included."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "platform" / "diffinstruct"
OURS = {"diffinstruct", "reward_models", "experiments", "benchmarks", "tests"}

# From the ground up. A module imports from floors below its own; a room (a folder) also from itself.
FLOORS = [
    {"__init__", "diffusion", "distances", "experiment", "orders", "watch"},
    {"locks"},
    {"aim", "embeddings", "families", "guidance", "objectives", "rewards", "prompts", "checkpoint", "tracking"},
    {"step", "pretrained", "sharding", "evaluation", "handshake", "preflight", "mirror"},
    {"roles", "results", "jury"},
    {"export"},
    {"run", "examination", "pocket_world", "scoring", "figures"},
    {"local", "footprint", "report"},
    {"check"},
    {"cluster", "comparison"},
    {"cli"},
    {"__main__"},
]
TORCH_ONLY = {"diffusion", "distances", "guidance", "objectives", "rewards", "step"}
TORCH_ONLY_MAY_USE = {"step": TORCH_ONLY, "objectives": {"diffusion", "distances"}, "guidance": {"diffusion"}}
# Experiments use the public interface: the trainer, and the rewards that a planted one is built on (experiments/hackable.py).
SCRIPTS_MAY_USE = {"experiments": {"diffinstruct", "reward_models"}, "benchmarks": {"diffinstruct", "reward_models"}}
CALLERS = {  # third-party package -> the modules of ours that may import it
    "ray": {"cluster"},
    "mlflow": {"tracking"},
    "fsspec": {"mirror", "preflight", "experiment"},
    "optuna": {"cluster"},
    "diffusers": {"pretrained", "roles", "export", "reward_models"},
    "transformers": {"pretrained", "roles", "export", "reward_models"},
    "peft": {"roles", "reward_models"},
}


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


def floor(module: str) -> int | None:
    return next((i for i, names in enumerate(FLOORS) if module in names), None)


def offences(path: Path, source: str) -> list[str]:
    """What `source`, standing at `path` (relative to the repository), imports and may not, in words."""
    top, *below_top = path.with_suffix("").parts
    found = set()
    if top in SCRIPTS_MAY_USE:
        roots = {name.partition(".")[0] for name in imported(source, top)}
        return [f"{top} may not use {root}" for root in sorted(roots & OURS - SCRIPTS_MAY_USE[top])]
    me = below_top[1] if top == "platform" else top
    for name in imported(source, ".".join(below_top[:-1]) or top):
        root, _, rest = name.partition(".")
        target = rest.partition(".")[0] if root == "diffinstruct" else ""
        if root in ("experiments", "benchmarks", "tests"):
            found.add(f"nobody imports {root}")
        if me not in CALLERS.get(root, {me}):
            found.add(f"{root} belongs to {', '.join(sorted(CALLERS[root]))}, not to {me}")
        if me == "reward_models" and root == "diffinstruct":
            found.add("rewards know nothing of the trainer")
        if me in TORCH_ONLY and root not in {"torch", "diffinstruct", *sys.stdlib_module_names}:
            found.add(f"{me} is torch only, not {root}")
        if floor(target) is not None and target != me and top == "platform":
            if me in TORCH_ONLY and target not in TORCH_ONLY_MAY_USE.get(me, set()):
                found.add(f"{me} may not use {target}")
            elif floor(target) >= floor(me):
                found.add(f"{target} is not below {me}")
    return sorted(found)


SOURCES = [
    path.relative_to(ROOT)
    for folder in ("platform", "reward_models", "experiments", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_point_one_way(path):
    assert offences(path, (ROOT / path).read_text()) == []


def test_every_module_has_its_floor():
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    modules |= {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert {module for module in modules if floor(module) is None} == set(), "place it in FLOORS"


def test_the_source_root_is_no_package():
    """With an __init__.py it would hide the standard library's `platform`, which torch and Ray import."""
    assert not (ROOT / "platform" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("path", "source", "offence"),
    [
        ("platform/diffinstruct/local.py", "def f():\n    import ray.train", "ray belongs to cluster"),
        ("platform/diffinstruct/run.py", "import importlib\nimportlib.import_module('ray')", "ray belongs to cluster"),
        ("platform/diffinstruct/cluster/train.py", "from mlflow import log_metric", "mlflow belongs to tracking"),
        ("platform/diffinstruct/run.py", "from diffusers.models import UNet2DModel", "diffusers belongs to"),
        ("platform/diffinstruct/objectives.py", "import numpy", "objectives is torch only"),
        ("platform/diffinstruct/objectives.py", "from .guidance import guided", "objectives may not use guidance"),
        ("platform/diffinstruct/step.py", "from diffinstruct import run", "step may not use run"),
        ("platform/diffinstruct/pretrained.py", "from diffinstruct.run import train", "run is not below pretrained"),
        ("platform/diffinstruct/local.py", "from diffinstruct.cluster import train", "cluster is not below local"),
        ("platform/diffinstruct/cluster/train.py", "from ..cli import main", "cli is not below cluster"),
        ("platform/diffinstruct/run.py", "from experiments.quickstart import main", "nobody imports experiments"),
        ("reward_models/x.py", "from diffinstruct.rewards import checked", "rewards know nothing"),
        ("reward_models/x.py", "try:\n    import ray\nexcept ImportError: pass", "ray belongs to cluster"),
        ("experiments/x.py", "import benchmarks", "experiments may not use benchmarks"),
    ],
)
def test_a_planted_import_is_found(path, source, offence):
    assert any(offence in found for found in offences(Path(path), source)), offences(Path(path), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "platform/diffinstruct/cluster/sweep.py",
            "import ray\nfrom diffinstruct.cluster.train import run\nfrom .rewards import x",
        ),
        ("platform/diffinstruct/step.py", "import torch\nfrom diffinstruct.guidance import guided"),
        ("reward_models/x.py", "import transformers\nfrom . import load"),
        ("benchmarks/x.py", "import ray\nimport reward_models"),
        ("experiments/x.py", "import diffusers\nfrom diffinstruct.cluster import sweep"),
    ],
)
def test_a_rightful_import_is_not(path, source):
    assert offences(Path(path), source) == []
