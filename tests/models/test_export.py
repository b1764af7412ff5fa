"""The exported folder against the trainer's own sample, drawn by a process that cannot import this package."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from tiny import pipelines

from diffinstruct.method.precision import DTYPES
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.export import export, load_export, tidy_configs
from diffinstruct.models.pipeline import Reference, load_reference
from diffinstruct.models.world import POCKET

PROMPTS = ["a red hat", "something else"]
CASES = [
    ("unit", "epsilon", 399, "sd15"),
    ("unit", "v_prediction", 625, "sd15"),
    ("sigma", "epsilon", 625, "sd15"),
    ("sigma", "v_prediction", 399, "sd15"),
    ("unit", "epsilon", 399, "sdxl"),  # as DMD2's one-step start
    ("sigma", "epsilon", 440, "pixart"),  # as SIM's
    ("unit", "flow_prediction", 999, "sd3"),
]

STRANGER = """
import json, sys

sys.modules["diffinstruct"] = None  # as if it were not installed
try:
    import diffinstruct
except ImportError:
    pass
else:
    raise SystemExit("this process can import diffinstruct")

import numpy as np, torch
from diffusers import DiffusionPipeline

latents, prompts, folders = torch.from_numpy(np.load(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3:]
for folder in folders:
    pipe = DiffusionPipeline.from_pretrained(folder)
    more = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}  # it knows no pictures as small
    one_step = {"num_inference_steps": 1, "guidance_scale": 0.0, **more}
    alone = [pipe(prompt, **one_step, latents=z[None], output_type="np").images for prompt, z in zip(prompts, latents)]
    np.save(folder + ".npy", np.concatenate(alone))
    refused = []
    for steps in (2, 3, 50):
        try:
            pipe("a red hat", num_inference_steps=steps, guidance_scale=0.0, **more)
        except ValueError:
            refused.append(steps)
    print(json.dumps({"class": type(pipe).__name__, "refused": refused, "safety":
    pipe.config.get("requires_safety_checker")}))
"""


def trained(folder: Path, timestep: int, scale: Any) -> OneStepGenerator:
    """A generator that has left the reference's weights, as training does."""
    generator = load_reference(str(folder)).generator(timestep, input_scale=scale)
    torch.manual_seed(1)
    for parameter in generator.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return generator


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For each case what the stranger answers, its pictures and ours [B, H, W, 3], from the same noise."""
    root = tmp_path_factory.mktemp("export")
    z = torch.randn(len(PROMPTS), *pipelines.LATENT, generator=torch.Generator().manual_seed(0))
    np.save(root / "z.npy", z.numpy())
    ours, folders = [], []
    for i, (scale, prediction, timestep, family) in enumerate(CASES):
        reference = load_reference(str(pipelines.build(root / f"reference{i}", prediction, family=family)))
        generator = trained(root / f"reference{i}", timestep, scale)
        folders.append(export(reference.source, generator, root / f"export{i}"))
        alone = [reference.sampler(generator)([prompt], z[i : i + 1]) for i, prompt in enumerate(PROMPTS)]
        ours.append(torch.cat(alone).permute(0, 2, 3, 1).numpy())
    command = [sys.executable, "-I", "-c", STRANGER, str(root / "z.npy"), json.dumps(PROMPTS), *map(str, folders)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    return [
        line | {"folder": folder, "theirs": np.load(f"{folder}.npy"), "ours": images}
        for line, folder, images in zip(lines, folders, ours, strict=True)
    ]


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_a_stranger_draws_the_trainers_pixels(case: int, exports: list[dict[str, Any]]) -> None:
    ours, theirs = exports[case]["ours"], exports[case]["theirs"]
    difference = np.abs(ours - theirs).max()
    print(f"largest difference {difference:.2e}, standard deviation of the pixels {ours.std():.2f}")
    assert ours.std() > 0.1 and np.abs(ours[0] - ours[1]).max() > 0.1
    assert difference < 1e-5
    assert np.array_equal(*((255 * images).round().astype(np.uint8) for images in (ours, theirs)))


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_another_step_count_raises(case: int, exports: list[dict[str, Any]]) -> None:
    card = (exports[case]["folder"] / "README.md").read_text()
    if CASES[case][-1] == "sd3":  # whose stock scheduler takes any
        assert exports[case]["refused"] == [] and "trained for no other step count" in card
    else:
        assert exports[case]["refused"] == [2, 3, 50] and "any other step count raises" in card


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(map(str, CASES[i])))
def test_an_export_is_opened_again_as_the_generator_that_it_was(case: int, exports: list[dict[str, Any]]) -> None:
    reference, generator = load_export(exports[case]["folder"])
    scale, _, timestep, family = CASES[case]
    assert (generator.timestep, generator.input_scale) == (timestep, scale)
    z = torch.randn(len(PROMPTS), *pipelines.LATENT, generator=torch.Generator().manual_seed(0))
    images = reference.sampler(generator)(PROMPTS, z).permute(0, 2, 3, 1).numpy()
    assert np.abs(images - exports[case]["ours"]).max() < 1e-5  # a scheduler keeps betas, and their product rounds
    assert exports[case]["class"] == pipelines.FAMILIES[family].pipeline


def test_the_folder_is_stock_and_says_what_it_is(exports: list[dict[str, Any]]) -> None:
    export = exports[0]
    assert export["class"] == "StableDiffusionPipeline" and export["safety"] is False
    card = (export["folder"] / "README.md").read_text()
    assert "num_inference_steps=1, guidance_scale=0.0" in card and "timestep 399" in card and "`reference0`" in card
    files = [path for path in export["folder"].rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    place = str(export["folder"].parent)
    assert [path for path in files if path.suffix != ".safetensors" and place in path.read_text()] == []


def test_an_export_replaces_the_one_before_and_a_failed_one_leaves_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = trained(pipelines.build(tmp_path / "reference"), 399, "unit")
    folder = export(str(tmp_path / "reference"), generator, tmp_path / "run" / "export")
    before = sorted(path.relative_to(folder) for path in folder.rglob("*"))
    (folder / "left over").touch()
    export(str(tmp_path / "reference"), generator, folder)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before

    def interrupted(self: UNet2DConditionModel, *arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(UNet2DConditionModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(str(tmp_path / "reference"), generator, folder)
    assert sorted(path.relative_to(folder) for path in folder.rglob("*")) == before
    assert [path.name for path in folder.parent.iterdir()] == ["export"]


def test_a_trained_export_is_a_start_for_the_next_run(tmp_path: Path) -> None:
    generator = trained(pipelines.build(tmp_path / "reference"), 399, "unit")
    folder = export(str(tmp_path / "reference"), generator, tmp_path / "export")
    again = load_reference(str(tmp_path / "reference")).generator(399, str(folder))
    assert all(torch.equal(a, b) for a, b in zip(generator.parameters(), again.parameters(), strict=True))


OPENS = """
import sys
from diffusers import DiffusionPipeline

