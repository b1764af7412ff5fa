"""The reference's parts against diffusers' own pipeline and schedulers, which are the oracle here."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from tiny import pipelines

import diffinstruct
from diffinstruct.config.reading import load
from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.sources import PipelineIndex, pinned
from diffinstruct.models.world import POCKET

PROMPTS = ["a red hat", "", "far too many words for this text encoder, they are cut off"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.build(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return load_reference(str(folder))


@pytest.fixture(scope="module")
def stock(folder: Path) -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def noise(batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *pipelines.LATENT, generator=torch.Generator().manual_seed(seed))


def test_schedule_and_shape_are_the_pipelines(reference: Reference, stock: StableDiffusionPipeline) -> None:
    assert reference.latent_shape == pipelines.LATENT
    assert reference.betas and len(reference.betas) == len(reference.schedule.alphas) == 1000
    torch.testing.assert_close(reference.schedule.alphas**2, stock.scheduler.alphas_cumprod)
    torch.testing.assert_close(reference.schedule.alphas**2 + reference.schedule.sigmas**2, torch.ones(1000))


def test_prompts_are_encoded_as_stock_diffusers_does(reference: Reference, stock: StableDiffusionPipeline) -> None:
    embeddings = reference.encode_prompts(PROMPTS)["prompt_embeds"]
    assert not embeddings.requires_grad
    torch.testing.assert_close(embeddings, stock.encode_prompt(PROMPTS, "cpu", 1, False)[0].detach(), rtol=0, atol=1e-6)
    assert (embeddings[0] - embeddings[1]).abs().max() > 0.1


def test_an_embedding_depends_neither_on_its_batch_nor_on_the_cache(folder: Path, reference: Reference) -> None:
    alone = load_reference(str(folder)).encode_prompts(PROMPTS[2:])["prompt_embeds"]
    for _ in range(2):
        assert torch.equal(reference.encode_prompts(PROMPTS)["prompt_embeds"][2:], alone)
    with torch.autocast("cpu", torch.bfloat16):  # a look, which may be the first to ask
        first = load_reference(str(folder)).encode_prompts(PROMPTS[2:])["prompt_embeds"]
    assert torch.equal(first, alone)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_denoiser_predicts_the_clean_sample_of_diffusers_ddim(prediction: str, tmp_path: Path) -> None:
    reference = load_reference(str(pipelines.build(tmp_path, prediction)))
    denoiser, scheduler = reference.denoiser(), DDIMScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    scheduler.set_timesteps(1000)
    xt, t, c = noise(), torch.tensor([3, 400, 990]), reference.encode_prompts(PROMPTS)
    with torch.no_grad():
        x0_hat, output = denoiser(xt, t, c), denoiser.network(xt, t, c["prompt_embeds"]).sample
    for i in range(3):
        expected = scheduler.step(output[i], t[i], xt[i]).pred_original_sample
        torch.testing.assert_close(x0_hat[i], expected, rtol=1e-5, atol=1e-5)


def test_one_step_generator_is_the_formula_at_its_timestep(reference: Reference) -> None:
    z, c = noise(), reference.encode_prompts(PROMPTS)
    alpha, sigma = reference.schedule.alphas[625], reference.schedule.sigmas[625]
    unit, scaled = reference.generator(625), reference.generator(625, input_scale="sigma")
    with torch.no_grad():
        for xt, generator in ((z, unit), (sigma * z, scaled)):
            eps = generator.denoiser.network(xt, 625, c["prompt_embeds"]).sample
            torch.testing.assert_close(generator(z, c), (xt - sigma * eps) / alpha, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_reference_sample_is_the_stock_pipelines(
    guidance_scale: float, reference: Reference, stock: StableDiffusionPipeline
) -> None:
    z = noise()
    expected = stock(PROMPTS, latents=z, num_inference_steps=7, guidance_scale=guidance_scale, output_type="latent").images
    sample = reference.sample(PROMPTS, z, steps=7, guidance_scale=guidance_scale)
    torch.testing.assert_close(sample, expected, rtol=1e-4, atol=1e-4)


def test_decoded_images_are_the_stock_pipelines(reference: Reference, stock: StableDiffusionPipeline) -> None:
    latents = 3 * noise()
    images = reference.decode(latents)
    expected = stock.image_processor.postprocess(
        stock.vae.decode(latents / stock.vae.config.scaling_factor).sample.detach(), output_type="pt"
    )
    assert torch.equal(images, expected)
    assert images.shape == (3, 3, 32, 32) and images.std() > 0.1 and images.min() >= 0 and images.max() <= 1


def test_decoder_gradient_is_that_of_the_shown_picture(folder: Path) -> None:
    reference = load_reference(str(folder), torch.float64)
    latents, direction = noise().double().requires_grad_(), noise(seed=1).double()
    weights = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def score(x: torch.Tensor) -> torch.Tensor:
        return (reference.decode(x) * weights).sum()

    (gradient,) = torch.autograd.grad(score(latents), latents)
    step = 1e-6
    finite = (score(latents + step * direction) - score(latents - step * direction)) / (2 * step)
    assert finite.abs() > 0.1
    torch.testing.assert_close((gradient * direction).sum(), finite, rtol=1e-5, atol=1e-5)
    reference.vae.decoder.layers[-1].bias.data += 100  # all white: nothing at the latents changes the picture
    assert torch.autograd.grad(score(latents), latents)[0].abs().max() == 0
    assert all(parameter.grad is None for parameter in reference.vae.parameters())


def test_a_networks_dtype_is_asked_once(reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers walks every module for it: 72 ms for SDXL with adapters."""
    denoiser, c = reference.denoiser(), reference.encode_prompts(PROMPTS)
    network: Any = type(denoiser.network)
    asked, dtype = [], network.dtype.fget
    monkeypatch.setattr(network, "dtype", property(lambda self: asked.append(1) or dtype(self)))
    denoiser(noise(), torch.tensor([1, 2, 3]), c)
    ours = len(asked)
    asked.clear()
    denoiser.network(noise(), torch.tensor([1, 2, 3]), c["prompt_embeds"])
    assert ours == len(asked)  # those of diffusers' own forward pass
    assert denoiser.double()(noise().double(), torch.tensor([1, 2, 3]), c).dtype == torch.float64
    assert denoiser.dtype == torch.float64


