"""CLIP as the tower that rewards stand on: image features with gradient, text features remembered.

Radford et al. 2021, arXiv 2103.00020. Rewards that name the same tower share one object, so that whoever holds several
computes its features once: `reward.tower.features(images)`, then each `reward.head(features, prompts)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .weights import at_commit

if TYPE_CHECKING:
    from transformers import CLIPModel

# The published towers, each at the commit that is named for it in other people's public code.
CLIP_L = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
TEXTS_AT_ONCE = 8  # prompts that go through the text model together
TEXTS_KEPT = 16_384  # of 4 KB each for a ViT-H: 64 MiB of main memory at most


def bicubic(images: Tensor, size: tuple[int, int]) -> Tensor:
    """[B, C, H, W] -> [B, C, *size], antialiased, differentiable. On a GPU the gradient of torch's own adds up in any
    order; where deterministic kernels are asked for it is done as what it is, a matrix on either side."""
    if not torch.are_deterministic_algorithms_enabled():
        return F.interpolate(images, size, mode="bicubic", antialias=True)
    down, across = (_bicubic_rows(old, new).to(images) for old, new in zip(images.shape[-2:], size, strict=True))
    with torch.autocast(images.device.type, enabled=False):
        return down @ images @ across.T


@cache
def _bicubic_rows(old: int, new: int) -> Tensor:
    """[new, old]: what each of the new rows takes from the old ones."""
    return F.interpolate(torch.eye(old)[None, None], (new, old), mode="bicubic", antialias=True)[0, 0]


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3, size, size] in [0, 1]: short side to `size`, centre crop, differentiable.

    Within 1.5/255 of Pillow's bicubic, hard edges included: Pillow too goes across, then down, and cuts off the
    overshoot after each. In one pass corners are off by up to 20/255. Of an odd margin the smaller half is cut off
    first, as in transformers; torchvision rounds it to the even number, which may lie one pixel further.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        new_height, new_width = size * height // short, size * width // short
        for target in ((height, new_width), (new_height, new_width)):
            images = bicubic(images, target).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


class ClipTower(nn.Module):
    """A frozen CLIP with its tokenizer and its way of looking at pictures.

    pixels: images [B, 3, H, W] in [0, 1], size -> [B, 3, size, size], differentiable.
    mean, std: of the three channels, for what `pixels` gives.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        clip: CLIPModel,
        tokenizer: Any,
        mean: tuple[float, ...] = OPENAI_MEAN,
        std: tuple[float, ...] = OPENAI_STD,
        pixels: Callable[[Tensor, int], Tensor] = clip_pixels,
    ) -> None:
        super().__init__()
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer, self.pixels = tokenizer, pixels
        self.longest: int = clip.config.text_config.max_position_embeddings  # tokens of a prompt; the rest is cut
        self.size: int = clip.config.vision_config.image_size
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._texts: dict[str, Tensor] = {}

    def features(self, images: Tensor) -> Tensor:
        """What the model sees in images [B, 3, H, W] in [0, 1]: [B, D], not normalised."""
        pixels = (self.pixels(images.float(), self.size) - self.mean) / self.std
        return self.clip.get_image_features(pixel_values=pixels.to(self.clip.dtype)).pooler_output

    def similarity(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Cosine [B] of image features [B, D] and the features of as many prompts."""
        texts = self._text_features(prompts)
        texts = texts.pin_memory() if features.is_cuda else texts  # from there a copy waits for no other work
        return F.cosine_similarity(texts.to(features, non_blocking=True), features)

    def _text_features(self, prompts: list[str]) -> Tensor:
        """Text features [B, D], in main memory."""
        distinct = list(dict.fromkeys(prompts))
        known = {prompt: self._texts.pop(prompt) for prompt in distinct if prompt in self._texts}
        missing = [prompt for prompt in distinct if prompt not in known]
        for part in (missing[i : i + TEXTS_AT_ONCE] for i in range(0, len(missing), TEXTS_AT_ONCE)):
            known |= zip(part, (row.clone() for row in self._encode(part)), strict=False)
        self._texts |= known  # what was used last comes last
        while len(self._texts) > TEXTS_KEPT:
            del self._texts[next(iter(self._texts))]
        return torch.stack([known[prompt] for prompt in prompts])

    @torch.no_grad()
    def _encode(self, prompts: list[str]) -> Tensor:
        """Text features of at most TEXTS_AT_ONCE prompts and of what fills their number up, always in the same shape: a
        score must not depend on which prompts came together or before, or a run that resumes with an empty cache would
        part from the one that was never interrupted. The model reads causally: what pads a text changes nothing."""
        texts = prompts + [""] * (TEXTS_AT_ONCE - len(prompts))
        tokens = self.tokenizer(texts, padding="max_length", truncation=True, max_length=self.longest, return_tensors="pt")
        with torch.autocast(self.clip.device.type, enabled=False):  # whoever asks first, the features are kept
            return self.clip.get_text_features(input_ids=tokens.input_ids.to(self.clip.device)).pooler_output.cpu()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClipTower:
        self._texts.clear()  # a move to another device or type makes other features
        return super()._apply(fn, recurse)


class TowerReward(nn.Module, ABC):
    """A reward that sees images through a tower alone. Subclasses say `_score(features, prompts)`."""

    def __init__(self, tower: ClipTower) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.head(self.features(images), prompts)

    def features(self, images: Tensor) -> Tensor:
        """The tower's features [B, D] of images [B, 3, H, W] in [0, 1]."""
        return self.tower.features(images)

    def head(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] from the tower's features [B, D]."""
        if len(features) != len(prompts):
            raise ValueError(f"{len(features)} images for {len(prompts)} prompts")
        return self._score(features, prompts)

    @abstractmethod
    def _score(self, features: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] from the tower's features [B, D] of as many pictures as there are prompts."""


def load_tower(model: str | Path, processor: str | Path | None = None) -> ClipTower:
    """A tower from a folder or hub id (`owner/name@commit`) of a `CLIPModel` (safetensors).

    `processor`, by default the same, has its tokenizer and its preprocessor configuration.
    Raises ValueError for weights that are not those of the configuration.
    """
    from transformers import CLIPConfig, CLIPModel
    from transformers.utils import logging

    if processor is None:
        processor = model
    if Path(model).is_dir():
        logging.disable_progress_bar()  # of loading; the one of a download stays
    name, commit = at_commit(model)
    kind = CLIPConfig.get_config_dict(name, revision=commit)[0].get("model_type", "clip")
    if kind != "clip":
        raise ValueError(f"{model}: model_type in its config.json is {kind!r}, not 'clip'")
    clip, found = CLIPModel.from_pretrained(
        name,
        revision=commit,
        use_safetensors=True,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # they are refused below, by name
    )
    _refuse_what_does_not_fit(model, found)
    return ClipTower(clip, load_tokenizer(processor), *_mean_and_std(processor))


NAMED = 3  # keys that do not fit, of each kind: of a wrong model it would be hundreds


def _refuse_what_does_not_fit(model: str | Path, found: dict[str, Any]) -> None:
    """transformers fills what is missing or of another shape with random numbers and leaves out what is too much. What
    it passes over on purpose, such as position_ids, is in none of its lists."""
    missing = [f"{name} is missing" for name in sorted(found["missing_keys"])]
    spare = [f"{name} is left over" for name in sorted(found["unexpected_keys"])]
    shapes = [f"{name} has {list(has)} where {list(due)} is due" for name, has, due in sorted(found["mismatched_keys"])]
    wrong = [line for lines in (missing, spare, shapes) for line in lines[:NAMED]]
    if wrong:
        more = len(missing) + len(spare) + len(shapes) - len(wrong)
        raise ValueError(f"{model}: weights do not fit CLIPModel: {', '.join(wrong)}{f', and {more} more' if more else ''}")


def load_tokenizer(source: str | Path) -> Any:
    """The tokenizer of a folder or hub id. Raises ValueError where there is none: transformers would make one up that
    knows no word."""
    from transformers import AutoTokenizer

    name, commit = at_commit(source)
    tokenizer = AutoTokenizer.from_pretrained(name, revision=commit, trust_remote_code=False)  # or it asks, and takes a y
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        whole = "tokenizer.json"
        parts = " and ".join(file for file in tokenizer.vocab_files_names.values() if file != whole)
        raise ValueError(
            f"{source}: no tokenizer in it, there should be {whole} or {parts}; "
            "processor= or tokenizer=, whichever the reward takes, names where they are"
        )
    return tokenizer


def _mean_and_std(processor: str | Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    from transformers.image_processing_base import ImageProcessingMixin

    folder = Path(processor)
    if folder.is_dir() and not any(folder.glob("*processor_config.json")):
        raise ValueError(f"{processor}: no preprocessor_config.json in it, which has the pictures' mean and deviation")
    name, commit = at_commit(processor)
    settings, _ = ImageProcessingMixin.get_image_processor_dict(name, revision=commit)
    return tuple(settings.get("image_mean", OPENAI_MEAN)), tuple(settings.get("image_std", OPENAI_STD))


_towers: WeakValueDictionary[tuple[object, ...], ClipTower] = WeakValueDictionary()


def shared_tower(load: Callable[..., ClipTower], *sources: object) -> ClipTower:
    """`load(*sources)`, or the tower that this gave before, while a reward of this process holds it.

    Moving one of the rewards that share a tower moves it for all. What has no name (a state dict, a configuration) is
    not shared. A local folder is taken to hold the same weights as long as a tower of it is in use.
    """
    if not all(source is None or isinstance(source, str | Path) for source in sources):
        return load(*sources)
    local = (Path(source) if isinstance(source, str | Path) and Path(source).exists() else None for source in sources)
    key = (load, *(path.resolve() if path else source for path, source in zip(local, sources, strict=True)))
    tower = _towers.get(key)
    if tower is None:
        tower = _towers[key] = load(*sources)
    return tower
