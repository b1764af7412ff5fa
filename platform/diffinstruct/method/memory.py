"""Batches that memory holds, whose size is halved where it ends; copies to a GPU that wait for none of its work; and how
a GPU's memory is handed out."""

import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device. To a GPU it is copied from page-locked memory: from other memory a copy waits until the GPU
    has done all that it was told."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def allocator_settings() -> dict[str, str]:
    """The environment of processes that use a GPU, for before torch first does: its allocator lets segments grow, which
    leaves fewer holes that nothing fits into. What the user has set stays."""
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the name of older versions
    chosen = {name: os.environ[name] for name in names if name in os.environ}
    return chosen or {names[0]: "expandable_segments:True"}


def out_of_memory(error: BaseException) -> bool:
    """Whether it says that the memory of a GPU or of the machine is used up."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def halving(compute: Callable[[int], T], size: int, rows: int) -> tuple[T, int]:
    """`compute(size)` and the size, which is halved as often as memory ends; of so many rows all may be fewer than that.

    Raises the error of size 1.
    """
    while True:
        try:
            return compute(size), size
        except (RuntimeError, MemoryError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        # Outside the handler: the error's frames, which hold the tensors that were too many, are gone.
        size = -(-min(size, rows) // 2)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Batches:
    """Splits rows into batches. A size that memory did not hold is not tried again."""

    def __init__(self, size: int) -> None:
        self.size = size

    def map(self, compute: Callable[[slice], T], rows: int) -> Iterator[T]:
        """`compute` of one slice of the rows after another; it should return less than it takes."""
        start = 0
        while start < rows:
            answer, self.size = halving(
                lambda size, start=start: compute(slice(start, min(start + size, rows))),  # type: ignore[misc]
                self.size,
                rows - start,
            )
            yield answer
            start += self.size