def test_each_network_is_its_own_copy_and_trains(reference: Reference) -> None:
    one, other, generator = reference.denoiser(), reference.denoiser(), reference.generator(625)
    z, c = noise(), reference.encode_prompts(PROMPTS)
    generator(z, c).pow(2).mean().backward()
    assert all(parameter.grad is not None for parameter in generator.parameters())
    before = {name: value.clone() for name, value in other.state_dict().items()}
    for parameter in (*one.parameters(), *generator.parameters()):
        parameter.data += 1
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
    fresh = reference.denoiser().state_dict()
    assert all(torch.equal(before[name], value) for name, value in fresh.items())


def test_half_precision_files_load_as_asked(tmp_path: Path) -> None:
    pipelines.build(tmp_path, dtype=torch.float16)
    reference = load_reference(str(tmp_path))
    parts = (reference.vae, reference.texts["text_encoder"], reference.denoiser())
    assert {parameter.dtype for part in parts for parameter in part.parameters()} == {torch.float32}


def test_a_generator_starts_from_a_unet_or_from_another_pipeline(reference: Reference, tmp_path: Path) -> None:
    other = reference.denoiser().network
    with torch.no_grad():
        other.conv_out.bias += 1
    other.save_pretrained(tmp_path / "alone")
    other.save_pretrained(tmp_path / "pipeline" / "unet")
    for start in ("alone", "pipeline"):
        unet = reference.generator(625, str(tmp_path / start)).denoiser.network
        assert torch.equal(unet.conv_out.bias, other.conv_out.bias)  # type: ignore[arg-type]


