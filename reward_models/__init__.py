"""Rewards: plain torch modules, one file each, `module(images [B, 3, H, W] in [0, 1], prompts) -> scores [B]`.

Higher is better. A reward brings its own differentiable resize and normalisation, so that gradients reach the pixels,
and knows nothing of the trainer. One of your own is named by its import path `module:name`: a class, or a function, that is
called without arguments and makes the reward.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

NAMES = {
    "pickscore": "reward_models.clip_preference:pickscore",
    "pocket_judge": "reward_models.clip_preference:pocket_judge",
    "pocket_preference": "reward_models.clip_preference:pocket_preference",
}
"""Short name -> import path. Reading it imports no torch."""


def load(name: str, **settings: object) -> nn.Module:
    """The reward of a short name of `NAMES`, or of an import path `module:callable` called with `settings`.

    Raises ValueError for a name that is neither, with the nearest one that exists.
    """
    module, colon, attribute = NAMES.get(name, name).partition(":")
    if not colon:
        raise ValueError(f"no reward is named {name!r}{_nearest(name, NAMES)} ('module:callable' names your own)")
    found = importlib.import_module(module)
    if not hasattr(found, attribute):
        raise ValueError(f"reward {name!r}: {module} has no {attribute!r}{_nearest(attribute, vars(found))}")
    return getattr(found, attribute)(**settings)


def _nearest(name: str, known: dict[str, object] | dict[str, str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(k for k in known if k[0] != '_')}"
