"""Values that are not finite: where they were found, and the error that leaves the update out."""

import math
from collections.abc import Sequence
from typing import Any

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
        super().__init__(f"step {step}: the {network}'s gradient is not finite{why}; its weights are unchanged")

    def __reduce__(self) -> tuple[Any, ...]:
        return NonFiniteGradient, (self.step, self.network, self.cause)


class FiniteCheck:
    """What this worker has found in a round that is not finite."""

    def __init__(self, prompts: Sequence[str]) -> None:
        self.prompts = prompts
        self.first: str | None = None

    def check(self, what: str, values: Tensor, part: slice = slice(None)) -> bool:
        """Whether the values [B, ...] of these samples are finite."""
        finite = values.detach().reshape(len(values), -1).isfinite().all(1)
        if finite.all().item():
            return True
        prompts = self.prompts[part]
        spoiled = [prompt for prompt, is_finite in zip(prompts, finite.tolist(), strict=True) if not is_finite]
        self.record(f"{what}, of {len(spoiled)} of {len(prompts)} samples, the first of them {spoiled[0]!r}")
        return False

    def record(self, what: str) -> None:
        self.first = self.first or what

    @property
    def gradient_factor(self) -> float:
        """1, or NaN once something was found: a loss or gradient times this shows all workers what one has found."""
        return math.nan if self.first else 1.0
