"""A trained one-step generator as a stock diffusers folder: whoever has diffusers can use it, without this package.

The generator's timestep T and its input scale are written into the configuration of a scheduler that diffusers ships:

    unit    LCMScheduler cut off at T: one step from z at T is x0_hat, and another step count raises.
    sigma   EulerDiscreteScheduler cut off at T: it feeds sigma_T z and returns x0_hat. Its betas keep sigma_T and make
            sigma 0 below T - 1, where its exponential spacing takes a logarithm: more than one step raises there
            ("math domain error") instead of quietly sampling with a network that knows one step. The price is that
            numpy warns once of a division by zero.
    flow    the reference's own FlowMatchEulerDiscreteScheduler, whose only step of one goes from pure noise, t = 1, to
            x0_hat. It cannot be made to refuse other step counts: the card says that there is one step.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, SchedulerMixin
from PIL import Image
from torch import Tensor

from diffinstruct.errors import UserError
from diffinstruct.method.memory import Batches
from diffinstruct.method.precision import use_precision
from diffinstruct.models.denoiser import InputScale, OneStepGenerator
from diffinstruct.models.lora import Role
from diffinstruct.models.pipeline import FLOW, Reference, load_reference
from diffinstruct.models.sampling import pictures_at_once
from diffinstruct.models.sources import quiet

CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
# {name}: a one-step text-to-image generator

Trained with Diff-Instruct* (arXiv 2410.20898) against the reference `{reference}`, whose licence applies.
It makes a picture in one step, at timestep {timestep}, without guidance; {otherwise}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/{name}")
pipe("a prompt", num_inference_steps=1, guidance_scale=0.0).images[0]
```
"""


def export(model: str, generator: OneStepGenerator, folder: Path | str, dtype: torch.dtype = torch.float32) -> Path:
    """Write `generator` with the other parts of the reference `model` as a folder of its stock pipeline; returns it.

    All weights are stored in `dtype`: in fp32 the pictures are the trainer's to the bit. Adapters are merged into their
    network, in fp32, and lie beside it in `lora/` where the pipeline knows `load_lora_weights`. Parts are read and
    written one after another: it takes the memory of one. The folder appears whole or not at all, and replaces one that
    is already there.
    """
    folder = Path(folder).absolute()
    trained: Any = generator.denoiser.network
    reference = load_reference(model, dtype)
    family = reference.family
    empty = {part: reference.empty(part) for part in (family.part, "vae", *family.texts) if not part.startswith("tokenizer")}
    tokenizers = {part: reference.part(part) for part in family.texts if part not in empty}
    pipeline = reference.pipeline(**empty, **tokenizers, scheduler=one_step_scheduler(reference, generator))
    partial, previous = (folder.with_name(f".{folder.name}.{os.getpid()}.{what}") for what in ("partial", "previous"))
    try:
        with quiet():
            pipeline.save_config(partial)
            for name in pipeline.components.keys() - empty.keys():
                if (part := getattr(pipeline, name)) is not None:
                    part.save_pretrained(partial / name)
            _stored(trained, empty.pop(family.part), dtype).save_pretrained(partial / family.part)
            for name in empty:
                reference.part(name).save_pretrained(partial / name)
            if isinstance(trained, Role) and not trained.frozen_adapters and hasattr(pipeline, "save_lora_weights"):
                pipeline.save_lora_weights(partial / "lora", **{f"{family.part}_lora_layers": trained.lora_weights()})
        tidy_configs(partial)
        origin = Path(model).name if Path(model).exists() else model
        otherwise = "any other step count raises an error" if reference.betas else "it was trained for no other step count"
        card = CARD.format(name=folder.name, reference=origin, timestep=generator.timestep, otherwise=otherwise)
        (partial / "README.md").write_text(card, encoding="utf-8")
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        shutil.rmtree(previous, ignore_errors=True)
    return folder


def _stored(trained: Any, empty: Any, dtype: torch.dtype) -> Any:
    """The network as its file has it: `empty`, which is without weights, with those of the trained one, on the CPU.
    Weights that are stored as they are held are not copied."""
    weights = trained.merged() if isinstance(trained, Role) else trained.state_dict().items()
    empty.load_state_dict({name: weight.to("cpu", dtype) for name, weight in weights}, assign=True)
    return empty


