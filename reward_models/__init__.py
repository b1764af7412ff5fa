"""Rewards: plain torch modules, one file each.

The contract: `reward(images [B, 3, H, W] float in [0, 1], prompts: list of B str) -> scores [B]`, higher is better,
differentiable in the images, no parameter trainable. A reward brings its own differentiable resize and normalisation,
so that gradients reach the pixels, and knows nothing of the trainer. A score depends on its own image and prompt alone.

One of your own is named by its import path `module:name`: a class, or a function, that is called without arguments and
makes the reward; docs/how-to/own-reward.md shows one. A built-in one is a file here that declares `ENTRIES` and has a
callable of that name.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """What a reward's file declares of it, in `ENTRIES`, before it is loaded.

    path: its import path; the callable that makes "hpsv2.1" is `hpsv2_1`.
    line: what it measures.
    range: where its scores lie, in words.
    paper: arXiv number; "-" where there is none.
    weights: hub id and file, or where else they come from.
    licences: of code and weights, as far as their authors say.
    """

    path: str
    line: str
    range: str
    paper: str
    weights: str
    licences: str


def _declared() -> dict[str, Entry]:
    """Read `ENTRIES` of every file here, a literal, without running it: names are known before torch is imported."""
    entries = {}
    for file in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ENTRIES":
                for name, facts in ast.literal_eval(node.value).items():
                    entries[name] = Entry(f"reward_models.{file.stem}:{name.replace('.', '_')}", **facts)
    return entries


NAMES = _declared()
"""Short name -> entry, as the files of this folder declare them."""


def load(name: str, **settings: object) -> nn.Module:
    """The reward of a short name of `NAMES`, or of an import path `module:callable`, called with `settings`.

    Raises ValueError for a name that is neither, with the nearest one that exists, and for what wants arguments and
    gets none.
    """
    path = NAMES[name].path if name in NAMES else name
    module, colon, attribute = path.partition(":")
    if not colon:
        raise ValueError(f"no reward is named {name!r}{_nearest(name, NAMES)} ('module:callable' names your own)")
    found = importlib.import_module(module)
    if not hasattr(found, attribute):
        raise ValueError(f"reward {name!r}: {module} has no {attribute!r}{_nearest(attribute, vars(found))}")
    made_by = getattr(found, attribute)
    if not settings:
        _refuse_what_takes_arguments(name, made_by)
    return made_by(**settings)


def _refuse_what_takes_arguments(name: str, made_by: object) -> None:
    """The usual mistake is to name the reward itself, a function of images and prompts, or a module that is made
    already."""
    called = made_by if isinstance(made_by, type) else getattr(made_by, "forward", made_by)
    try:
        inspect.signature(called).bind()  # type: ignore[arg-type]  # what cannot be called is a TypeError, too
    except TypeError as error:
        raise ValueError(
            f"reward {name!r}: a class or a function without arguments is wanted, which makes the reward; this one: {error}"
        ) from None


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(k for k in known if k[0] != '_')}"
