"""The parts of a pipeline as its files have them: read whole, or refused by what is wrong with the files.

Each error is one line without the part's name, which `sources.read_source` adds.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import ConfigMixin
from safetensors import SafetensorError, safe_open

from diffinstruct.config.files import refuse_stand_in
from diffinstruct.config.inputs import WEIGHT_FILES
from diffinstruct.errors import UserError

VARIANTS = (None, "fp16", "bf16")
"""What stands in the names of a pipeline's files of weights, in the order in which they are looked for."""


def read_module(kind: Any, source: str, subfolder: str, **options: Any) -> Any:
    """A module of class `kind`, of diffusers or transformers, with all of its weights. Raises OSError or ValueError."""
    folder = Path(source, subfolder)
    if folder.is_dir():
        refuse_damaged(folder)
    where = {"subfolder": subfolder, **{key: options[key] for key in ("revision",) if key in options}}
    ours = issubclass(kind, ConfigMixin)
    config = kind.load_config(source, **where) if ours else kind.config_class.from_pretrained(source, **where).to_dict()
    if quantization := config.get("quantization_config"):
        raise ValueError(f"its weights are quantized ({quantization.get('quant_method')}); name the model with its own weights")
    if not ours:
        options["ignore_mismatched_sizes"] = True  # it then names them
    try:
        module, said = load_variant(kind, source, subfolder=subfolder, output_loading_info=True, **options)
    except OSError as error:
        raise OSError(f"{str(error).rstrip('. ')}{_what_is_there(folder)}") from None
    except ValueError as error:  # diffusers' advice is for those who write the call
        raise ValueError(str(error).partition(" If you want to instead")[0].replace("Cannot load  because ", "")) from None
    other = {key[0] if isinstance(key, tuple) else key for key in said["mismatched_keys"]}
    for keys, fault in (
        (said["missing_keys"], "missing in its files"),
        (other, "of another shape than its configuration says"),
    ):
        if keys:
            raise ValueError(f"{len(keys)} of its weights are {fault}, such as {min(keys)!r}")
    return module


def load_variant(kind: Any, source: str, **options: Any) -> Any:
    """`kind.from_pretrained`, of the files without a variant in their names, or of the half-precision ones where people
    have downloaded those alone."""
    first: OSError | None = None
    told = logging.getLogger("diffusers.models.modeling_utils")
    told.addFilter(_is_no_attempt)
    try:
        for variant in VARIANTS:
            try:
                return kind.from_pretrained(source, variant=variant, **options)
            except OSError as error:
                first = first or error
                if "file named" not in str(error):  # not what is missing, but a hub that does not answer
                    break
    finally:
        told.removeFilter(_is_no_attempt)
    assert first is not None
    raise first


def _is_no_attempt(record: logging.LogRecord) -> bool:
    """Whether it is not diffusers' line on a name of files that is tried: the others follow, or the error itself."""
    return not record.getMessage().startswith("An error occurred while trying to fetch")


def read_tokenizer(kind: Any, source: str, subfolder: str, longest: int | None, **options: Any) -> Any:
    """A tokenizer of class `kind`, which transformers also makes of a folder without a vocabulary, and without a limit.

    longest: tokens that its text encoder takes; None where the pipeline has a limit of its own.
    """
    tokenizer = kind.from_pretrained(source, subfolder=subfolder, **options)
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        files = " and ".join(sorted({*kind.vocab_files_names.values()} - {"tokenizer.json"}))
        raise ValueError(f"no vocabulary in it: neither {files} nor tokenizer.json")
    if longest:
        tokenizer.model_max_length = min(tokenizer.model_max_length, longest)
    return tokenizer


def refuse_damaged(folder: Path) -> None:
    """Refuse files of weights that are not whole, of all those in a folder. Raises ValueError or UserError."""
    for file in sorted(folder.glob("*.safetensors")):
        if not file.exists():  # a link whose blob is gone
            continue
        refuse_stand_in(file)
        try:
            with safe_open(str(file), framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file.name} is cut off or damaged: {error}") from None


def refuse_no_pipeline(source: str) -> None:
    """Refuse a folder that is not a pipeline's, by what it is. Raises UserError."""
    folder = Path(source)
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return
    pipelines = (path.parent for pattern in ("*", "snapshots/*") for path in folder.glob(f"{pattern}/model_index.json"))
    if inside := next(pipelines, None):
        hint = f"; did you mean '{inside}'?"
    else:
        hint = "; a reference is a whole pipeline" if (folder / "config.json").is_file() else ""
    raise UserError(f"reference.model: {source} has no model_index.json, so it is no pipeline{hint}")


def _what_is_there(folder: Path) -> str:
    """What a person is told of the weights in a folder, which are not those that were looked for."""
    return "; ".join(["", *_remarks(folder)]) if folder.is_dir() else ""


def _remarks(folder: Path) -> Iterator[str]:
    for file in sorted(folder.iterdir()):
        if file.is_symlink() and not file.exists():
            yield f"{file.name} is a link to what is not there"
        elif file.suffix == ".safetensors" or file.suffix == ".incomplete":
            yield f"there is {file.name}"
        elif file.suffix in WEIGHT_FILES:
            yield f"{file.name} is a pickle, which is not opened; diffusers' save_pretrained makes a .safetensors of it"
