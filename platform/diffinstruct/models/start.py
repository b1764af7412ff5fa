"""A generator's start from a .safetensors file, as training scripts and hubs have them.

The weights of a whole network, named as diffusers or as the model's authors name them, maybe below a prefix that a
wrapper has left; or a LoRA (diffusers', peft's or kohya's names), which is merged into the reference's network.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
from safetensors.torch import load_file
from torch import Tensor, nn

from diffinstruct.errors import UserError
from diffinstruct.models.families import StableDiffusion
from diffinstruct.models.sources import message_lines, network_without_weights, pinned, quiet, read_source

KEY = "generator.init_from"
LORA_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""What diffusers and peft call the only file of weights in a LoRA's folder."""
LORA_NAMES = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.", "_lora.up.", "_lora.down.")


def lora_file(folder: Path) -> Path | None:
    """The file of weights of a folder that holds a LoRA and no network."""
    if any(path for pattern in ("config.json", "*/config.json") for path in folder.glob(pattern)):
        return None
    return next((file for name in LORA_FILES if (file := folder / name).is_file()), None)


def network_from_file(
    kind: Any, file: Path, config: Any, reference: str, family: type[StableDiffusion], base: Callable[[], Any]
) -> Any:
    """The network of class `kind` that a file's weights make, with the reference network's `config`. `base` loads the
    reference's network, for a LoRA.

    Raises UserError, one line, for a file that cannot be read, and by what it holds for one that is no such network.
    """
    weights = read_source(load_file, str(file), key=KEY)
    if any(name in key for key in weights for name in LORA_NAMES):
        return _with_lora(base(), file, weights, family)
    network = network_without_weights(kind, config)
    names = network.state_dict().keys()
    own = _without_prefix(weights, names)
    if own.keys() == names:
        try:
            network.load_state_dict(own, assign=True)
        except RuntimeError as error:
            why = f"does not fit the reference {reference}: {message_lines(error)[-1]}"
            raise UserError(f"{KEY}: {file} {why}") from None
        return network
    if len(own.keys() & names) > len(names) / 2:
        parts = ((names - own.keys(), "missing"), (own.keys() - names, "of no weight in it"))
        said = [f"{len(keys)} names are {what}, such as {min(keys)!r}" for keys, what in parts if keys]
        raise UserError(f"{KEY}: {file} is nearly the {kind.__name__} of {reference}: {' and '.join(said)}")
    return _converted(kind, file, weights, reference, family.part)


def _without_prefix(weights: Mapping[str, Tensor], names: Any) -> dict[str, Tensor]:
    """The weights without what stands before all of their names, such as "module." of DDP or "_orig_mod." of a compiled
    network; as they are where nothing does."""
    for name in names:
        for prefix in {key.removesuffix(name) for key in weights if key.endswith(f".{name}")}:
            if all(key.startswith(prefix) for key in weights):
                return {key.removeprefix(prefix): value for key, value in weights.items()}
        break
    return dict(weights)


def _converted(kind: Any, file: Path, weights: Mapping[str, Tensor], reference: str, part: str) -> Any:
    """The network that diffusers' own converter makes of the names that a model's authors gave."""
    first = f"{len(weights)} weights, such as {min(weights, default='none')!r}"
    if not hasattr(kind, "from_single_file"):
        raise UserError(f"{KEY}: {file} holds no {kind.__name__}: it has {first}")
    with quiet():
        name, revision = pinned(reference)
        convert = partial(kind.from_single_file, config=name, subfolder=part, **revision)
        try:
            return convert(str(file.absolute()))
        except Exception as error:  # the converters look for what they know and fall over what they do not
            why = f"it has {first}; diffusers' converter says: {message_lines(error)[-1]}"
            raise UserError(f"{KEY}: {file} holds no {kind.__name__}: {why}") from None


def _with_lora(network: Any, file: Path, weights: dict[str, Tensor], family: type[StableDiffusion]) -> Any:
    """The network with a LoRA merged into it. Raises UserError for one that also, or only, changes something else."""
    pipeline, alphas, metadata = getattr(diffusers, family.pipeline), None, None
    rank = max(min(value.shape[:2]) for value in weights.values() if value.dim() > 1)
    is_lora = f"{KEY}: {file} is a LoRA of rank {rank}"
    try:
        with quiet():
            if all(key.startswith("base_model.model.") for key in weights):
                weights = _scaled_by_peft(file, weights)
            elif hasattr(pipeline, "lora_state_dict"):
                unet = {"unet_config": network.config} if family.part == "unet" else {}
                file_with_metadata = {"use_safetensors": True, "return_lora_metadata": True}
                weights, *more, metadata = pipeline.lora_state_dict(str(file.absolute()), **file_with_metadata, **unet)
                alphas = more[0] if more else None
            own = {key: value for key, value in weights.items() if key.startswith(f"{family.part}.")} or weights
            if other := sorted(weights.keys() - own.keys()):
                raise UserError(f"{is_lora} that also changes {other[0].split('.')[0]}, which a run takes from reference.model")
            scaled = {"network_alphas": alphas, "metadata": metadata}
            network.load_lora_adapter(dict(own), prefix=None if own is weights else family.part, **scaled)
            network.fuse_lora(safe_fusing=True)
            network.unload_lora()
    except UserError:
        raise
    except Exception as error:  # diffusers and peft raise whatever they fall over
        what = f"that does not fit {type(network).__name__} as it is here: {message_lines(error)[0]}"
        raise UserError(f"{is_lora} {what}") from error
    return nn.Module.requires_grad_(network, False)


def _scaled_by_peft(file: Path, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's weights by diffusers' names, with what its configuration beside them multiplies them by."""
    config = json.loads((file.parent / "adapter_config.json").read_text(encoding="utf-8"))
    factor = config["lora_alpha"] / config["r"] ** (0.5 if config.get("use_rslora") else 1)
    if config.get("alpha_pattern") or config.get("rank_pattern") or config.get("use_dora"):
        raise ValueError("its adapter_config.json has alpha_pattern, rank_pattern or use_dora")
    named = {key.removeprefix("base_model.model."): value for key, value in weights.items()}
    return {key: value * factor if ".lora_B." in key else value for key, value in named.items()}
