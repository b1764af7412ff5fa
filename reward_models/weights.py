"""Other people's checkpoints: of which commit, read without running what is in them, and fitted key by key."""

from __future__ import annotations

import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

Weights = str | Path | Mapping[str, Tensor]
"""A state dict, a local file, a local folder or a hub id (`owner/name@commit`) that holds it, or its https://
address."""


def at_commit(source: str | Path) -> tuple[str, str]:
    """A hub id and the commit that follows it after an @, by default the newest; a path as it is."""
    name, _, commit = str(source).partition("@")
    return (name, commit) if commit and not Path(source).exists() else (str(source), "main")


def read(weights: Weights, file: str = "") -> Mapping[str, Tensor]:
    """The state dict, on the CPU. safetensors, or torch's format with no pickled code in it.

    file: which one, in a folder or hub repository.
    Raises FileNotFoundError for what looks local and is not there, ValueError for a file that holds code or no tensors.
    """
    if isinstance(weights, Mapping):
        return weights
    path = Path(weights, file) if Path(weights).is_dir() else Path(weights)
    if str(weights).startswith("https://"):
        path = _downloaded(str(weights))
    elif not path.exists():
        name, commit = at_commit(weights)
        if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name) or path.suffix in (".pt", ".pth", ".bin", ".safetensors"):
            raise FileNotFoundError(f"weights: there is no {path}")
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(name, file, revision=commit))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"weights: {path} holds more than tensors and is not unpickled; convert it to safetensors") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"weights: {path} is no state dict")
    return state


def _downloaded(address: str) -> Path:
    """Kept under the whole address: files of one name from two commits are two files."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-{address.rpartition('/')[2]}"
    if not path.exists():
        torch.hub.download_url_to_file(address, str(path))  # beside it, then renamed
    return path


def _as_it_is(name: str, tensor: Tensor) -> Tensor:
    return tensor


def fill(
    model: nn.Module,
    state: Mapping[str, Tensor],
    theirs: Callable[[str], str],
    cut: Callable[[str, Tensor], Tensor] = _as_it_is,
    unused: str = "",
) -> None:
    """Load into `model` a state dict that has names of its own.

    theirs: the model's name of a tensor -> the state dict's.
    cut: (the model's name, the state dict's tensor) -> what of it the model takes.
    unused: pattern of names that the state dict may have beyond these.
    Raises ValueError that names all that is missing, left over, or of another shape, as the state dict calls it.
    """
    mine = model.state_dict()
    names = {ours: theirs(ours) for ours in mine}
    wrong = [f"{name} is missing" for name in sorted(set(names.values()) - set(state))]
    spare = set(state) - set(names.values())
    wrong += [f"{name} is left over" for name in sorted(spare) if not re.fullmatch(unused, name)]
    given = {ours: cut(ours, state[name]) for ours, name in names.items() if name in state}
    wrong += [
        f"{names[ours]} has {list(tensor.shape)} where {list(mine[ours].shape)} is due"
        for ours, tensor in given.items()
        if tensor.shape != mine[ours].shape
    ]
    if wrong:
        raise ValueError(f"weights do not fit {type(model).__name__}: {', '.join(wrong)}")
    model.load_state_dict(given)
