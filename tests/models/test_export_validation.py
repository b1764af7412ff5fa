"""What published pipelines say in their configurations: understood to the picture, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from tiny import pipelines

from diffinstruct.errors import UserError
from diffinstruct.models import export_validation
from diffinstruct.models.export import export, load_export
from diffinstruct.models.export_validation import validate_export
from diffinstruct.models.families import StableDiffusionXL
from diffinstruct.models.pipeline import load_reference
from diffinstruct.planning.check import SHAPES, shapes
from diffinstruct.training.build import check_reference, make_step_config

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
TRAINED = np.linspace(1e-4, 2e-2, 1000).tolist()
SCHEDULERS: dict[str, dict[str, Any]] = {
    "PNDM": {"_class_name": "PNDMScheduler", **BETAS, "skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1},
    "DPM++": {"_class_name": "DPMSolverMultistepScheduler", **BETAS, "use_karras_sigmas": True},
    "LCM": {"_class_name": "LCMScheduler", **BETAS, "original_inference_steps": 50},
    "TCD": {"_class_name": "TCDScheduler", **BETAS},
    "ancestral": {"_class_name": "EulerAncestralDiscreteScheduler", **BETAS},
    "cosine": {"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 1000},
    "trained": {"_class_name": "DDIMScheduler", "trained_betas": TRAINED, "beta_schedule": "linear"},
    "sample": {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "sample"},
    "v": {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction"},
    "v zero SNR": {"_class_name": "DDIMScheduler", **BETAS, "prediction_type": "v_prediction", **ZERO_SNR},
    "Euler v zero SNR": {"_class_name": "EulerDiscreteScheduler", **BETAS, "prediction_type": "v_prediction", **ZERO_SNR},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: pipelines.build(tmp_path_factory.mktemp(name) / "m", family=name) for name in pipelines.FAMILIES}


def changed(folder: Path, file: str, values: dict[str, Any], replace: bool = False) -> Path:
    """The pipeline with other values in one configuration."""
    path = folder / file
    path.write_text(json.dumps(values if replace else json.loads(path.read_text()) | values))
    return folder


@pytest.fixture
def tiny(tmp_path) -> Path:
    return pipelines.build(tmp_path / "m")


def compared(folder: Path, tmp_path: Path, timestep: int, scale: Any) -> tuple[np.ndarray, np.ndarray]:
    """The picture that rewards see, and the one that the exported stock pipeline draws of the same noise."""
    reference = load_reference(str(folder))
    export(str(folder), reference.generator(timestep, "reference", scale), tmp_path / "export")
    reference, generator = load_export(tmp_path / "export")
    z = torch.randn(1, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    ours = reference.sampler(generator)(["a red thing"], z)[0].permute(1, 2, 0).numpy()
    stock = DiffusionPipeline.from_pretrained(tmp_path / "export")
    stock.set_progress_bar_config(disable=True)
    size = {"height": 32, "width": 32}
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "latents": z.clone(), "output_type": "np"}
    return ours, stock("a red thing", **call, **size).images[0]


@pytest.mark.parametrize("scale", ["unit", "sigma"])
@pytest.mark.parametrize("family", pipelines.FAMILIES)
def test_every_familys_own_configurations_are_right(folders, family, scale) -> None:
    flow = pipelines.FAMILIES[family].timestep == 999
    validate_export(load_reference(str(folders[family])), pipelines.FAMILIES[family].timestep, "unit" if flow else scale)


@pytest.mark.parametrize("model", [path.name.replace("--", "/") for path in sorted(SHAPES.iterdir())])
def test_published_models_are_validated_without_their_weights(model) -> None:
    reference = load_reference(shapes(model))
    if reference.family.flow:
        validate_export(reference, 999, "unit")
    else:
        validate_export(reference, 399, "sigma")


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", ["unit", "sigma"])
def test_schedulers_of_published_pipelines(tiny, tmp_path, name, scale) -> None:
    folder = changed(tiny, "scheduler/scheduler_config.json", SCHEDULERS[name], replace=True)
    timestep = 999 if "zero SNR" in name else 625
    validate_export(load_reference(str(folder)), timestep, scale)
    ours, stock = compared(folder, tmp_path, timestep, scale)
    assert np.isfinite(ours).all() and np.abs(ours - stock).max() < 2e-3


NORMALISED = {"latents_mean": [-1.6, 2.3, 1.8, -0.9], "latents_std": [8.5, 5.9, 6.0, 5.2], "scaling_factor": 0.5}


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_a_decoders_own_normalisation(tmp_path, family) -> None:
    """As in Playground v2.5; the stock pipeline of SD 1.5 does not read it."""
    folder = changed(pipelines.build(tmp_path / "m", family=family), "vae/config.json", NORMALISED)
    validate_export(load_reference(str(folder)), 625, "unit")
    ours, stock = compared(folder, tmp_path, 625, "unit")
    assert np.abs(ours - stock).max() < 2e-3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prediction_type": "epsilon", **ZERO_SNR}, r"generator.timestep: should be below 999: alpha is 0 there .*"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction"},
         r"reference.model: the scheduler of .* has use_flow_sigmas, which is for flows; here it should predict epsilon, .*"),
        ({"prediction_type": "flow_prediction"}, r".* has prediction_type 'flow_prediction', which is for flows; .*"),
    ],
)  # fmt: skip
def test_schedulers_that_are_refused(tiny, values, message) -> None:
    folder = changed(tiny, "scheduler/scheduler_config.json", values)
    with pytest.raises(UserError, match=message):
        validate_export(load_reference(str(folder)), 999, "unit")


def test_a_law_that_reaches_zero_terminal_snr_is_refused_for_epsilon(tmp_path) -> None:
    experiment = pipelines.experiment(tmp_path, objective={"t_max": 1000, "t_law": "log_normal"})
    folder, config = Path(experiment.reference.model), "scheduler/scheduler_config.json"
    reference = load_reference(str(changed(folder, config, ZERO_SNR)))
    with pytest.raises(UserError, match=r"objective.t_max: should be at most 999, got 1000: alpha is 0 at the last t"):
        check_reference(experiment, reference)
    reference = load_reference(str(changed(folder, config, {"prediction_type": "v_prediction"})))
    check_reference(experiment, reference)
    t = make_step_config(experiment, reference.schedule).timestep_distribution(torch.arange(1000) / 1000)
    assert t.min() >= 20 and t.max() <= 999 and len(t.unique()) > 100


def test_a_scheduler_without_betas_is_refused_by_what_it_has(tiny) -> None:
    edm = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0, "num_train_timesteps": 1000}
    folder = changed(tiny, "scheduler/scheduler_config.json", edm, replace=True)
    with pytest.raises(UserError, match="is a EDMEulerScheduler, whose sigmas are not made of betas"):
        load_reference(str(folder))


def test_a_schedule_that_its_betas_do_not_give_is_refused(tiny, monkeypatch) -> None:
    import diffusers

    class Shifted(diffusers.DDIMScheduler):
        """Reads a key that we do not."""

        def __init__(self, **config: Any) -> None:
            super().__init__(**config)
            self.alphas_cumprod = self.alphas_cumprod**2

    monkeypatch.setattr(diffusers, "DDPMScheduler", Shifted)
    folder = changed(tiny, "scheduler/scheduler_config.json", {"_class_name": "DDPMScheduler", **BETAS}, replace=True)
    with pytest.raises(UserError, match="has another schedule than its betas give"):
        load_reference(str(folder))


def test_a_network_without_sample_size_is_told_what_is_missing(tiny) -> None:
    config = json.loads((tiny / "unet" / "config.json").read_text())
    del config["sample_size"]
    (tiny / "unet" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"unet/config.json of .* has no sample_size; its edge in latents"):
        load_reference(str(tiny))


def test_a_pipeline_that_draws_otherwise_is_refused(folders, monkeypatch) -> None:
    """Planted: another decoding, another time, a pipeline that raises."""
    reference = load_reference(str(folders["sdxl"]))
    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusionXL, "unscaled", staticmethod(lambda latents, decoder: latents + 0.1))
        with pytest.raises(UserError, match="would export draws another picture"):
            validate_export(reference, 399, "unit")
    with monkeypatch.context() as patch:
        output: Any = StableDiffusionXL.output
        patch.setattr(StableDiffusionXL, "output", staticmethod(lambda *inputs: output(*inputs[:-1], (8, 8))))
        with pytest.raises(UserError, match="feeds its network another added_cond_kwargs"):
            validate_export(reference, 399, "unit")
    with monkeypatch.context() as patch:
        scheduler = export_validation.one_step_scheduler(load_reference(str(folders["sd15"])), reference.generator(500))
        patch.setattr(export_validation, "one_step_scheduler", lambda *_: scheduler)
        with pytest.raises(UserError, match="feeds its network another timestep"):
            validate_export(load_reference(str(folders["sd15"])), 399, "unit")
        patch.setattr(export_validation, "one_step_scheduler", lambda *_: None)
        with pytest.raises(UserError, match="cannot draw: AttributeError"):
            validate_export(reference, 399, "unit")