def test_pocket_names_the_folders_inside_the_package(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    shutil.copytree(folder / "unet", tmp_path / "generator")
    assert Path(diffinstruct.__file__).with_name("pocket") == POCKET
    shutil.copy(POCKET / "world.json", tmp_path)
    monkeypatch.setattr("diffinstruct.models.world.POCKET", tmp_path)
    reference = load_reference("pocket")
    assert reference.source == str(tmp_path / "pipeline")
    (tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    reference.generator(625, "pocket-distilled")


def _index(folder: Path, **changes: object) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save({}, weights.with_suffix(".bin"))
    weights.unlink()


def _flow_matching(folder: Path) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda folder: _index(folder, _class_name="FluxPipeline"), ["FluxPipeline", "StableDiffusionPipeline"]),
        (lambda folder: _index(folder, text_encoder=["transformers", "T5EncoderModel"]), ["T5EncoderModel", "CLIPTextModel"]),
        (lambda folder: _index(folder, vae=["diffusers", "VQModel"]), ["VQModel", "AutoencoderTiny"]),
        (lambda folder: (folder / "model_index.json").unlink(), ["model_index.json"]),
        (_pickled, ["unet", "safetensors"]),
        (_flow_matching, ["FlowMatchEulerDiscreteScheduler", "beta_schedule"]),
    ],
)
def test_what_is_not_supported_is_refused_in_one_line(spoil, names: list[str], folder: Path, tmp_path: Path) -> None:
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    spoil(spoilt)
    with pytest.raises(UserError) as refusal:
        load_reference(str(spoilt)).denoiser()
    message = str(refusal.value)
    assert "\n" not in message and "spoilt" in message
    assert [name for name in names if name not in message] == []


def test_a_start_or_timestep_that_does_not_fit_is_refused(reference: Reference, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pipelines.build(other)
    config = json.loads((other / "unet" / "config.json").read_text()) | {"cross_attention_dim": 32}
    network: Any = type(reference.denoiser().network)
    network.from_config(config).save_pretrained(other / "unet")
    with pytest.raises(UserError, match="cross_attention_dim is 32, not 16"):
        reference.generator(625, str(other))
    with pytest.raises(UserError, match=r"got 1000, .* 0 to 999"):
        reference.generator(1000)
    with pytest.raises(UserError, match=r"generator.timestep: should be at least 1 where input_scale is 'sigma', got 0"):
        reference.generator(0, input_scale="sigma")
    (tmp_path / "model.ckpt").touch()
    for key, start, said in [
        ("generator.init_from", "othr", f"no such file or folder: {tmp_path}/othr, did you mean '{tmp_path}/other'?"),
        ("generator.init_from", "model.ckpt", "is no .safetensors file, and files of other kinds are not opened"),
        ("reference.model", "othr", f"no such file or folder: {tmp_path}/othr, did you mean '{tmp_path}/other'?"),
    ]:
        with pytest.raises(UserError, match=rf"^{key}: [^\n]*{re.escape(said)}$"):
            if key == "reference.model":
                load_reference(str(tmp_path / start))
            reference.check_start(str(tmp_path / start))


def test_a_hub_id_may_name_the_commit(monkeypatch, tmp_path) -> None:
    asked = []

    def load_config(name, **where):
        asked.append((name, where))
        raise OSError("not here")

    monkeypatch.setattr(PipelineIndex, "load_config", load_config)
    for model in ("owner/name@0123abc", "owner/name"):
        with pytest.raises(UserError, match=f"^reference.model: cannot read {model}: not here$"):
            load_reference(model)
    assert asked == [("owner/name", {"revision": "0123abc"}), ("owner/name", {})]
    (tmp_path / "a@b").mkdir()
    assert pinned(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), {})  # a folder may be called anything
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner/name").mkdir(parents=True)  # whose commit nobody knows
    with pytest.raises(UserError, match=r"^reference\.model: owner/name@0123abc names a commit .*, but owner/name lies here"):
        load_reference("owner/name@0123abc")
    recipes = (Path(__file__).parents[2] / "experiments" / "recipes").glob("*.yaml")
    models = {load(recipe).reference.model for recipe in recipes} - {"pocket"}
    assert len(models) == 3 and all(re.fullmatch(r"[^@]+/[^@]+@[0-9a-f]{40}", model) for model in models)
