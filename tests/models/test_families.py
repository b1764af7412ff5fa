"""Every family of pipelines against diffusers' own, and through a whole job: train, checkpoint, resume, export,
generate."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, StableDiffusionPipeline
from diffusers.loaders import single_file, single_file_utils
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import pipelines

from diffinstruct.cli.main import main
from diffinstruct.errors import UserError
from diffinstruct.models import sources
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.training import loop

PROMPTS = ["a red hat", "far too many words for this text encoder, they are cut off"]


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return load_reference(str(folder))


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    """diffusers' own pipeline with its own scheduler. Euler's steps and those of the solver at order 1 are DDIM's."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if isinstance(pipeline.scheduler, DPMSolverMultistepScheduler):
        first_order = {"solver_order": 1, "timestep_spacing": "trailing"}
        pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config, **first_order)
    return pipeline


def noise(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, *pipelines.LATENT, generator=torch.Generator().manual_seed(seed))


def test_prompts_of_which_no_encoder_sees_the_end_are_told(folder: Path, reference: Reference) -> None:
    """Against what the encoders make of them: equal conditions where only the end differs."""
    words = " ".join(["red"] * 300)
    cut, whole = [f"{words} hat", f"{words} coat"], ["a red hat", "a red coat"]
    assert reference.cut([*whole, *cut, cut[0]]) == cut and reference.cut([]) == []
    for pair, equal in ((cut, True), (whole, False)):
        ours = reference.encode_prompts(pair)
        assert all(torch.equal(value[0], value[1]) for value in ours.values()) == equal
    alone = load_reference(str(folder))
    alone.cut(cut)
    assert "texts" not in vars(alone)  # no text encoder is loaded for that


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_reference_samples_as_the_stock_pipeline(
    guidance_scale: float, reference: Reference, stock: Any, family: str
) -> None:
    """Conditions, null conditions, micro-conditions, learned variance, schedule: all of it is in these latents."""
    more = {"use_resolution_binning": False} if family == "pixart" else {}
    theirs = stock(
        PROMPTS, latents=noise(), num_inference_steps=5, guidance_scale=guidance_scale, output_type="latent", **more
    ).images
    ours = reference.sample(PROMPTS, noise(), steps=5, guidance_scale=guidance_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.std().item())
    assert theirs.abs().max() > 2  # and none of it is clipped
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_no_scheduler_makes_the_reference_clip(folder: Path, tmp_path: Path, family: str) -> None:
    """Training scripts leave configurations behind that clip, as pictures once were."""
    shutil.copytree(folder, spoilt := tmp_path / "clips")
    config = spoilt / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"clip_sample": True, "thresholding": True}))
    ours, theirs = (load_reference(str(at)).sample(PROMPTS, 3 * noise(), 5, 3.0) for at in (folder, spoilt))
    assert torch.equal(ours, theirs) and ours.abs().max() > 2


def test_a_prompt_is_embedded_as_a_call_of_the_stock_pipeline_does(
    reference: Reference, stock: Any, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PixArt's cleans captions when it is called, and not when it is asked to encode."""
    if family == "pixart":  # in the place of packages that need not be here
        monkeypatch.setattr(type(stock), "_text_preprocessing", cleaning)
    seen: list[torch.Tensor] = []
    network: Any = getattr(stock, reference.family.part)
    hook = network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs.get("encoder_hidden_states")), with_kwargs=True
    )
    more = {"use_resolution_binning": False} if family == "pixart" else {}
    prompts = ["A Red HAT, see https://a.example/b?c", "a <b>red</b> hat "]
    for prompt in prompts:
        stock(prompt, num_inference_steps=2, guidance_scale=1.0, output_type="latent", **more)
    hook.remove()
    torch.testing.assert_close(reference.encode_prompts(prompts)["prompt_embeds"], torch.cat(seen[::2]), rtol=0, atol=1e-5)


def cleaning(self: Any, text: Any, clean_caption: bool = False) -> list[str]:
    texts = [text] if isinstance(text, str) else text
    return [re.sub(r"https?://\S+|<.*?>", "", one.lower()).strip() if clean_caption else one.lower() for one in texts]


