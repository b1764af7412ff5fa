"""What a configuration's precision sets."""

from typing import Any, cast

import pytest
import torch

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.precision import use_precision
from diffinstruct.training.trainer import Trainer

BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)


@pytest.fixture(autouse=True)
def _restored():
    before = [backend.allow_tf32 for backend in BACKENDS]
    yield
    for backend, allowed in zip(BACKENDS, before, strict=True):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_both_switches_of_tf32_follow_the_configuration(precision, monkeypatch, tmp_path):
    for backend in BACKENDS:
        backend.allow_tf32 = precision == "fp32"
    use_precision(precision)
    assert [backend.allow_tf32 for backend in BACKENDS] == [precision == "bf16"] * 2
    for backend in BACKENDS:
        backend.allow_tf32 = precision == "fp32"
    experiment = Experiment.model_validate({"precision": precision})
    with pytest.raises(AttributeError):  # a run sets them before anything else
        Trainer(experiment, tmp_path, None, cast(Any, None), None)
    assert [backend.allow_tf32 for backend in BACKENDS] == [precision == "bf16"] * 2
