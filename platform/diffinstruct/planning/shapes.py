"""What an operation on tensors without content gives, remembered: torch's own way to find it out takes many times as
long, and a round asks the same of each block, micro-batch and update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

CHANGE_SHAPES = ("set_", "resize_", "resize_as_", "as_strided_", "t_", "transpose_", "squeeze_", "unsqueeze_", "detach_")
"""Operations in place that do more to a tensor than to write into it."""


@dataclass(frozen=True)
class _Output:
    """An output as to its shape; `view_of`: the tensor among the arguments whose storage it shares."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    state: Mapping[str, Any]
    view_of: int | None

    def made(self, tensors: Sequence[FakeTensor]) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
            if self.view_of is not None:
                empty.set_(tensors[self.view_of].untyped_storage(), self.offset, self.shape, self.stride)
        fake = Tensor._make_subclass(FakeTensor, empty, False, dispatch_device=True, device_for_backend_keys=self.device)
        fake.__dict__.update(self.state)
        return fake


class RememberedShapes:
    """Does operations, and those that it knows without torch."""

    def __init__(self) -> None:
        self._known: dict[Any, list[Any] | None] = {}

    def __call__(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
        tensors = list(_tensors((args, tuple(kwargs.values()))))
        if not all(isinstance(tensor, FakeTensor) and tensor.constant is None for tensor in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            name = func._schema.name.rpartition("::")[2]
            if not name.endswith("_") or name in CHANGE_SHAPES:
                return func(*args, **kwargs)
            return args[0] if func._schema.returns else None
        key = (func, _key(args), _key(tuple(kwargs.items())))
        outputs = self._known.get(key)
        if outputs is None:
            result = func(*args, **kwargs)
            if isinstance(result, FakeTensor | tuple | list):
                self._known[key] = _described(result, tensors)
            return result
        made = [output.made(tensors) if isinstance(output, _Output) else output for output in outputs[1:]]
        return made[0] if outputs[0] is None else outputs[0](made)


def _described(result: Any, tensors: Sequence[FakeTensor]) -> list[Any] | None:
    """The kind of sequence that a result is (None: it is a tensor), and its items; None where that is not all."""
    storages = {tensor.untyped_storage()._cdata: i for i, tensor in enumerate(tensors)}
    items: list[Any] = [None]
    for item in result if isinstance(result, tuple | list) else (result,):
        if isinstance(item, Tensor):
            if not isinstance(item, FakeTensor) or item.constant is not None or any(item is tensor for tensor in tensors):
                return None
            place = storages.get(item.untyped_storage()._cdata)
            offset, state = int(item.storage_offset()), dict(item.__dict__)
            items.append(_Output(tuple(item.shape), item.stride(), offset, item.dtype, item.fake_device, state, place))
        elif isinstance(item, tuple | list):
            return None
        else:
            items.append(item)
    items[0] = type(result) if isinstance(result, tuple | list) else None
    return items


def _tensors(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(value)


def _key(values: Any) -> tuple[Any, ...]:
    """Values by what an operation's shapes depend on; 1, 1.0 and True are three."""
    return tuple(
        (value.shape, value.stride(), value.storage_offset(), value.dtype, value.fake_device)
        if isinstance(value, FakeTensor)
        else _key(value)
        if isinstance(value, tuple | list)
        else (type(value), value)
        for value in values
    )
