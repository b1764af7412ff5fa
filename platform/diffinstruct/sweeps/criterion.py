"""What a sweep looks for: as much held-out reward as can be had within bounds on diversity and on distance to the
reference.

Never the trained reward: that one rises anyway, and a search that looks at it finds the trial that hacks it best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from diffinstruct.reward_service.monitor import MAX_DISTANCE_RATIO, MIN_VARIETY_SHARE

OUTSIDE = -100.0
"""The score of a trial that is out of bounds, in within-prompt standard deviations: below any that is not."""


@dataclass(frozen=True)
class SelectionCriterion:
    """Names of metrics: of a run's last metrics, of its last probe (`overoptimization/...`), of its evaluation.

    maximize: the held-out reward. minimize: the distance, for a search with two objectives. floors, ceilings: bounds; a
    trial that breaks one is worth nothing, however high its reward. A metric that is not there (yet) bounds nothing.
    """

    maximize: str = "overoptimization/held_out"
    minimize: str = "x0_gap"
    floors: Mapping[str, float] = field(default_factory=lambda: {"overoptimization/variety": MIN_VARIETY_SHARE})
    ceilings: Mapping[str, float] = field(default_factory=lambda: {"overoptimization/distance": MAX_DISTANCE_RATIO})

    def violations(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """By how much each bound is broken; not above 0 where it is kept."""
        below = {key: least - metrics[key] for key, least in self.floors.items() if key in metrics}
        above = {key: metrics[key] - most for key, most in self.ceilings.items() if key in metrics}
        return below | above

    def broken_bound(self, metrics: Mapping[str, float]) -> str | None:
        """The first bound that is broken, in words."""
        broken = next((key for key, excess in self.violations(metrics).items() if excess > 0), None)
        if broken is None:
            return None
        bound = f"least {self.floors[broken]:g}" if broken in self.floors else f"most {self.ceilings[broken]:g}"
        return f"{broken} {metrics[broken]:.3g}, at {bound}"

    def score(self, metrics: Mapping[str, float]) -> float:
        """What a scheduler compares: the metric to maximize, or OUTSIDE. Raises KeyError where it is not there."""
        return OUTSIDE if self.broken_bound(metrics) else metrics[self.maximize]
