"""The conditions of a run's prompts: encoded in batches of one shape, or read from a folder, and kept in main memory."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future

import torch
from torch import Tensor

from diffinstruct.method.diffusion import Conditions
from diffinstruct.models.prompt_embeddings import Embeddings

ENCODED_AT_ONCE = 8
"""Prompts that go through the text encoders together."""
CACHED_BYTES = 2**30
"""Main memory for what was encoded: 4,551 prompts of SD1.5, 196 of SD3, in fp32."""


class PromptConditions:
    """prompts -> conditions on the device: read from `stored`, or encoded where they are not cached.

    encode: the conditions of at most ENCODED_AT_ONCE prompts, each of batch size 1, in main memory.
    """

    def __init__(
        self,
        encode: Callable[[Sequence[str | None]], list[Conditions]],
        device: torch.device | str,
        stored: Embeddings | None = None,
    ) -> None:
        self._encode, self._device, self.stored = encode, torch.device(device), stored
        self._cache: dict[str | None, Conditions] = {}
        self._ahead: tuple[Sequence[str | None], Future[Conditions]] | None = None

    def __call__(self, prompts: Sequence[str | None]) -> Conditions:
        """The conditions of `prompts`, which are at least one."""
        if self._ahead and self._ahead[0] == prompts:
            batch = self._ahead[1].result()
        else:
            batch = self._batch(prompts)
        return {key: value.to(self._device, non_blocking=True) for key, value in batch.items()}

    def read_ahead(self, prompts: Sequence[str | None], executor: Executor) -> None:
        """Let `executor` read what will be asked for next. What has to be encoded is not: it would take the memory and the
        time of the round that goes on meanwhile."""
        if self.stored:
            self._ahead = prompts, executor.submit(self._batch, prompts)

    def encoded(self, prompts: Sequence[str | None]) -> Iterator[tuple[str | None, Conditions]]:
        """Each of `prompts` with its conditions."""
        for i in range(0, len(prompts), ENCODED_AT_ONCE):
            part = prompts[i : i + ENCODED_AT_ONCE]
            yield from zip(part, self._encode(part), strict=True)

    def _batch(self, prompts: Sequence[str | None]) -> Conditions:
        """In main memory; for a GPU page-locked, so that the copy waits for no other work."""
        known = self._known(list(dict.fromkeys(prompts)))
        return {key: self._joined([known[prompt][key] for prompt in prompts]) for key in known[prompts[0]]}

    def _joined(self, rows: list[Tensor]) -> Tensor:
        shape, locked = (len(rows), *rows[0].shape[1:]), self._device.type == "cuda"
        return torch.cat(rows, out=torch.empty(shape, dtype=rows[0].dtype, pin_memory=locked))

    def _known(self, prompts: Sequence[str | None]) -> dict[str | None, Conditions]:
        if self.stored:
            return {prompt: self.stored.read(prompt) for prompt in prompts}
        known = {prompt: self._cache.pop(prompt) for prompt in prompts if prompt in self._cache}
        known |= self.encoded([prompt for prompt in prompts if prompt not in known])
        self._cache |= known  # what was used last comes last
        size = sum(value.nbytes for value in known[prompts[0]].values())
        while len(self._cache) * size > CACHED_BYTES:
            del self._cache[next(iter(self._cache))]
        return known
