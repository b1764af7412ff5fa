"""Rewards: plain torch modules, one file each.

The contract: `reward(images [B, 3, H, W] float in [0, 1], prompts: list of B str) -> scores [B]`, higher is better,
differentiable in the images, no parameter trainable. A reward brings its own differentiable resize and normalisation,
so that gradients reach the pixels, and knows nothing of the trainer. A score depends on its own image and prompt alone.

One of your own is named by its import path `module:name`: a class, or a function, that is called without arguments and
makes the reward. docs/how-to/own-reward.md shows one.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Entry:
    """What is known of a reward before it is loaded.

    path: its import path `module:callable`.
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


NAMES = {
    "pickscore": Entry(
        path="reward_models.pickscore:pickscore",
        line="preference of Pick-a-Pic's users, for the image given the prompt",
        range="about 18 to 24; result tables print a hundredth of it",
        paper="2305.01569",
        weights="yuvalkirstain/PickScore_v1, processor of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        licences="see the model cards",
    ),
    "hpsv2": Entry(
        path="reward_models.hps:hpsv2",
        line="preference of HPD v2's annotators, for the image given the prompt",
        range="about 0.2 to 0.35; result tables print a hundred times it",
        paper="2306.09341",
        weights="xswu/HPSv2, HPS_v2_compressed.pt; tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        licences="see the model card",
    ),
    "hpsv2.1": Entry(
        path="reward_models.hps:hpsv2_1",
        line="the same, trained again on better data",
        range="about 0.2 to 0.35; result tables print a hundred times it",
        paper="2306.09341",
        weights="xswu/HPSv2, HPS_v2.1_compressed.pt; tokenizer of laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        licences="see the model card",
    ),
    "image_reward": Entry(
        path="reward_models.image_reward:image_reward",
        line="experts' rating of alignment and fidelity, image and prompt read together",
        range="about -2.3 to 2, normalised to mean 0 and deviation 1 on its own data",
        paper="2304.05977",
        weights="zai-org/ImageReward, ImageReward.pt; tokenizer of google-bert/bert-base-uncased",
        licences="Apache-2.0 (weights)",
    ),
    "aesthetic_v1": Entry(
        path="reward_models.aesthetic:aesthetic_v1",
        line="how much the image pleases; the prompt is not read",
        range="about 1 to 10, mostly 4 to 7",
        paper="-",
        weights="LAION-AI/aesthetic-predictor on GitHub, sa_0_4_vit_l_14_linear.pth; openai/clip-vit-large-patch14",
        licences="MIT (head), CLIP: see the model card",
    ),
    "aesthetic_v2": Entry(
        path="reward_models.aesthetic:aesthetic_v2",
        line="how much the image pleases; the prompt is not read",
        range="about 1 to 10, mostly 4 to 7",
        paper="2210.08402",
        weights="christophschuhmann/improved-aesthetic-predictor on GitHub, sac+logos+ava1-l14-linearMSE.pth; "
        "openai/clip-vit-large-patch14",
        licences="Apache-2.0 (head), CLIP: see the model card",
    ),
    "clip_score": Entry(
        path="reward_models.clip_score:clip_score",
        line="agreement of image and prompt, learned from captions, not from preference",
        range="about 15 to 35",
        paper="2104.08718",
        weights="openai/clip-vit-large-patch14",
        licences="see the model card",
    ),
    "pocket_preference": Entry(
        path="reward_models.pocket:pocket_preference",
        line="the pocket world's simulated annotator, the one to train on",
        range="about 3.3 to 5.3 on average over the world's prompts",
        paper="-",
        weights="in the package",
        licences="Apache-2.0",
    ),
    "pocket_judge": Entry(
        path="reward_models.pocket:pocket_judge",
        line="the pocket world's simulated annotator, of other data and seed: held out",
        range="about 2.8 to 3.2 on average over the world's prompts",
        paper="-",
        weights="in the package",
        licences="Apache-2.0",
    ),
}
"""Short name -> entry. Reading it imports no torch."""


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
