"""A run's state as a JSON tree and tensors by name, and back."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

State = dict[str, Any]


@dataclass(frozen=True)
class TensorShard:
    """One rank's shard of a tensor split along dim 0, as `torch.chunk` cuts it; `shape` is the full tensor's."""

    own: Tensor
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor, or a rank's shard, that lies in a checkpoint's files under this name and is not loaded."""

    name: str


def encode(state: State, spare: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[Any, dict[str, Tensor]]:
    """A state as a JSON tree and its tensors' copies by name; one tensor at two places is stored once. Copies go into
    those of `spare` that have the same name, shape and type."""
    tensors: dict[str, Tensor] = {}
    names: dict[tuple[Any, ...], str] = {}  # which tensor (memory and view of it) already has a name

    def store(tensor: Tensor | StoredTensor, place: str) -> str:
        if isinstance(tensor, StoredTensor):
            return tensor.name
        tensor = tensor.detach()
        if tensor.layout != torch.strided or tensor.is_meta:
            raise TypeError(f"checkpoint: {place} is a {tensor.layout} tensor on {tensor.device}, not a dense one")
        lazy = (tensor.is_conj(), tensor.is_neg())  # such a view has its base's memory and other values
        view = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, lazy)
        if tensor.numel() and view in names:
            return names[view]
        while place in tensors:  # the keys "a/b" and a -> b, or 0 and "0", read alike
            place += "'"
        copy = spare.get(place)
        if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
            copy = torch.empty(tensor.shape, dtype=tensor.dtype)
        tensors[place] = copy.copy_(tensor)
        names[view] = place
        return place

    return _encoded(state, "", store), tensors


def _encoded(value: Any, place: str, store: Callable[[Tensor | StoredTensor, str], str]) -> Any:
    """A part of a state as a JSON tree; `store` keeps a tensor and returns its name."""
    # Neither this nor `decode` is a function in a function: one that calls itself is a cycle, which holds all tensors
    # until Python looks for cycles, and for hours it need not.
    if isinstance(value, Tensor | StoredTensor):
        return {"$tensor": store(value, place)}
    if isinstance(value, TensorShard):
        return {"$rows": store(value.own, place), "shape": list(value.shape)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        for key in value:
            if isinstance(key, bool) or not isinstance(key, int | str):
                raise TypeError(f"checkpoint: {place} has the key {key!r}, keys are strings or integers")
        items = [(key, _encoded(child, f"{place}/{key}" if place else str(key), store)) for key, child in value.items()]
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        # JSON alone would turn the 0 of an optimizer's state into "0"
        return dict(items) if plain else {"$dict": [list(item) for item in items]}
    if isinstance(value, list | tuple):
        children = [_encoded(child, f"{place}/{index}", store) for index, child in enumerate(value)]
        return children if isinstance(value, list) else {"$tuple": children}
    raise TypeError(f"checkpoint: {place} is a {type(value).__name__}, which is neither a tensor nor a plain value")


def decode(tree: Any, tensor: Callable[[str], Any], rows: Callable[[str, tuple[int, ...]], Any]) -> Any:
    """The inverse of `encode`, with tensors and rows by their names."""
    match tree:
        case {"$tensor": name}:
            return tensor(name)
        case {"$rows": name, "shape": shape}:
            return TensorShard(rows(name, tuple(shape)), tuple(shape))
        case {"$dict": items}:
            return {key: decode(child, tensor, rows) for key, child in items}
        case {"$tuple": children}:
            return tuple(decode(child, tensor, rows) for child in children)
        case dict():
            return {key: decode(child, tensor, rows) for key, child in tree.items()}
        case list():
            return [decode(child, tensor, rows) for child in tree]
    return tree


def outline(tree: Any) -> Any:
    """As `decode`, with a StoredTensor in each tensor's place."""
    return decode(tree, StoredTensor, lambda name, shape: StoredTensor(name))
