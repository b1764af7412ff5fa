"""The metrics of the rounds between two rows of the journal."""

import time
from collections.abc import Sequence
from typing import Any

from diffinstruct.method.step import TIMESTEP_PARTS, TIMESTEP_SHARE, X0_GAP_BY_TIMESTEP, Metrics
from diffinstruct.ranks import Ranks
from diffinstruct.training.guards import SPIKE


class MetricWindow:
    """The metrics since the last row of the journal, and the pace. Held-out rewards have keys of their own."""

    def __init__(self, held_out: Sequence[str], global_batch_size: int) -> None:
        self.keys = {f"reward/{name}": f"held_out/{name}" for name in held_out}
        self.global_batch_size = global_batch_size
        self.rows: list[Metrics] = []
        self.shared = 0  # so many rows are means over all ranks
        self.usual: Metrics = {}  # mean gradient norms of the window before
        self.since = time.perf_counter()

    def add(self, metrics: Metrics) -> list[str]:
        """Add a round's metrics; returns a remark for each gradient norm that is a spike."""
        self.rows.append({self.keys.get(key, key): value for key, value in metrics.items()})
        return [
            f"{key} is {metrics[key]:.3g}, {metrics[key] / usual:.0f} times what is usual"
            for key, usual in self.usual.items()
            if metrics[key] > SPIKE * usual > 0
        ]

    def mean(self) -> Metrics:
        """The mean of each metric and images per second over the window, which starts anew."""
        now, rows = time.perf_counter(), self.rows
        self.rows, self.shared, began, self.since = [], 0, self.since, now
        if not rows:  # all of its rounds were skipped
            return {}
        values: dict[str, list[float]] = {}
        for row in rows:
            for key, value in row.items():
                values.setdefault(key, []).append(value)
        mean = {key: sum(of_rounds) / len(of_rounds) for key, of_rounds in values.items()}
        _divide_by_share(mean)
        norms = [f"gradient_norm/{network}" for network in ("generator", "score_network")]
        self.usual = {key: mean[key] for key in norms if key in mean}
        mean |= {f"{key}_max": max(row[key] for row in rows) for key in self.usual}
        if mean.get("time/reward"):
            mean["time/reward_hidden_fraction"] = 1 - min(1.0, mean["time/reward_exposed"] / mean["time/reward"])
        mean["throughput/images_per_second"] = len(rows) * self.global_batch_size / (now - began)
        return mean

    def share(self, ranks: Ranks) -> None:
        """Make the rows means over all ranks, so that a resumed run has the same ones on any number of ranks. A
        collective call. Each row is averaged once: a mean of means has other last bits, so the number of checkpoints
        between two rows of the journal would show."""
        self.rows[self.shared :] = [ranks.mean(row) for row in self.rows[self.shared :]]
        self.shared = len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "usual": self.usual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.usual = list(state["rows"]), dict(state["usual"])
        self.shared = len(self.rows)


def _divide_by_share(mean: Metrics) -> None:
    """Make the parts of x0_gap means over the samples whose t was in that part of the schedule, if there were any."""
    for part in TIMESTEP_PARTS:
        share = mean.pop(TIMESTEP_SHARE + part, 0.0)
        if (total := mean.pop(X0_GAP_BY_TIMESTEP + part, None)) is not None and share:
            mean[X0_GAP_BY_TIMESTEP + part] = total / share
