"""The checkpoint store: what a run needs to go on exactly where it was, safe from crashes and bad disks.

    <folder>/step-00000100/tensors.safetensors   every tensor of the state, named by its place: "generator/conv.weight"
                           state.json            the state's tree; {"$tensor": name} stands where a tensor was
                           manifest.json         sha256 and size of both files

A checkpoint is written beside its place, flushed to the disk, and renamed into it: it is there whole or not at all.
Reading compares the digests first (safetensors alone loads a flipped byte silently), names what is broken, and takes
the one before. No pickles.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

State = dict[str, Any]
TENSORS, TREE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or one that was found cannot be used; the message names it and the reason."""


class CheckpointStore:
    """The checkpoints of one run. `folder` holds the `step-...` folders and nothing else; one process writes to it."""

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        self.folder = Path(folder).absolute()
        self.keep = max(1, keep)

    def save(self, step: int, state: State) -> Path:
        """Writes `state` (dicts, lists, tuples of tensors, numbers, strings, None; keys str or int), keeps the newest.

        Checkpoints *after* `step` go too: whoever writes an earlier step could not use them, or has started over.
        Raises CheckpointError when the disk does not take it (the checkpoints before stay as they are), TypeError for a
        value that has no place in a checkpoint.
        """
        tree, tensors = encode(state)
        final = self.folder / f"step-{step:08d}"
        temporary, replaced = final.with_suffix(".tmp"), final.with_suffix(".old")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left_over in self.folder.glob("step-*.tmp"):
                shutil.rmtree(left_over)
            temporary.mkdir()
            save_file(tensors, temporary / TENSORS)
            (temporary / TREE).write_text(json.dumps({"step": step, "state": tree}))
            manifest = {name: _fingerprint(temporary / name) for name in (TENSORS, TREE)}
            (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
            for path in (temporary / TENSORS, temporary / TREE, temporary / MANIFEST, temporary):
                _flush(path)
            if final.exists():  # no rename onto a folder: for a moment the old one is called .old, which `latest` reads
                shutil.rmtree(replaced, ignore_errors=True)
                final.rename(replaced)
            temporary.rename(final)
            _flush(self.folder)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint {final} could not be written: {error}. The ones before it are untouched."
            ) from error
        kept = [final, *[path for at, path in self._newest_first() if at < step][: self.keep - 1]]
        for _, path in self._newest_first():
            if path not in kept:
                shutil.rmtree(path, ignore_errors=True)
        return final

    def latest(self) -> tuple[int, State] | None:
        """(step, state) of the newest whole checkpoint, tensors on the CPU, or None. A broken one is reported."""
        for step, path in self._newest_first():
            try:
                return step, _read(step, path)
            except CheckpointError as error:
                logger.warning("checkpoint %s cannot be used (%s); trying the one before", path, error)
        return None

    def _newest_first(self) -> Iterator[tuple[int, Path]]:
        names = [re.fullmatch(r"step-(\d+)(\.old)?", path.name) for path in self.folder.glob("step-*")]
        for match in sorted(filter(None, names), key=lambda match: (-int(match[1]), match[0])):
            yield int(match[1]), self.folder / match[0]


def encode(state: State) -> tuple[Any, dict[str, Tensor]]:
    """A state as (JSON tree, tensors by name). One tensor at two places is stored once and read as one again."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}  # which tensor (memory and view of it) already has a name
    memory: set[int] = set()  # storages already written: safetensors refuses two views of one

    def store(tensor: Tensor, place: str) -> str:
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"checkpoint: {place} is a {tensor.layout} tensor on {tensor.device}, not a dense one")
        lazy = (tensor.is_conj(), tensor.is_neg())  # such a view has its base's memory and other values
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, lazy)
        if tensor.numel() and view in names:
            return names[view]
        packed = tensor.cpu().resolve_conj().resolve_neg().contiguous()
        storage = packed.untyped_storage()
        if storage.nbytes() != packed.nbytes or storage.data_ptr() in memory:
            packed = packed.clone()
        memory.add(packed.untyped_storage().data_ptr())
        while place in tensors:  # the keys "a/b" and a -> b, or 0 and "0", read alike
            place += "'"
        tensors[place] = packed
        names[view] = place
        return place

    def walk(value: Any, place: str) -> Any:
        if isinstance(value, Tensor):
            return {"$tensor": store(value, place)}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, dict):
            for key in value:
                if isinstance(key, bool) or not isinstance(key, int | str):
                    raise TypeError(f"checkpoint: {place} has the key {key!r}, keys are strings or integers")
            items = [(key, walk(child, f"{place}/{key}" if place else str(key))) for key, child in value.items()]
            plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
            # JSON alone would turn the 0 of an optimizer's state into "0"
            return dict(items) if plain else {"$dict": [list(item) for item in items]}
        if isinstance(value, list | tuple):
            children = [walk(child, f"{place}/{index}") for index, child in enumerate(value)]
            return children if isinstance(value, list) else {"$tuple": children}
        raise TypeError(f"checkpoint: {place} is a {type(value).__name__}, which is neither a tensor nor a plain value")

    return walk(state, ""), tensors


def decode(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `encode`."""
    match tree:
        case {"$tensor": name}:
            return tensors[name]
        case {"$dict": items}:
            return {key: decode(child, tensors) for key, child in items}
        case {"$tuple": children}:
            return tuple(decode(child, tensors) for child in children)
        case dict():
            return {key: decode(child, tensors) for key, child in tree.items()}
        case list():
            return [decode(child, tensors) for child in tree]
    return tree


def _read(step: int, path: Path) -> State:
    """The state in `path`. Raises CheckpointError with the reason if any part of it is not what was written."""
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        for name in (TENSORS, TREE):
            written, found = manifest[name], _fingerprint(path / name)
            if found["bytes"] != written["bytes"]:
                raise CheckpointError(f"{name}: {found['bytes']} bytes of {written['bytes']}")
            if found["sha256"] != written["sha256"]:
                raise CheckpointError(f"{name}: its content is not what was written (sha256 differs)")
        document = json.loads((path / TREE).read_bytes())
        if document["step"] != step:
            raise CheckpointError(f"{TREE}: it is of step {document['step']}")
        return decode(document["state"], load_file(path / TENSORS, backend="pread"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{type(error).__name__}: {error}") from error


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "bytes": path.stat().st_size}


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
