"""A pipeline's files as people have them: read whole, or refused by what is wrong, before a random weight or an empty
vocabulary stands in for what is not there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import pipelines

from diffinstruct.errors import UserError
from diffinstruct.models.pipeline import Reference, load_reference

WEIGHTS = "diffusion_pytorch_model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3438167540\n"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return pipelines.build(tmp_path_factory.mktemp("whole") / "m")


def opened(whole: Path, folder: Path, change: Callable[[Path], object]) -> Reference:
    shutil.copytree(whole, folder)
    change(folder)
    return load_reference(str(folder))


def drawn(reference: Reference) -> torch.Tensor:
    z = torch.randn(1, *reference.latent_shape, generator=torch.Generator().manual_seed(0))
    return reference.sampler(reference.generator(399))(["a red thing"], z)


def rewrite(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


def lacks_one(part: str, name: str, file: str) -> Callable[[Path], object]:
    return lambda folder: rewrite(folder / part / file, lambda weights: weights.pop(name))


def shorter(part: str, name: str, file: str) -> Callable[[Path], object]:
    return lambda folder: rewrite(folder / part / file, lambda weights: weights.update({name: weights[name][1:].contiguous()}))


def edited(file: str, **changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> None:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | changes))

    return edit


def cut(file: str, size: int) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:size])


def pickled(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def renamed(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "unet" / WEIGHTS).rename(folder / "unet" / name)


def linked_to_nothing(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()
    (folder / "unet" / WEIGHTS).symlink_to("../../blobs/gone")


def without_vocabulary(folder: Path) -> None:
    for name in ("vocab.json", "merges.txt", "tokenizer.json"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def sunk(name: str) -> Callable[[Path], object]:
    """The pipeline lies deeper than the folder that is named, as in the hub's cache."""

    def sink(folder: Path) -> None:
        parts = list(folder.iterdir())
        (folder / name).mkdir(parents=True)
        for part in parts:
            part.rename(folder / name / part.name)

    return sink


