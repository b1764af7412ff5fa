"""What generators are compared with."""

import pandas as pd
import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.evaluation.features import FeaturesOnly
from diffinstruct.evaluation.generators import _reference_features
from diffinstruct.models.pipeline import Reference


def test_the_references_own_pictures_have_the_runs_guidance(monkeypatch):
    scales = []

    def sample(self, prompts, z, steps, guidance_scale):
        scales.append(guidance_scale)
        return torch.zeros_like(z)

    monkeypatch.setattr(Reference, "sample", sample)
    run = Experiment.model_validate({"reference": {"guidance_scale": 4.5}})
    extractor = FeaturesOnly(lambda images: images.flatten(1)[:, :2])
    features = _reference_features(run, extractor, pd.DataFrame({"prompt": ["a", "b"]}), 2, 0, torch.device("cpu"))
    assert scales == [4.5] and features is not None and features.shape == (2, 2)