for folder in sys.argv[1:]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    more = {"use_resolution_binning": False} if "PixArt" in type(pipe).__name__ else {}
    picture = pipe("a red hat", num_inference_steps=2, guidance_scale=3.0, output_type="np", **more).images[0]
    assert picture.std() > 0.01, folder
"""


def test_files_of_any_type_open_in_stock_diffusers_without_arguments(tmp_path: Path) -> None:
    """Also the shipped pipeline, whose files are half precision."""
    folders = [POCKET / "pipeline"]
    for family in pipelines.FAMILIES:
        for dtype in (torch.float16, torch.bfloat16):
            folders.append(pipelines.build(tmp_path / f"{family}-{dtype}", dtype=dtype, family=family))
            tidy_configs(folders[-1])
    command = [sys.executable, "-I", "-c", OPENS, *map(str, folders)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr


HALF = {"sd15": "fp16", "sdxl": "bf16", "pixart": "bf16", "sd3": "fp16"}


def test_an_export_in_half_precision_opens_without_arguments_and_draws_the_picture(tmp_path: Path) -> None:
    z = torch.randn(len(PROMPTS), *pipelines.LATENT, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "z.npy", z.numpy())
    ours, folders = [], []
    for family, dtype in HALF.items():
        reference = load_reference(str(pipelines.build(tmp_path / family, family=family)))
        generator = trained(tmp_path / family, pipelines.FAMILIES[family].timestep, "unit")
        folders.append(export(reference.source, generator, tmp_path / f"{family}-export", DTYPES[dtype]))
        network = next((folders[-1] / reference.family.part).glob("*.safetensors"))
        assert {weight.dtype for weight in load_file(network).values()} == {DTYPES[dtype]}
        assert next(generator.parameters()).dtype == torch.float32  # the trainer's own stay
        ours.append(torch.cat([reference.sampler(generator)([p], z[i : i + 1]) for i, p in enumerate(PROMPTS)]))
    command = [sys.executable, "-I", "-c", STRANGER, str(tmp_path / "z.npy"), json.dumps(PROMPTS), *map(str, folders)]
    answer = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert answer.returncode == 0, answer.stderr
    for folder, images in zip(folders, ours, strict=True):
        gap = np.abs(np.load(f"{folder}.npy") - images.permute(0, 2, 3, 1).numpy())
        assert 0 < gap.mean() < 0.02 and images.std() > 0.05


def test_an_export_reads_one_part_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = trained(pipelines.build(tmp_path / "sdxl", family="sdxl"), 399, "unit")
    read, part = list[weakref.ref[Any]](), Reference.part

    def alone(self: Reference, name: str) -> Any:
        gc.collect()
        assert [reference() for reference in read if reference() is not None] == []
        made = part(self, name)
        if isinstance(made, torch.nn.Module):
            read.append(weakref.ref(made))
        return made

    monkeypatch.setattr(Reference, "part", alone)
    export(str(tmp_path / "sdxl"), generator, tmp_path / "export")
    assert len(read) == 3  # the decoder and two text encoders
