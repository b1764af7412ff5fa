"""What generators are compared with, in how much memory and in which precision."""

import weakref
from pathlib import Path

import pytest
import torch
from tiny import pipelines

from diffinstruct.config.sections import ReferenceConfig
from diffinstruct.errors import UserError
from diffinstruct.evaluation import generators
from diffinstruct.evaluation.features import FeaturesOnly
from diffinstruct.evaluation.generators import _reference_features
from diffinstruct.models.export import draw, export
from diffinstruct.models.pipeline import Reference, load_reference

CPU = torch.device("cpu")
FEATURES = FeaturesOnly(lambda images: images.flatten(1)[:, :2])


def test_the_references_own_pictures_have_the_runs_guidance(monkeypatch):
    scales = []

    def sample(self, prompts, z, steps, guidance_scale):
        scales.append(guidance_scale)
        return torch.zeros_like(z)

    monkeypatch.setattr(Reference, "sample", sample)
    features = _reference_features(ReferenceConfig(guidance_scale=4.5), "fp32", FEATURES, ["a", "b"], 0, CPU)
    assert scales == [4.5] and features.shape == (2, 2)


class Decoder:
    """Memory for three pictures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        self.alive: list[weakref.ref[torch.Tensor]] = []
        monkeypatch.setattr(Reference, "decode", lambda reference, latents: self(latents))
        monkeypatch.setattr(Reference, "sample", lambda reference, prompts, z, *more: z)

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        self.asked.append(len(latents))
        if len(latents) > 3:
            raise torch.OutOfMemoryError("as if")
        assert not any(picture() is not None for picture in self.alive)
        self.alive.append(weakref.ref(pictures := latents[:, :3].sigmoid()))
        return pictures


def test_the_references_pictures_are_as_few_as_memory_holds(monkeypatch):
    decoder = Decoder(monkeypatch)
    texts = ["a thing"] * 9
    features = _reference_features(ReferenceConfig(), "fp32", FEATURES, texts, 0, CPU)
    assert features.shape == (9, 2) and decoder.asked == [9, 5, 3, 3, 3]
    monkeypatch.setattr(Reference, "decode", lambda reference, latents: decoder(latents.repeat(4, 1, 1, 1)))
    with pytest.raises(UserError, match=r"^pocket: out of memory with one picture at a time; [^\n]*$"):
        _reference_features(ReferenceConfig(), "fp32", FEATURES, texts, 0, CPU)


def test_pictures_that_are_shown_are_as_few_as_memory_holds(monkeypatch):
    decoder = Decoder(monkeypatch)
    noise = torch.randn(9, *pipelines.LATENT, generator=torch.Generator().manual_seed(0))
    pictures = draw(lambda prompts, z: decoder(z), ["a thing"] * 9, noise)
    assert decoder.asked == [9, 5, 3, 3, 3] and len({picture.tobytes() for picture in pictures}) == 9


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_are_measured_in_the_runs_precision(precision: str, tmp_path: Path) -> None:
    generator = load_reference(str(pipelines.build(tmp_path / "tiny"))).generator(625)
    folder = export(str(tmp_path / "tiny"), generator, tmp_path / "export")
    noise = torch.randn(2, *pipelines.LATENT, generator=torch.Generator().manual_seed(0))
    exact, _ = generators.sampler(folder, "fp32", CPU)
    sample, shape = generators.sampler(folder, precision, CPU)
    difference = (sample(["a red hat"] * 2, noise) - exact(["a red hat"] * 2, noise)).abs().max()
    assert shape == pipelines.LATENT and difference == 0 if precision == "fp32" else 1e-4 < difference < 0.2