def test_the_decoder_is_the_stock_pipelines(reference: Reference, stock: Any, family: str) -> None:
    latents = noise()
    shift = stock.vae.config.shift_factor if family == "sd3" else 0
    theirs = stock.vae.decode(latents / stock.vae.config.scaling_factor + shift, return_dict=False)[0].detach()
    images = reference.decode(latents)
    torch.testing.assert_close(images, stock.image_processor.postprocess(theirs, output_type="pt"), rtol=0, atol=1e-5)
    assert images.std() > 0.05


def test_a_denoiser_is_exact_where_the_network_is(reference: Reference, family: str) -> None:
    """Of a network that knows eps (or the velocity of the flow), x0_hat is x0 at every t, in the schedule's own
    terms."""
    denoiser, x0, eps = reference.denoiser(), noise(3, 1), noise(3, 2)
    t = torch.tensor([30, 500, 900])
    denoiser.output = lambda xt, fed, c: eps if family != "sd3" else eps - x0  # type: ignore[method-assign]
    xt = reference.schedule.diffuse(x0, t, eps)
    torch.testing.assert_close(denoiser(xt, t, {}), x0, rtol=1e-4, atol=1e-4)
    fed = reference.schedule.fed(t)
    assert torch.allclose(fed.float(), t.float() if family != "sd3" else 1000 * reference.schedule.sigmas[t])


def test_gradients_reach_the_networks_input_and_its_weights(reference: Reference) -> None:
    denoiser, c = reference.denoiser(), reference.encode_prompts(PROMPTS)
    xt = noise().requires_grad_()
    denoiser(xt, torch.tensor([100, 700]), c).pow(2).sum().backward()
    assert xt.grad is not None and (xt.grad.flatten(1).norm(dim=1) > 0).all()
    missing = [name for name, p in denoiser.named_parameters() if p.grad is None]
    assert [name for name in missing if "pos_embed" not in name] == []


def test_null_conditions_are_the_familys(reference: Reference, family: str) -> None:
    null, empty = reference.null_conditions(), reference.encode_prompts([""])
    assert {key: value.shape for key, value in null.items()} == {key: value.shape for key, value in empty.items()}
    if family == "sdxl":
        assert all(value.abs().max() == 0 for value in null.values())
    else:
        assert all(torch.equal(value, empty[key]) for key, value in null.items())


def test_a_start_may_be_a_file_of_weights(reference: Reference, folder: Path, tmp_path: Path, family: str) -> None:
    part = folder / reference.family.part / "diffusion_pytorch_model.safetensors"
    weights = {name: value + 1 for name, value in load_file(part).items()}
    save_file(weights, tmp_path / "start.safetensors")
    generator = reference.generator(pipelines.FAMILIES[family].timestep, str(tmp_path / "start.safetensors"))
    started = generator.denoiser.network.state_dict()
    assert all(torch.equal(started[name], value) for name, value in weights.items())
    name, value = next(iter(weights.items()))
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "start.safetensors").read_bytes()[:100])
    save_file(weights | {name: value[..., :1].clone()}, tmp_path / "narrow.safetensors")
    save_file({"other": value}, tmp_path / "other.safetensors")
    for spoilt, said in {
        "gone": "no such file",
        "cut": "cannot read",
        "narrow": f"does not fit the reference.*{name}",
        "other": f"holds no {reference.family.network}",
    }.items():
        with pytest.raises(UserError, match=said) as refusal:
            reference.generator(pipelines.FAMILIES[family].timestep, str(tmp_path / f"{spoilt}.safetensors"))
        assert f"{spoilt}.safetensors" in str(refusal.value) and "\n" not in str(refusal.value)


