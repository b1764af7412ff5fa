"""Where weights come from: folders, hub ids and files, and what is refused."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from diffinstruct.errors import UserError, nearest_file
from diffinstruct.locks import exclusive
from diffinstruct.models.families import FAMILIES
from diffinstruct.models.prompt_embeddings import digest

POCKET = Path(__file__).parents[1] / "pocket"
SUPPORTED = f"supported are pipelines of class {', '.join(FAMILIES)}"


class PipelineIndex(ConfigMixin):
    config_name = "model_index.json"


def unpacked(file: Path) -> Path:
    """The pipeline's folder that diffusers makes of a file that holds all of it, in the file's precision. It is kept
    beside what is downloaded, under the file's name and content.

    What the file does not hold (configuration, tokenizers) is that of the model that diffusers takes it to be a version
    of. Raises UserError for a file that holds none, and for a folder that cannot be written.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config  # takes a second, for what is rare

    only_safetensors("reference.model", file)
    file = file.resolve()
    folder = Path(HF_HUB_CACHE, "diffinstruct", f"{file.stem}-{digest([file])}")
    if folder.is_dir():
        return folder
    weights = read_source(load_file, str(file), key="reference.model")
    kept = fetch_diffusers_config(weights)["pretrained_model_name_or_path"]
    why = f"reference.model: {file} is taken for a version of {kept}, whose configuration is not here"
    name = read_source(PipelineIndex.load_config, kept, key=why)["_class_name"]
    if name not in FAMILIES:
        raise UserError(f"reference.model: {file} is a {name}; {SUPPORTED}")
    dtype = next((weight.dtype for weight in weights.values() if weight.is_floating_point()), torch.float32)
    partial = folder.with_name(f".{folder.name}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f"{folder.name}.lock")), quiet(), warnings.catch_warnings():
            if folder.is_dir():  # of a node's processes another one has made it
                return folder
            warnings.simplefilter("ignore")
            try:
                pipeline = getattr(diffusers, name).from_single_file(str(file), dtype=dtype)
            except Exception as error:  # the converters look for what they know and fall over what they do not
                raise UserError(f"reference.model: {file} holds no {name}: {message_lines(error)[0]}") from None
            pipeline.save_pretrained(partial)
            return partial.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"reference.model: {file} cannot be unpacked into {folder}: {message_lines(error)[0]}"
        ) from None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for files on disk, no remark on torchvision (which nothing here needs) or on the key that
    AutoencoderTiny writes and does not read."""
    verbosity, bars = diffusers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    diffusers_bars = diffusers_logging.is_progress_bar_enabled()
    transformers_verbosity = transformers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(verbosity)
        transformers_logging.set_verbosity(transformers_verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        if diffusers_bars:
            diffusers_logging.enable_progress_bar()


def read_source(load: Callable[..., Any], source: str, key: str = "", **where: Any) -> Any:
    """`load(source, ...)`; what is missing becomes one line for the user, of the configuration's `key`."""
    name, revision = pinned(source)
    try:
        return load(name, **where, **revision)
    except (OSError, ValueError, SafetensorError) as error:
        part = f" of {source}" if where.get("subfolder") else source
        said = f"cannot read {where.get('subfolder', '')}{part}: {message_lines(error)[0]}"
        raise UserError(f"{key}: {said}" if key else said) from error


def pinned(source: str) -> tuple[str, dict[str, str]]:
    """A hub id and what names the commit that follows it after an @; a path as it is."""
    name, _, revision = source.partition("@")
    return (name, {"revision": revision}) if revision and not Path(source).exists() else (source, {})


def refuse_missing(key: str, source: str) -> None:
    """Refuse what can only be a file or a folder, not a hub id, and is not there."""
    name, commit = pinned(source)
    path = Path(name)
    if commit and path.exists():
        raise UserError(
            f"{key}: {source} names a commit of the hub, but {name} lies here; './{name}' is what lies here"
        )
    local = path.suffix in (".safetensors", ".ckpt", ".bin", ".pt", ".pth") or name.startswith((".", "~", "/"))
    if not path.exists() and (local or name.count("/") > 1 or ("/" in name and path.parent.is_dir())):
        raise UserError(f"{key}: no such file or folder: {name}{nearest_file(path, '*')}")


def only_safetensors(key: str, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"{key}: {file} is no .safetensors file, and files of other kinds are not opened")


def message_lines(error: Exception) -> list[str]:
    """What it says, without empty lines."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
