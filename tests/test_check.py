"""`check` counts published models on the configuration files in shapes/: exactly theirs, and without a network."""

from __future__ import annotations

from math import prod

import pytest

from diffinstruct.check import SHAPES, report, shapes
from diffinstruct.experiment import Experiment, UserError
from diffinstruct.pretrained import load_reference

VAE, CLIP_L = 83_653_863, 123_060_480
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": 694_659_840,
    },
    "PixArt-alpha/PixArt-XL-2-512x512": {"transformer": 610_856_096, "vae": VAE, "text_encoder": 4_762_310_656},
}  # fmt: skip
"""Parameters of each part."""
PIXELS = {"stable-diffusion-v1-5": 512, "stable-diffusion-xl-base-1.0": 1024, "PixArt-XL-2-512x512": 512}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_shipped_configurations_are_the_published_models(model: str) -> None:
    reference = load_reference(shapes(model))
    parts = {reference.family.part: reference.empty_network(), "vae": reference.empty_decoder(), **reference.empty_encoders()}
    assert {name: sum(prod(p.shape) for p in part.parameters()) for name, part in parts.items()} == PUBLISHED[model]
    edge = PIXELS[model.rpartition("/")[2]] // 8
    assert reference.latent_shape == (4, edge, edge)
    assert len(reference.schedule.alphas) == 1000 and reference.prediction == "epsilon"


def test_the_schedules_are_the_published_ones() -> None:
    """SIM's sigma of 2.5 is PixArt's at t = 440; Stable Diffusion ends at sigma 14.6."""
    for model, t, sigma in (
        ("PixArt-alpha/PixArt-XL-2-512x512", 440, 2.5),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", 999, 14.615),
        ("stabilityai/stable-diffusion-xl-base-1.0", 999, 14.615),
    ):
        schedule = load_reference(shapes(model)).schedule
        assert (schedule.sigmas[t] / schedule.alphas[t]).item() == pytest.approx(sigma, rel=2e-3)


def test_only_check_takes_them_and_only_where_no_folder_has_the_name(tmp_path, monkeypatch) -> None:
    assert {path.name for path in SHAPES.iterdir()} == {model.replace("/", "--") for model in PUBLISHED}
    assert all(path.suffix == ".json" for path in SHAPES.rglob("*") if path.is_file())
    monkeypatch.chdir(tmp_path)
    model = next(iter(PUBLISHED))
    with pytest.raises(UserError, match="cannot read"):
        load_reference(model)
    (tmp_path / model).mkdir(parents=True)
    assert shapes(model) == model and shapes(".") == "." and shapes("pocket") == "pocket"


def test_a_table_without_network_weights_or_start() -> None:
    values = Experiment().model_dump() | {"rewards": {"trained": [{"name": "pocket_preference"}], "held_out": []}}
    values["reference"]["model"] = "stabilityai/stable-diffusion-xl-base-1.0"
    values["generator"] |= {"start": "/nowhere.safetensors", "lora_rank": 64}
    values["score_network"]["lora_rank"] = 64
    text, problem = report(Experiment.model_validate(values))
    assert problem == "generator.start: no such file: /nowhere.safetensors"
    assert "2567.46" in text and "694.66" in text and "generator's adapter" in text