LDM = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.", "time_embedding.linear_2.": "time_embed.2.",
    "conv_norm_out.": "out.0.", "conv_out.": "out.2.", "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.", "mid_block.resnets.1.": "middle_block.2.",
    "down_blocks.0.resnets.0.": "input_blocks.1.0.", "down_blocks.0.downsamplers.0.conv.": "input_blocks.2.0.op.",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.", "down_blocks.1.attentions.0.": "input_blocks.3.1.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.", "up_blocks.0.attentions.0.": "output_blocks.0.1.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.", "up_blocks.0.attentions.1.": "output_blocks.1.1.",
    "up_blocks.0.upsamplers.0.": "output_blocks.1.2.", "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
}  # fmt: skip
LDM_RESNET = {
    "norm1.": "in_layers.0.", "conv1.": "in_layers.2.", "norm2.": "out_layers.0.", "conv2.": "out_layers.3.",
    "time_emb_proj.": "emb_layers.1.", "conv_shortcut.": "skip_connection.",
}  # fmt: skip


LDM_VAE = {
    r"down_blocks\.(\d)\.resnets": r"down.\1.block", r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
    r"up_blocks\.0\.": "up.2.", r"up_blocks\.1\.": "up.1.", r"up_blocks\.2\.": "up.0.", r"\.resnets": ".block",
    r"upsamplers\.0": "upsample", r"mid_block\.block\.0": "mid.block_1", r"mid_block\.block\.1": "mid.block_2",
    r"mid_block\.attentions\.0": "mid.attn_1", r"group_norm": "norm", r"to_([qkv])": r"\1", r"to_out\.0": "proj_out",
    r"conv_norm_out": "norm_out", r"conv_shortcut": "nin_shortcut",
}  # fmt: skip


