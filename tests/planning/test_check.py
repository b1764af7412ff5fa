"""`check` counts published models on the configuration files in shapes/: exactly theirs, and without a network."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import pipelines

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import load_reference
from diffinstruct.models.sharding import blocks
from diffinstruct.planning import footprint
from diffinstruct.planning.check import SHAPES, largest_block, make_plan, report, shapes
from diffinstruct.planning.life import Life
from diffinstruct.training.build import rounding_remark

pytestmark = pytest.mark.usefixtures("nothing_remembered")
VAE, CLIP_L = 83_653_863, 123_060_480
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": {"unet": 859_520_964, "vae": VAE, "text_encoder": CLIP_L},
    "stabilityai/stable-diffusion-xl-base-1.0": {
        "unet": 2_567_463_684, "vae": VAE, "text_encoder": CLIP_L, "text_encoder_2": 694_659_840,
    },
    "PixArt-alpha/PixArt-XL-2-512x512": {"transformer": 610_856_096, "vae": VAE, "text_encoder": 4_762_310_656},
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        "transformer": 2_028_328_000, "vae": 83_819_683, "text_encoder": 123_650_304, "text_encoder_2": 694_659_840,
        "text_encoder_3": 4_762_310_656,
    },
}  # fmt: skip
"""Parameters of each part."""
LATENTS = {
    "stable-diffusion-v1-5": (4, 64, 64),
    "stable-diffusion-xl-base-1.0": (4, 128, 128),
    "PixArt-XL-2-512x512": (4, 64, 64),
    "stable-diffusion-3-medium-diffusers": (16, 128, 128),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_shipped_configurations_are_the_published_models(model: str) -> None:
    reference = load_reference(shapes(model))
    parts = {
        name: reference.empty(name)
        for name in (reference.family.part, "vae", *reference.family.texts)
        if not name.startswith("tokenizer")
    }
    assert {name: sum(prod(p.shape) for p in part.parameters()) for name, part in parts.items()} == PUBLISHED[model]
    assert reference.latent_shape == LATENTS[model.rpartition("/")[2]]
    assert len(reference.schedule.alphas) == 1000
    assert reference.prediction == ("flow_prediction" if reference.family.flow else "epsilon")


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


@pytest.mark.parametrize(
    "more",
    [
        {"precision": "bf16", "activation_checkpointing": True, "micro_batch_size": 3},
        {"precision": "bf16", "generator__lora_rank": 4, "score_network__lora_rank": 2},
    ],
    ids=["full", "adapters"],
)
def test_a_round_without_content_takes_what_a_real_one_takes(world, more, monkeypatch) -> None:
    """The same code on tensors that are there: every byte that is held, and the most that is at once."""
    experiment = world[1](**more)

    def counted() -> footprint.Footprint:
        reference = load_reference(experiment.reference.model, activation_checkpointing=experiment.activation_checkpointing)
        rewards = {"tiny.rewards:Red": lambda images, prompts: images.mean((1, 2, 3))}
        return footprint.training_footprint(experiment, reference, rewards)

    said = counted()
    monkeypatch.setattr(footprint, "FakeTensorMode", lambda **_: nullcontext())
    real = counted()
    assert said.held == real.held and said.flops == real.flops > 0
    assert said.peak == pytest.approx(real.peak, rel=0.02) and said.passing > 0


@pytest.mark.parametrize(
    ("model", "more", "says"),
    [
        ("PixArt-alpha/PixArt-XL-2-512x512", {}, "0.54 at t = 979, where differences of x0 are about 1; objective.t_max: 791"),
        ("PixArt-alpha/PixArt-XL-2-512x512", {"objective": {"t_max": 790}}, None),
        ("PixArt-alpha/PixArt-XL-2-512x512", {"objective": {"weighting": "eps"}}, None),
        ("PixArt-alpha/PixArt-XL-2-512x512", {"precision": "fp32"}, None),
        ("PixArt-alpha/PixArt-XL-2-512x512", {"objective": {"name": "reward_only"}}, None),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", {}, None),
        ("stabilityai/stable-diffusion-xl-base-1.0", {}, None),
    ],
)
def test_bf16_where_an_objective_would_compare_rounding_errors_is_said(model: str, more: dict, says: str | None) -> None:
    reference, content = load_reference(shapes(model)), {"precision": "bf16", "reference": {"model": model}}
    content["generator"] = {"init_from": "reference"}
    remark = rounding_remark(Experiment.model_validate(content | more), reference)
    assert remark is None if says is None else says in str(remark)


def test_rewards_alone_take_neither_score_network_nor_reference(world) -> None:
    experiment = world[1]()
    reference = load_reference(experiment.reference.model)
    alone = experiment.model_copy(update={"objective": experiment.objective.model_copy(update={"name": "reward_only"})})
    weights = footprint.training_footprint(experiment, reference).held - footprint.training_footprint(alone, reference).held
    network = sum(p.numel() for p in reference.empty("unet").parameters())
    assert weights >= 4 * (2 + 3) * network  # two networks in fp32; gradients and two Adam states of one
    assert {role.name for role in make_plan(alone, reference).life.models} >= {"generator"}
    assert not {"score network", "reference"} & {role.name for role in make_plan(alone, reference).life.models}


def test_conditions_of_all_of_a_rounds_prompts_are_counted(world) -> None:
    """In the run's arithmetic precision; a round goes through two micro-batches alone."""
    changes = {"precision": "bf16", "objective__name": "reward_only", "micro_batch_size": 1}
    few, many = (world[1](global_batch_size=batch, **changes) for batch in (4, 8))
    reference = load_reference(few.reference.model, decoder_dtype=torch.bfloat16)
    few, many = (footprint.training_footprint(each, reference) for each in (few, many))
    assert many.held - few.held == 4 * 2 * prod(reference.blank_conditions()["prompt_embeds"].shape)


