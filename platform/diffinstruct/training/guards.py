"""What a run does about steps that are not finite and about reward hacking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffinstruct.method.nonfinite import NonFinite
from diffinstruct.method.step import StepConfig

if TYPE_CHECKING:
    from diffinstruct.training.run_log import Output

GO_ON, LOWER_SCALE, STOP = 2, 1, 0
"""What a look leads to, for all workers: the least of them counts."""
SKIPS = 5
"""Steps in a row that are left out because something in them was not finite, until the run goes back."""
SPIKE = 10.0
"""A gradient's norm is a spike at so many times its mean over the rows of metrics before."""


def heed(verdict: int, settings: StepConfig, step: int, output: Output | None) -> tuple[StepConfig, bool]:
    """What a look leads to, on all workers alike: the settings from here on, and whether the run ends."""
    if verdict == LOWER_SCALE:
        settings = replace(settings, reward_scale=settings.reward_scale / 2)
    if output and verdict != GO_ON:
        halved = f"reward_scale is {settings.reward_scale:g} from here on"
        what = halved if verdict == LOWER_SCALE else "the run ends here, as if it were finished"
        output.said(step, "on_hacking", f"overoptimization.on_alarm: {what}")
    return settings, verdict == STOP


# ----------------------------------------------------------------------------------------------------- output
class Skips:
    """The steps that were left out because something in them was not finite."""

    def __init__(self) -> None:
        self.all = 0
        self.in_a_row = 0
        self.detours = 0  # how often the run has gone back; each time it goes on with other prompts and noise
        self.returned = False  # and has not come to another checkpoint since

    def add(self, error: NonFinite, causes: Sequence[str | None]) -> str:
        """Count one; why, from what all workers have found, by rank."""
        self.all += 1
        self.in_a_row += 1
        found = [(rank, cause) for rank, cause in enumerate(causes) if cause]
        said = [f"worker {rank}: {cause}" if len(causes) > 1 else cause for rank, cause in found]
        return "; ".join(said) or f"the {error.player}'s gradient, with all before it finite"

    def turn_back(self, count: int) -> None:
        """The state is that of an earlier step; what was counted since stays."""
        self.all, self.in_a_row, self.returned = count, 0, True
        self.detours += 1

    def given_up(self, step: int, player: str, why: str) -> NonFinite:
        again = "once more after going back" if self.returned else "with no checkpoint to go back to"
        return NonFinite(step, player, f"{why}; {self.in_a_row} steps in a row, {again}")

    def seed(self, seed: int) -> int:
        """What a run with this seed draws from."""
        return seed + 100_003 * self.detours

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
