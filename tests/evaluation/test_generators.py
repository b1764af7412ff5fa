"""What generators are compared with."""

import torch

from diffinstruct.config.sections import ReferenceConfig
from diffinstruct.evaluation.features import FeaturesOnly
from diffinstruct.evaluation.generators import _reference_features
from diffinstruct.models.pipeline import Reference


def test_the_references_own_pictures_have_the_runs_guidance(monkeypatch):
    scales = []

    def sample(self, prompts, z, steps, guidance_scale):
        scales.append(guidance_scale)
        return torch.zeros_like(z)

    monkeypatch.setattr(Reference, "sample", sample)
    extractor = FeaturesOnly(lambda images: images.flatten(1)[:, :2])
    features = _reference_features(ReferenceConfig(guidance_scale=4.5), extractor, ["a", "b"], 0, torch.device("cpu"))
    assert scales == [4.5] and features.shape == (2, 2)