def test_prompts_that_are_kept_or_read_are_counted_in_main_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(footprint, "training_footprint", lambda *_: footprint.Footprint(0, 0, 0))
    monkeypatch.setattr(footprint, "rewards_footprint", lambda *_: footprint.Footprint(0, 0, 0))
    experiment = pipelines.experiment(tmp_path)
    reference = load_reference(experiment.reference.model)
    each, plan = reference.blank_conditions()["prompt_embeds"].nbytes, make_plan(experiment, reference)
    without = replace(plan, life=replace(plan.life, conditions=0))
    assert plan.life.conditions == 2 * 4 * each == plan.in_ram - without.in_ram
    assert f"{8 * each / 2**20:.2f} MiB of prompts' conditions a training process" in report(experiment)[0]
    monkeypatch.setattr("diffinstruct.planning.check.CACHED_BYTES", 3 * each)
    assert make_plan(experiment, reference).life.conditions == 3 * each  # it keeps no more
    stored = experiment.prompts.model_copy(update={"embeddings": "there"})
    assert make_plan(experiment.model_copy(update={"prompts": stored}), reference).life.conditions == 2 * 8 * each


def test_a_sharded_networks_largest_block() -> None:
    network = load_reference(shapes("stabilityai/stable-diffusion-xl-base-1.0")).empty("unet")
    assert {type(module).__name__ for module in blocks(network)} >= {"BasicTransformerBlock", "ResnetBlock2D"}
    block = next(module for module in blocks(network) if type(module).__name__ == "BasicTransformerBlock")
    assert largest_block(network) >= sum(p.numel() for p in block.parameters())
    assert largest_block(network) < 0.1 * sum(p.numel() for p in network.parameters())


def test_an_objective_that_does_not_run_without_content_is_counted_as_di_star(tmp_path, monkeypatch) -> None:
    (tmp_path / "by_numbers.py").write_text(
        "def by_numbers(x0, t, eps, c, *, score_network, reference):\n"
        "    assert len(x0.detach().numpy())\n"
        "    return (x0**2).flatten(1).sum(1), {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    experiment = pipelines.experiment(tmp_path)
    own = experiment.objective.model_copy(update={"name": "by_numbers:by_numbers"})
    text, problem = report(experiment.model_copy(update={"objective": own}))
    assert "objective               not counted: DI* is assumed in its place; " in text and problem is None
    assert next(line for line in report(experiment)[0].splitlines() if line.startswith("work")) in text.splitlines()


def test_a_table_without_network_weights_or_start(monkeypatch) -> None:
    monkeypatch.setattr(footprint, "training_footprint", lambda *_: footprint.Footprint(0, 2**31, 10**15))
    monkeypatch.setattr(footprint, "rewards_footprint", lambda *_: footprint.Footprint(0, 0, 0))
    values = Experiment().model_dump() | {"rewards": {"trained": [{"name": "pocket_preference"}], "held_out": []}}
    values["reference"]["model"] = "stabilityai/stable-diffusion-xl-base-1.0"
    values["generator"] |= {"init_from": "/nowhere.safetensors", "lora_rank": 64}
    values["score_network"]["lora_rank"] = 64
    text, problem = report(Experiment.model_validate(values))
    assert problem == "generator.init_from: no such file or folder: /nowhere.safetensors"
    assert "2567.46" in text and "694.66" in text and "generator's adapter" in text


def test_a_sharded_network_is_counted_by_the_processes_that_share_a_copy() -> None:
    for cluster, shares in (
        ({"workers": 8}, 1),
        ({"workers": 8, "fully_shard": True}, 8),
        ({"workers": 8, "fully_shard": True, "shard_degree": 4}, 4),
    ):
        plan: Any = SimpleNamespace(experiment=Experiment.model_validate({"cluster": cluster}))
        assert Life.shares.fget(plan) == shares  # type: ignore[attr-defined]
