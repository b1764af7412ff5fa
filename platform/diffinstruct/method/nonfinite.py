"""Values that are not finite: where they were found, and the error that leaves the update out."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class NonFiniteGradient(RuntimeError):
    """A gradient is not finite: its update was left out, and with it the rest of the round. All workers raise it.

    network: "score network" or "generator".
    cause: the first thing on this worker that was not finite, with its prompt; None where all was well up to the
        gradient.
    """

    def __init__(self, step: int, network: str, cause: str | None) -> None:
        self.step, self.network, self.cause = step, network, cause
        why = f" ({cause})" if cause else ""
        super().__init__(f"step {step}: the {network}'s gradient is not finite{why}; no weight was changed by it")

    def __reduce__(self) -> tuple[Any, ...]:
        return NonFiniteGradient, (self.step, self.network, self.cause)


class FiniteCheck:
    """What this worker has found in a round that is not finite. It waits for the device only where it is asked."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = prompts
        self._checked: list[tuple[str, Tensor, slice]] = []
        self._all: Tensor | None = None
        """Whether all that was checked is finite, on the device: a look at it does not look at each check again."""
        self._recorded: list[tuple[int, str]] = []
        """What others found, and after how many checks."""

    def check(self, what: str, values: Tensor, rows: slice = slice(None)) -> None:
        """Look whether the values [B, ...] of these samples are finite."""
        finite = values.detach().reshape(len(values), -1).isfinite().all(1)
        self._checked.append((what, finite, rows))
        self._all = finite.all() if self._all is None else self._all & finite.all()

    def record(self, what: str) -> None:
        """Count what somebody else has found."""
        self._recorded.append((len(self._checked), what))

    @property
    def all_finite(self) -> bool:
        """Whether nothing was found so far. Waits for the device."""
        return not self._recorded and (self._all is None or bool(self._all.item()))

    @property
    def gradient_factor(self) -> Tensor | float:
        """1, or NaN once something was found: a loss or gradient times this shows all workers what one has found."""
        if self._recorded:
            return math.nan
        return 1.0 if self._all is None else torch.where(self._all, 1.0, math.nan)

    @property
    def first(self) -> str | None:
        """The first thing that was found, with its prompt. Waits for the device."""
        found = [(i, self._in_words(what, finite.tolist(), rows)) for i, (what, finite, rows) in enumerate(self._checked)]
        causes = [(i, words) for i, words in found if words] + self._recorded
        return min(causes, key=lambda cause: cause[0])[1] if causes else None

    def _in_words(self, what: str, finite: list[bool], rows: slice) -> str | None:
        prompts = self.prompts[rows]
        spoiled = [prompt for prompt, is_finite in zip(prompts, finite, strict=True) if not is_finite]
        return f"{what}, of {len(spoiled)} of {len(prompts)} samples, the first of them {spoiled[0]!r}" if spoiled else None
