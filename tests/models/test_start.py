"""A generator's start as training scripts and hubs leave it: prefixes, LoRAs of three makers, and what is nearly right."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny import pipelines

from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import Reference, load_reference

RANK, ALPHA = 2, 6
TARGETS = ["to_q", "to_v", "conv1", "proj_in"]


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def reference(request, tmp_path_factory) -> Reference:
    return load_reference(str(pipelines.build(tmp_path_factory.mktemp(request.param) / "m", family=request.param)))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory) -> Reference:
    return load_reference(str(pipelines.build(tmp_path_factory.mktemp("plain") / "m")))


def with_adapter(reference: Reference) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(an adapter's weights by peft's names, the weights of the network with it merged)"""
    network: Any = reference.network()
    network.add_adapter(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS))
    torch.manual_seed(0)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn_like(parameter)
    adapter = {key: value.detach().clone().contiguous() for key, value in get_peft_model_state_dict(network).items()}
    network.fuse_lora()
    network.unload_lora()
    return adapter, {key: value.detach().clone() for key, value in network.state_dict().items()}


def saved(reference: Reference, adapter: dict[str, torch.Tensor], folder: Path, form: str) -> Path:
    """The adapter as diffusers, peft or kohya's scripts save it."""
    folder.mkdir()
    if form == "diffusers":
        pipeline = {"unet": StableDiffusionPipeline, "xl": StableDiffusionXLPipeline}
        kind = pipeline["xl" if "XL" in reference.family.pipeline else "unet"]
        metadata = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS).to_dict()
        kind.save_lora_weights(folder, unet_lora_layers=adapter, unet_lora_adapter_metadata=metadata)
        return folder
    if form == "peft":
        save_file({f"base_model.model.{key}": value for key, value in adapter.items()}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
        return folder
    kohya: dict[str, torch.Tensor] = {}
    for key, value in adapter.items():
        layer, which, _ = key.rsplit(".", 2)
        name = f"lora_unet_{layer.replace('.', '_')}"
        kohya[f"{name}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = value
        kohya[f"{name}.alpha"] = torch.tensor(float(ALPHA))
    save_file(kohya, folder / "lora.safetensors")
    return folder / "lora.safetensors"


@pytest.mark.parametrize("form", ["diffusers", "peft", "kohya"])
def test_a_lora_is_merged_into_the_reference(reference: Reference, tmp_path: Path, form: str) -> None:
    adapter, merged = with_adapter(reference)
    start = saved(reference, adapter, tmp_path / form, form)
    network = reference.network(str(start))
    ours = network.state_dict()
    assert ours.keys() == merged.keys()
    for name, value in merged.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)
    assert all(parameter.requires_grad for parameter in network.parameters())
    plain = reference.network().state_dict()
    assert sum(not torch.equal(plain[name], value) for name, value in ours.items()) == len(adapter) / 2


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "feedforward_model.", "unet.", "model.diffusion_model.", "a.module."]
)
def test_a_prefix_that_a_wrapper_has_left_is_no_part_of_the_names(sd15: Reference, tmp_path: Path, prefix: str) -> None:
    weights = {key: value.clone() + 0.5 for key, value in sd15.network().state_dict().items()}
    save_file({prefix + key: value for key, value in weights.items()}, tmp_path / "start.safetensors")
    ours = sd15.network(str(tmp_path / "start.safetensors")).state_dict()
    assert all(torch.equal(ours[key], value) for key, value in weights.items())


def refused(reference: Reference, file: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    save_file(weights, file)
    with pytest.raises(UserError, match=message) as caught:
        reference.network(str(file))
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"generator.init_from: {file} ")


def test_what_a_file_is_is_said(sd15: Reference, tmp_path: Path) -> None:
    weights, file = dict(sd15.network().state_dict()), tmp_path / "start.safetensors"
    last = max(weights)
    less = {key: value for key, value in weights.items() if key != last}
    refused(
        sd15, file, less, rf"is nearly the UNet2DConditionModel of .*: 1 names are missing, such as {re.escape(repr(last))}$"
    )
    refused(sd15, file, weights | {"ema_step": torch.ones(1)}, r"1 names are of no weight in it, such as 'ema_step'$")
    both = r"1 names are missing, such as .* and 1 names are of no weight in it, such as 'ema_step'$"
    refused(sd15, file, less | {"ema_step": torch.ones(1)}, both)
    refused(sd15, file, {"x": torch.ones(1)}, r"holds no UNet2DConditionModel: it has 1 weights, such as 'x'; diffusers' .*")
    adapter, _ = with_adapter(sd15)
    odd = {f"unet.{key}": value for key, value in adapter.items()} | {"text_encoder.a.lora_A.weight": torch.ones(2, 3)}
    refused(sd15, file, odd, "is a LoRA of rank 2 that also changes text_encoder, which a run takes from reference.model")
    wide = {f"unet.{key}": torch.ones(*value.shape[:1], 3 * value.shape[1], *value.shape[2:]) for key, value in adapter.items()}
    refused(sd15, file, wide, "is a LoRA of rank .* that does not fit UNet2DConditionModel as it is here: .*")


def test_a_lora_folder_of_a_network_is_a_network(sd15: Reference, tmp_path: Path) -> None:
    """A pipeline's folder may have a LoRA beside it, as our own exports do."""
    network: Any = sd15.network()
    assert isinstance(network, UNet2DConditionModel)
    network.save_pretrained(tmp_path / "both")
    save_file({"x": torch.ones(1)}, tmp_path / "both" / "pytorch_lora_weights.safetensors")
    ours = sd15.network(str(tmp_path / "both")).state_dict()
    theirs = load_file(tmp_path / "both" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())
