"""Features of pictures, to measure distances with, and their attributes where there is ground truth."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from torch import Tensor, nn


class FeatureExtractor(Protocol):
    """It turns pictures into features to measure distances with, and classifies the attributes that it knows."""

    @property
    def classes(self) -> dict[str, list[str]]:
        """Attribute -> its class names, in the order of the logits; empty where there is no ground truth."""

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, 3, H, W] -> features [B, F] and, per attribute, logits [B, number of its classes]."""


@dataclass(frozen=True)
class FeaturesOnly:
    """A feature extractor without ground truth: the image tower of a reward, say."""

    features: Callable[[Tensor], Tensor]
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __call__(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.features(images), {}


def _block(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride, padding=1)
    return nn.Sequential(convolution, nn.GroupNorm(8, channels_out), nn.SiLU())


class AttributeClassifier(nn.Module):
    """The ground truth of a world: which attributes a picture of `pixels` x `pixels` shows.

    `classes` maps an attribute to its class names, in the order of the logits. The features keep the position of what
    they saw (no pooling): the artwork is at fixed places.
    """

    def __init__(self, classes: dict[str, list[str]], pixels: int = 64) -> None:
        super().__init__()
        self.classes, self.pixels = classes, pixels
        self.trunk = nn.Sequential(_block(3, 32), _block(32, 64, 2), _block(64, 96, 2), _block(96, 128, 2), _block(128, 128))
        self.features = nn.Sequential(nn.Flatten(), nn.Linear(128 * (pixels // 8) ** 2, 256), nn.SiLU())
        self.heads = nn.ModuleDict({attribute: nn.Linear(256, len(names)) for attribute, names in classes.items()})

    def forward(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Images [B, 3, pixels, pixels] -> features [B, 256] and, per attribute, logits [B, number of its classes]."""
        features = self.features(self.trunk(images))
        return features, {attribute: head(features) for attribute, head in self.heads.items()}

    def save(self, folder: Path | str) -> None:
        """Write `model.safetensors` and `config.json`."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), Path(folder, "model.safetensors"))
        Path(folder, "config.json").write_text(
            json.dumps({"classes": self.classes, "pixels": self.pixels}, indent=2) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Read what `save` wrote: frozen, in evaluation mode, on the CPU."""
        from safetensors.torch import load_file

        classifier = cls(**json.loads(Path(folder, "config.json").read_text(encoding="utf-8")))
        classifier.load_state_dict(load_file(Path(folder, "model.safetensors")))
        return classifier.eval().requires_grad_(False)
