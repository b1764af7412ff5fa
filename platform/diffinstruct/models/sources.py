"""Where weights come from: folders, hub ids and files, and what is refused.

Other `WeightSource`s are for rehearsals: a pipeline's modules with random weights, or with none.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from diffusers import ConfigMixin
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import hf_hub_download
from huggingface_hub.constants import HF_HUB_CACHE
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import tokenization_utils_base as tokenization
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils import logging as transformers_logging

from diffinstruct.config.files import refuse_stand_in
from diffinstruct.config.inputs import names_a_file
from diffinstruct.errors import UserError, nearest_file
from diffinstruct.locks import exclusive
from diffinstruct.method.diffusion import Conditions
from diffinstruct.models.families import FAMILIES, StableDiffusion
from diffinstruct.models.parts import read_module
from diffinstruct.models.prompt_embeddings import digest

SUPPORTED = f"supported are pipelines of class {', '.join(FAMILIES)}"


class PipelineIndex(ConfigMixin):
    config_name = "model_index.json"


# ------------------------------------------------------------------------------------------------- the seam
class WeightSource:
    """Makes a pipeline's modules, of the weights that lie beside their configurations, in a folder or on the hub."""

    def load(self, kind: Any, source: str, subfolder: str, dtype: torch.dtype, device: torch.device | str) -> Any:
        """A module of class `kind`, of diffusers or transformers, in evaluation mode."""
        load = partial(read_module, kind)
        with quiet() if Path(source).is_dir() else nullcontext():  # a download keeps its progress bar
            part = read_source(load, source, subfolder=subfolder, use_safetensors=True, dtype=dtype)
        return part.to(device).eval()

    def conditions(self, blank: Callable[[], Conditions], device: torch.device | str) -> Conditions | None:
        """One prompt's conditions, of the shapes of `blank()`; None leaves them to the text encoders."""
        return None


class RandomWeights(WeightSource):
    """Random weights, at every call the same, and random conditions: to measure speed and memory without a download."""

    def load(self, kind: Any, source: str, subfolder: str, dtype: torch.dtype, device: torch.device | str) -> Any:
        torch.manual_seed(0)
        return nn.Module.to(without_weights(kind, source, subfolder, device), dtype).eval()

    def conditions(self, blank: Callable[[], Conditions], device: torch.device | str) -> Conditions | None:
        return {
            key: torch.randn(value.shape, device=device) if value.is_floating_point() else value.to(device)  # a mask stays one
            for key, value in blank().items()
        }


class NoWeights(WeightSource):
    """Modules on the meta device, which have shapes and take no memory: for counting."""

    def load(self, kind: Any, source: str, subfolder: str, dtype: torch.dtype, device: torch.device | str) -> Any:
        return nn.Module.to(without_weights(kind, source, subfolder, "meta"), dtype)

    def conditions(self, blank: Callable[[], Conditions], device: torch.device | str) -> Conditions | None:
        return blank()


def without_weights(kind: Any, source: str, subfolder: str, device: torch.device | str) -> Any:
    """A module as its class initializes it, of the configuration in `source`; no file of weights is read."""
    with torch.device(device), quiet():
        if issubclass(kind, ConfigMixin):
            return kind.from_config(read_source(kind.load_config, source, subfolder=subfolder))
        return kind(read_source(kind.config_class.from_pretrained, source, subfolder=subfolder))


def network_without_weights(kind: Any, config: Any) -> Any:
    """diffusers' network on the meta device, with its buffers, which no file holds, where they belong."""
    with init_empty_weights(include_buffers=False):
        return kind.from_config(config)


# ------------------------------------------------------------------------------------------------- text encoders
TOKENIZER_FILES = {
    *(tokenization.ADDED_TOKENS_FILE, tokenization.SPECIAL_TOKENS_MAP_FILE),
    *(tokenization.TOKENIZER_CONFIG_FILE, tokenization.FULL_TOKENIZER_FILE),
}
"""Files that transformers reads of a tokenizer, beside the vocabulary files that its class names."""


def text_encoders(source: str, family: type[StableDiffusion]) -> tuple[str, dict[str, str]]:
    """A name for what makes embeddings, and what a person is told of it. A hub model's is its id and commit, so that no
    weights are read; a folder's comes from the names and content of the files that are read of it."""
    if not Path(source).is_dir():
        name, at = pinned(source)[0], commit(source)
        return f"{family.__name__}-{name.replace('/', '--')}@{at[:12]}", {"reference": f"{name}@{at}"}
    files = [file for part in family.texts for file in _read_of_text_part(Path(source, part), family.texts[part])]
    return f"{family.__name__}-{digest(files)}", {"reference": str(Path(source).absolute())}


def commit(source: str) -> str:
    """The commit of a hub id, or of an id@commit; asks the hub where only a branch or nothing is named."""
    revision = pinned(source)[1].get("revision", "")
    if re.fullmatch("[0-9a-f]{40}", revision):
        return revision
    return Path(read_source(hf_hub_download, source, filename=PipelineIndex.config_name)).parent.name


def _read_of_text_part(folder: Path, kind: str) -> list[Path]:
    """The files that transformers reads of a tokenizer or text encoder of class `kind`."""
    if vocabulary := getattr(getattr(transformers, kind), "vocab_files_names", None):
        names = {*vocabulary.values(), *TOKENIZER_FILES}
    elif (folder / SAFE_WEIGHTS_NAME).exists():
        names = {CONFIG_NAME, SAFE_WEIGHTS_NAME}
    elif (folder / SAFE_WEIGHTS_INDEX_NAME).exists():  # it is several files
        index = read_source(
            lambda path: json.loads(Path(path).read_text(encoding="utf-8")), str(folder / SAFE_WEIGHTS_INDEX_NAME)
        )
        names = {CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, *index["weight_map"].values()}
    else:  # half-precision ones alone
        names = {CONFIG_NAME, *(file.name for file in folder.glob("model.*.safetensors"))}
    return [folder / name for name in names if (folder / name).is_file()]


# ------------------------------------------------------------------------------------------------- files
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
        raise UserError(f"reference.model: {file} cannot be unpacked into {folder}: {message_lines(error)[0]}") from None


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars, and no remarks on torchvision (not needed here) or on a key that AutoencoderTiny ignores."""
    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_logging, transformers_logging)]
    for log, *_ in before:
        log.set_verbosity_error()
        log.disable_progress_bar()
    try:
        yield
    finally:
        for log, verbosity, bar in before:
            log.set_verbosity(verbosity)
            if bar:
                log.enable_progress_bar()


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
        raise UserError(f"{key}: {source} names a commit of the hub, but {name} lies here; './{name}' is what lies here")
    if not path.exists() and (names_a_file(name) or ("/" in name and path.parent.is_dir())):
        raise UserError(f"{key}: no such file or folder: {name}{nearest_file(path, '*')}")


def only_safetensors(key: str, file: Path) -> None:
    if file.suffix != ".safetensors":
        raise UserError(f"{key}: {file} is no .safetensors file, and files of other kinds are not opened")
    try:
        refuse_stand_in(file)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def message_lines(error: Exception) -> list[str]:
    """What it says, without empty lines."""
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