FC1 = "encoder.layers.0.mlp.fc1.weight"
TEXT = ("text_encoder", FC1, "model.safetensors")
QUANTIZED = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
NO_VOCABULARY = "no vocabulary in it: neither merges.txt and vocab.json nor tokenizer.json"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "text": (lacks_one(*TEXT), f"1 of its weights are missing in its files, such as '{FC1}'"),
    "unet": (lacks_one("unet", "conv_in.bias", WEIGHTS), "1 of its weights are missing in its files, such as 'conv_in.bias'"),
    "decoder": (lacks_one("vae", "decoder.layers.2.conv.0.weight", WEIGHTS), "1 of its weights are missing in its files"),
    "text_shape": (shorter(*TEXT), f"of another shape than its configuration says, such as '{FC1}'"),
    "unet_shape": (
        shorter("unet", "conv_in.weight", WEIGHTS),
        r"cannot read unet of .*: conv_in.weight expected shape .*\]\)\.$",
    ),
    "quantized_unet": (edited("unet/config.json", **QUANTIZED), "its weights are quantized (bitsandbytes); name "),
    "quantized_text": (edited("text_encoder/config.json", **QUANTIZED), "its weights are quantized (bitsandbytes)"),
    "pointer_unet": (lambda m: (m / "unet" / WEIGHTS).write_text(POINTER), "is a pointer of Git LFS and not the file itself"),
    "pointer_text": (
        lambda m: (m / "text_encoder" / "model.safetensors").write_text(POINTER),
        "is a pointer of Git LFS and not",
    ),
    "cut": (cut(f"unet/{WEIGHTS}", 9999), f"{WEIGHTS} is cut off or damaged: "),
    "empty": (cut(f"unet/{WEIGHTS}", 0), f"{WEIGHTS} is cut off or damaged: "),
    "pickled": (pickled, "diffusion_pytorch_model.bin is a pickle, which is not opened; diffusers' save_pretrained makes"),
    "non_ema": (renamed("diffusion_pytorch_model.non_ema.safetensors"), "; there is diffusion_pytorch_model.non_ema."),
    "incomplete": (renamed(f"{WEIGHTS}.incomplete"), f"; there is {WEIGHTS}.incomplete"),
    "link": (linked_to_nothing, f"{WEIGHTS} is a link to what is not there"),
    "vocabulary": (without_vocabulary, NO_VOCABULARY),
    "tokenizer": (lambda folder: shutil.rmtree(folder / "tokenizer"), NO_VOCABULARY),
    "list": (lambda folder: (folder / "model_index.json").write_text("[]"), "supported are pipelines of class"),
    "deeper": (sunk("inner"), r"has no model_index.json, so it is no pipeline; did you mean '.*/m/inner'\?$"),
    "cache": (sunk("snapshots/abc"), r"has no model_index.json, so it is no pipeline; did you mean '.*/m/snapshots/abc'\?$"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_files_that_are_not_a_whole_pipeline_are_refused_by_what_is_wrong(whole: Path, tmp_path: Path, name: str) -> None:
    change, said = REFUSED[name]
    with pytest.raises(UserError, match=said if "\\" in said else said.replace("(", r"\(").replace(")", r"\)")) as caught:
        drawn(opened(whole, tmp_path / "m", change))
    assert "\n" not in str(caught.value)


def in_two(part: str, name: str, file: str, variant: str = "") -> Callable[[Path], object]:
    def split(folder: Path) -> None:
        path = folder / part / file
        weights, stem = load_file(path), file.removesuffix(".safetensors")
        first = sorted(weights)[: len(weights) // 2]
        halves = [{key: weights[key] for key in first}, {key: weights[key] for key in weights.keys() - set(first)}]
        names = {}
        for i, half in enumerate(halves, start=1):
            shard = f"{stem}{variant}-0000{i}-of-00002.safetensors"
            save_file(half, path.with_name(shard), metadata={"format": "pt"})
            names |= dict.fromkeys(half, shard)
        path.with_name(name).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
        path.unlink()

    return split


def in_blobs(folder: Path) -> None:
    (folder / "blobs").mkdir()
    for i, file in enumerate(folder.glob("*/*.safetensors")):
        file.rename(folder / "blobs" / str(i))
        file.symlink_to(f"../blobs/{i}")


def tokenizer_json_alone(folder: Path) -> None:
    for file in (folder / "tokenizer").iterdir():
        if file.name != "tokenizer.json":
            file.unlink()


CHECKER = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
ACCEPTED: dict[str, Callable[[Path], object]] = {
    "sharded": in_two("unet", f"{WEIGHTS}.index.json", WEIGHTS),
    "sharded_fp16": in_two("unet", "diffusion_pytorch_model.safetensors.index.fp16.json", WEIGHTS, ".fp16"),
    "sharded_text": in_two("text_encoder", "model.safetensors.index.json", "model.safetensors"),
    "links": in_blobs,
    "tokenizer.json": tokenizer_json_alone,
    "no_limit": edited("tokenizer/tokenizer_config.json", model_max_length=10**30),
    "old_version": edited("unet/config.json", _diffusers_version="0.2.2"),
    "torch_dtype": edited("text_encoder/config.json", torch_dtype="float16", transformers_version="4.22.0.dev0"),
    "dtype": edited("text_encoder/config.json", dtype="bfloat16"),
    "checker": edited("model_index.json", **CHECKER, feature_extractor=["transformers", "CLIPImageProcessor"]),
    "own_key": edited("unet/config.json", my_key=3),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_published_layouts_draw_the_picture_of_the_plain_one(whole: Path, tmp_path: Path, name: str) -> None:
    torch.testing.assert_close(drawn(opened(whole, tmp_path / "m", ACCEPTED[name])), drawn(load_reference(str(whole))))
