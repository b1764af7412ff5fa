"""PickScore's form of a preference model: a CLIP whose image-text similarity was trained on human choices.

Kirstain et al. 2023, "Pick-a-Pic", arXiv 2305.01569: score = exp(logit_scale) * cos(text, image).
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
TEXTS_KEPT = 65_536  # of 4 KB each for a ViT-H: 270 MB at most


class ClipPreference(nn.Module):
    """Score [B] of images [B, 3, H, W] in [0, 1] for their prompts; frozen, differentiable in the images only.

    `model` is a folder or hub id of a `CLIPModel` (safetensors); `processor`, by default the same, has its tokenizer
    and its preprocessor configuration. A local folder without the latter means CLIP's own mean and deviation. The
    picture's short side is resized to the size the model sees and the middle is cut out, as for PickScore.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: str | Path, processor: str | Path | None = None) -> None:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.utils import logging

        super().__init__()
        processor = processor or model
        if Path(model).is_dir():
            logging.disable_progress_bar()  # of loading; the one of a download stays
        self.clip = CLIPModel.from_pretrained(model, use_safetensors=True, dtype=torch.float32).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(processor)
        self.size: int = self.clip.config.vision_config.image_size
        mean, std = _mean_and_std(processor)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self._texts: dict[str, Tensor] = {}

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} images for {len(prompts)} prompts")
        pictures = self.features(images)
        texts = torch.stack([self._text(prompt) for prompt in prompts]).to(pictures)
        return self.clip.logit_scale.exp() * F.cosine_similarity(texts, pictures)

    def features(self, images: Tensor) -> Tensor:
        """What the model sees in images [B, 3, H, W] in [0, 1]: [B, D], not normalised."""
        pixels = (clip_pixels(images.float(), self.size) - self.mean) / self.std
        return self.clip.get_image_features(pixel_values=pixels.to(self.clip.dtype)).pooler_output

    def _text(self, prompt: str) -> Tensor:
        """Text features [D]. One prompt a forward: a score must not depend on which prompts came together or before,
        or a run that resumes with an empty cache would part from the one that was never interrupted."""
        if prompt not in self._texts:
            tokens = self.tokenizer([prompt], truncation=True, max_length=self._longest, return_tensors="pt")
            with torch.no_grad():
                features = self.clip.get_text_features(**tokens.to(self.clip.device)).pooler_output[0]
            if len(self._texts) >= TEXTS_KEPT:
                self._texts.pop(next(iter(self._texts)))
            self._texts[prompt] = features
        return self._texts[prompt]

    @property
    def _longest(self) -> int:
        return self.clip.config.text_config.max_position_embeddings


def clip_pixels(images: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] in [0, 1] -> [B, 3, size, size] in [0, 1]: short side to `size`, centre crop, differentiable.

    Within 1.5/255 of Pillow's bicubic, hard edges included: Pillow too goes across, then down, and cuts off the
    overshoot after each. In one pass corners are off by up to 20/255.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    if short != size:
        new_height, new_width = size * height // short, size * width // short
        for target in ((height, new_width), (new_height, new_width)):
            images = F.interpolate(images, target, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]


def _mean_and_std(processor: str | Path) -> tuple[list[float], list[float]]:
    from transformers.image_processing_base import ImageProcessingMixin

    folder = Path(processor)
    if folder.is_dir() and not any(folder.glob("*processor_config.json")):
        return list(OPENAI_MEAN), list(OPENAI_STD)
    settings, _ = ImageProcessingMixin.get_image_processor_dict(processor)
    return settings.get("image_mean", list(OPENAI_MEAN)), settings.get("image_std", list(OPENAI_STD))


def pickscore() -> ClipPreference:
    """PickScore v1 from the hub, ViT-H at 224 px. Scores lie near 22: result tables print a hundredth of it."""
    return ClipPreference("yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K")


def pocket_preference() -> ClipPreference:
    """The pocket world's preference model, the one to train on."""
    return ClipPreference(_pocket("preference"))


def pocket_judge() -> ClipPreference:
    """The pocket world's second preference model, of other data and seed: held out."""
    return ClipPreference(_pocket("judge"))


def _pocket(name: str) -> Path:
    """The pocket world lies in the trainer's package, which is located, never imported: rewards stand alone."""
    spec = importlib.util.find_spec("diffinstruct")
    if spec is None or spec.submodule_search_locations is None:
        raise FileNotFoundError("the pocket rewards lie in the package diffinstruct, which is not installed here")
    folder = Path(next(iter(spec.submodule_search_locations)), "pocket", name)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is missing; experiments/build_pocket_world.py builds it")
    return folder