def tidy_configs(pipeline: Path) -> None:
    """Rewrite the configurations of a stock pipeline's parts, so that it opens without arguments, whatever type its
    files hold: diffusers makes float32 of its parts, transformers what "dtype" says. Where this machine keeps the
    reference is nobody's business."""
    for config in pipeline.glob("*/config.json"):
        values = json.loads(config.read_text(encoding="utf-8"))
        values.pop("_name_or_path", None)
        if "dtype" in values:
            values["dtype"] = "float32"
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_export(
    folder: Path | str, device: torch.device | str = "cpu", decoder_dtype: torch.dtype | None = None
) -> tuple[Reference, OneStepGenerator]:
    """Open what `export` wrote, in fp32: the pipeline's other parts, and its one-step generator. decoder_dtype: of the
    decoder, if another.

    Raises UserError for a pipeline that is no one-step generator of ours.
    """
    reference = load_reference(str(folder), device=device, decoder_dtype=decoder_dtype)
    scheduler = json.loads(Path(folder, "scheduler", "scheduler_config.json").read_text(encoding="utf-8"))
    name, timestep = scheduler["_class_name"], scheduler["num_train_timesteps"] - 1
    scales: dict[str, InputScale] = {"LCMScheduler": "unit", "EulerDiscreteScheduler": "sigma", FLOW: "unit"}
    if name not in scales or not (scheduler.get("trained_betas") or name == FLOW):
        raise UserError(f"{folder}: its scheduler ({name}) holds no one-step generator's timestep")
    return reference, reference.generator(timestep, "reference", scales[name])


def one_step_scheduler(reference: Reference, generator: OneStepGenerator) -> SchedulerMixin:
    """The stock scheduler whose only step is the generator's, at T."""
    if reference.betas is None:
        return FlowMatchEulerDiscreteScheduler.from_config(reference.scheduler.config)
    betas = reference.betas[: generator.timestep + 1]
    if generator.input_scale == "unit" or reference.schedule.alphas[generator.timestep] == 0:  # there sigma_T z is z
        return LCMScheduler(
            num_train_timesteps=len(betas),
            trained_betas=betas,
            prediction_type=reference.prediction,
            original_inference_steps=1,
            timestep_scaling=1e6,  # so that the boundary condition's c_out is 1 and its c_skip 0 in float32
            clip_sample=False,
            steps_offset=1,  # not used; the pipeline insists on it
        )
    alphas_cumprod = prod(1 - beta for beta in betas)
    return EulerDiscreteScheduler(
        num_train_timesteps=len(betas),
        trained_betas=[0.0] * (len(betas) - 2) + [betas[-2], 1 - alphas_cumprod / (1 - betas[-2])],
        prediction_type=reference.prediction,
        timestep_spacing="trailing",
        use_exponential_sigmas=True,
        steps_offset=1,
    )


def generate(folder: Path | str, prompts: Sequence[str], seed: int = 0) -> list[Image.Image]:
    """One picture for each prompt, made by the exported pipeline in `folder`, with noise of the seeds from `seed` on.

    Raises UserError for a pipeline that is no one-step generator of ours.
    """
    use_precision("fp32")
    reference, generator = load_export(folder, "cuda" if torch.cuda.is_available() else "cpu")
    seeds = range(seed, seed + len(prompts))
    # One random generator for each picture: it depends on its seed, not on its neighbours.
    z = torch.stack([torch.randn(reference.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds])
    return draw(reference.sampler(generator), prompts, z)


def draw(sample: Callable[[list[str], Tensor], Tensor], prompts: Sequence[str], noise: Tensor) -> list[Image.Image]:
    """A `Reference.sampler`'s pictures of noise [B, C, H, W], as many at once as memory holds."""

    def pixels_of(rows: slice) -> Tensor:
        return (sample(list(prompts[rows]), noise[rows]) * 255).round().byte().permute(0, 2, 3, 1).cpu()

    batches = Batches(pictures_at_once(noise.shape[1:])).map(pixels_of, len(prompts))
    return [Image.fromarray(picture) for batch in batches for picture in batch.numpy()]
