"""A GPU that is not there: what lies on it has shapes and no content, and all that a program would wait for is counted.

torch's fake tensors bring the rules: what a factory makes on "cuda" stays there, and so does what is computed from it;
two devices in one operation raise. A torch that is built for CPUs knows no such device where autograd and `.to` ask in
C++, so they are told "meta", and Python is told "cuda:0".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import diffinstruct

GPU, META = torch.device("cuda", 0), torch.device("meta")
PACKAGE = Path(diffinstruct.__file__).parent
aten = torch.ops.aten
INDEXED = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
OF_UNKNOWN_SIZE = (aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.repeat_interleave)
"""Operations whose result's size is known on the GPU alone."""


class WrongDevice(AssertionError):
    """An operation that a GPU would refuse."""


class AbsentGpu(TorchDispatchMode):
    """It counts, by the place in the package that they come from: `copies` to the GPU that wait for nothing, and `waits`,
    in which the program stands still until the GPU has done all that it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.copies, self.waits = Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.ops.prim.device.default:
            return META if _on_gpu(args[0]) else args[0].fake_device
        if kwargs.get("device") == META:
            kwargs["device"] = GPU
        if func is aten._local_scalar_dense.default:
            if _on_gpu(args[0]):
                self._wait("a number is read")
            return 0.5  # finite, positive, true
        if func is aten._to_copy.default:
            self._copy(args[0], kwargs.get("device", args[0].device), kwargs.get("non_blocking", False))
        if func is aten.copy_.default:
            self._copy(args[1], args[0].device, args[2] if len(args) > 2 else False)
        if func in INDEXED:
            self._index(args[0], [index for index in args[1] if index is not None])
        if func._overloadpacket in OF_UNKNOWN_SIZE and _on_gpu(args[0]):
            self._wait(f"the size of {func._overloadpacket.__name__}'s result is read")
        return func(*args, **kwargs)

    def _copy(self, source: Tensor, target: torch.device, non_blocking: bool) -> None:
        if _on_gpu(source) == (target.type == "cuda"):
            return
        if _on_gpu(source):
            self._wait("copy to the CPU")
        elif non_blocking and getattr(source, "page_locked", False):
            self.copies[f"copy to the GPU  {_place()}"] += 1
        else:
            self._wait("copy to the GPU from pageable memory")

    def _index(self, indexed: Tensor, indices: list[Tensor]) -> None:
        for index in indices:
            if _on_gpu(index) and not _on_gpu(indexed):
                raise WrongDevice(f"{_place()}: a tensor on the CPU is indexed by one on the GPU")
            if _on_gpu(index) and index.dtype == torch.bool:
                self._wait("the size of what a mask picks is read")
            if _on_gpu(indexed) and not _on_gpu(index):
                self._wait("copy of an index to the GPU")

    def _wait(self, what: str) -> None:
        self.waits[f"{what}  {_place()}"] += 1

    def __str__(self) -> str:
        """A line for each place."""
        return "\n".join(f"{count:>4}  {what}" for what, count in sorted((self.waits + self.copies).items()))


@contextmanager
def absent_gpu() -> Iterator[AbsentGpu]:
    """In the block tensors can be made on GPU, and are copied there."""
    with ExitStack() as stack:
        for patch in (
            mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
            mock.patch("torch.cuda.is_bf16_supported", lambda *_: True),
            mock.patch.object(Tensor, "pin_memory", _page_locked),
            mock.patch.object(FakeTensor, "is_cuda", property(_on_gpu), create=True),
            mock.patch.object(FakeTensor, "is_meta", property(lambda self: self.device.type == "meta"), create=True),
            FakeTensorMode(allow_non_fake_inputs=True),
        ):
            stack.enter_context(patch)
        yield stack.enter_context(AbsentGpu())


def _on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, FakeTensor) and tensor.fake_device.type == "cuda"


def _page_locked(tensor: Any) -> Any:
    if not getattr(tensor, "page_locked", False):
        tensor = tensor.clone()
        tensor.page_locked = True
    return tensor


def _place() -> str:
    """The innermost function of the package that is being called, but for the one that copies for others."""
    frame = sys._getframe()
    while frame.f_back is not None:
        if (path := Path(frame.f_code.co_filename)).is_relative_to(PACKAGE) and path.name != "memory.py":
            return f"{path.relative_to(PACKAGE)}:{frame.f_code.co_qualname.partition('.<locals>')[0]}"
        frame = frame.f_back
    return "elsewhere"