def ldm_unet(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    theirs = {}
    for name, value in weights.items():
        (ours,) = (key for key in LDM if name.startswith(key))
        rest = name.removeprefix(ours)
        if "resnets" in ours:
            rest = next(new + rest.removeprefix(old) for old, new in LDM_RESNET.items() if rest.startswith(old))
        theirs["model.diffusion_model." + LDM[ours] + rest] = value
    return theirs


def test_a_start_may_be_named_as_the_models_authors_do(tmp_path: Path) -> None:
    reference = load_reference(str(pipelines.build(tmp_path / "sd15")))
    weights = load_file(tmp_path / "sd15" / "unet" / "diffusion_pytorch_model.safetensors")
    save_file(ldm_unet({name: value + 1 for name, value in weights.items()}), tmp_path / "ldm.safetensors")
    started = reference.generator(625, str(tmp_path / "ldm.safetensors")).denoiser.network.state_dict()
    assert all(torch.equal(started[name], value + 1) for name, value in weights.items())


def test_a_reference_may_be_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipelines.build(tmp_path / "sd15")
    pipelines.kl_decoder(4).save_pretrained(folder / "vae")
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace("AutoencoderTiny", "AutoencoderKL"))
    theirs = ldm_unet(load_file(folder / "unet" / "diffusion_pytorch_model.safetensors"))
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        for ours, other in LDM_VAE.items():
            name = re.sub(ours, other, name)
        theirs[f"first_stage_model.{name}"] = value
    for name, value in load_file(folder / "text_encoder" / "model.safetensors").items():
        theirs[f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"] = value
    save_file(theirs, tmp_path / "all.safetensors")
    save_file({"other": value}, tmp_path / "other.safetensors")
    (tmp_path / "pickled.ckpt").touch()
    monkeypatch.setattr(sources, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for module in (single_file, single_file_utils):  # in the place of the hub, where the published model's configuration is
        monkeypatch.setattr(module, "fetch_diffusers_config", lambda weights: {"pretrained_model_name_or_path": str(folder)})
    whole, one = load_reference(str(folder)), load_reference(str(tmp_path / "all.safetensors"))
    pictures = [each.decode(each.sample(PROMPTS, noise(), 3, 2.0)) for each in (whole, one)]
    assert torch.equal(*pictures) and pictures[0].std() > 0.05
    with monkeypatch.context() as once:
        once.setattr(StableDiffusionPipeline, "from_single_file", None)
        (tmp_path / "link.safetensors").symlink_to("all.safetensors")
        assert load_reference(str(tmp_path / "link.safetensors")).source == one.source
    with monkeypatch.context() as elsewhere:
        (tmp_path / "no folder").touch()
        elsewhere.setattr(sources, "HF_HUB_CACHE", str(tmp_path / "no folder"))
        with pytest.raises(UserError, match=r"^reference.model: \S*all.safetensors cannot be unpacked into [^\n]*$"):
            load_reference(str(tmp_path / "all.safetensors"))
    for spoilt, said in {"other.safetensors": "holds no StableDiffusionPipeline", "pickled.ckpt": "is no .safetensors"}.items():
        with pytest.raises(UserError, match=f"{spoilt} {said}") as refusal:
            load_reference(str(tmp_path / spoilt))
        assert "\n" not in str(refusal.value)


def test_a_t5_tokenizer_may_be_a_sentencepiece_model(tmp_path: Path) -> None:
    folder = pipelines.build(tmp_path, family="pixart")
    tokenizer = pipelines.as_published(folder / "tokenizer")
    ids = load_reference(str(folder)).texts["tokenizer"](["a red hat"]).input_ids
    assert ids == tokenizer(["a red hat"]).input_ids and ids[0][-1] == 1 and len(set(ids[0])) > 5


def test_a_flow_begins_at_its_end(reference: Reference, family: str) -> None:
    if family == "sd3":
        with pytest.raises(UserError, match=r"generator.timestep: should be 999 for a flow.*, got 625"):
            reference.generator(625)
    else:
        assert reference.generator(625).timestep == 625


@pytest.mark.parametrize(
    ("family", "rank"),
    [*((family, 0) for family in pipelines.FAMILIES), ("pixart", 4), pytest.param("sdxl", 4, marks=pytest.mark.long)],
    scope="function",
)
def test_a_whole_job(tmp_path: Path, family: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the command line, with a reward; one run is interrupted between checkpoints and goes on to the same bits."""
    folder = pipelines.build(tmp_path / "model", family=family)
    (tmp_path / "prompts.txt").write_text("a red hat\na blue hat\na hat\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"""
steps: 4
global_batch_size: 2
reference: {{model: {folder}}}
generator: {{init_from: reference, timestep: {pipelines.FAMILIES[family].timestep}, lora_rank: {rank}}}
score_network: {{lora_rank: {rank}}}
activation_checkpointing: {str(rank > 0).lower()}
rewards: {{trained: [{{name: "tiny.rewards:Red"}}], held_out: []}}
prompts: {{train: {tmp_path}/prompts.txt, grid: {tmp_path}/prompts.txt}}
overoptimization: {{every: 2}}
logging: {{every: 1, grid_every: 4, grid_prompts: 2, checkpoint_every: 2}}
""")

    def train(name: str, *more: str) -> Path:
        main(["train", str(recipe), "--local", "-s", f"output_dir={tmp_path / name}", *more])
        (folder,) = (path.parent for path in (tmp_path / name).glob("*/experiment.yaml"))
        return folder

    whole = train("whole")
    rounds, going = loop.alternating_round, []

    def cut(*arguments: Any) -> dict[str, float]:
        going.append(1)
        if len(going) == 4:
            raise KeyboardInterrupt
        return rounds(*arguments)

    monkeypatch.setattr(loop, "alternating_round", cut)
    with pytest.raises(SystemExit):
        train("cut")
    (left,) = (path.parent for path in (tmp_path / "cut").glob("*/experiment.yaml"))
    assert [path.name for path in (left / "checkpoints").iterdir()] == ["step-00000002"] and not (left / "export").exists()
    train("cut", "--resume", str(left))
    assert len(going) == 4 + 2  # rounds 3 and 4 again

    ends = [load_file(at / "checkpoints" / "step-00000004" / "tensors.safetensors") for at in (whole, left)]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    start = load_file(folder / load_reference(str(folder)).family.part / "diffusion_pytorch_model.safetensors")
    learned = load_file(whole / "export" / load_reference(str(folder)).family.part / "diffusion_pytorch_model.safetensors")
    assert max((learned[key] - start[key]).abs().max() for key in start) > 0
    for at in (whole, left):
        main(["generate", str(at), "a red hat", "-o", str(at / "out.png"), "--n", "2"])
    with Image.open(whole / "out.png") as one, Image.open(left / "out.png") as other:
        assert one.size == (64, 32) and one.tobytes() == other.tobytes() and len(set(one.convert("L").get_flattened_data())) > 9
