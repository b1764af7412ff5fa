"""Thresholds and counters of what is not finite and of over-optimization; `Trainer.roll_back` and `apply_alarm` act on
them."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from diffinstruct.method.nonfinite import NonFiniteGradient


class AlarmAction(IntEnum):
    """What a probe leads to. All ranks do the least of their values."""

    STOP = 0
    LOWER_SCALE = 1
    CONTINUE = 2


ON_ALARM = {"warn": AlarmAction.CONTINUE, "lower_scale": AlarmAction.LOWER_SCALE, "stop": AlarmAction.STOP}
"""What an alarm leads to, by `overoptimization.on_alarm`."""
MAX_SKIPS_IN_A_ROW = 5
"""The run rolls back once so many rounds in a row were skipped because something in them was not finite."""
SPIKE = 10.0  # A gradient's norm is a spike beyond so many times its mean over the window before


@dataclass
class NonFiniteGuard:
    """Counts the rounds that were skipped because something in them was not finite, and the rollbacks."""

    skipped: int = 0
    consecutive: int = 0
    rollbacks: int = 0
    rolled_back: bool = False  # and not come to another checkpoint since

    def add(self, error: NonFiniteGradient, causes: Sequence[str | None]) -> str:
        """Count a skipped round; returns its reason, from what all ranks have found."""
        self.skipped += 1
        self.consecutive += 1
        known = [(rank, cause) for rank, cause in enumerate(causes) if cause]
        reasons = [f"worker {rank}: {cause}" if len(causes) > 1 else cause for rank, cause in known]
        return "; ".join(reasons) or f"the {error.network}'s gradient, with all before it finite"

    def roll_back(self, skipped: int) -> None:
        """Note a rollback in the state of an earlier step; the skipped rounds since then stay counted."""
        self.skipped, self.consecutive, self.rolled_back = skipped, 0, True
        self.rollbacks += 1

    def give_up(self, step: int, error: NonFiniteGradient, reason: str) -> NonFiniteGradient:
        """The error that ends the run."""
        again = "once more after going back" if self.rolled_back else "with no checkpoint to go back to"
        return NonFiniteGradient(step, error.network, f"{reason}; {self.consecutive} steps in a row, {again}")

    def seed(self, seed: int) -> int:
        """The seed that a run with this seed draws from after its rollbacks."""
        return seed + (self.rollbacks << 32)  # `seed` has 30 bits

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
