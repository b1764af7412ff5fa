"""Folders as runs leave them, written by hand: a journal, metrics, an evaluation, picture grids; no training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffinstruct.config.reading import load


def run(
    folder: Path,
    overrides: Mapping[str, Any] = {},
    end: str | None = "FINISHED",
    reason: str | None = None,
    courses: Mapping[str, list[float]] = {"reward/pocket_preference": [3.0, 4.0], "held_out/pocket_judge": [2.0, 2.5]},
    evaluation: Mapping[str, float] = {},
    events: list[tuple[int, str, str]] = [],  # noqa: B006
    grids: tuple[int, ...] = (),
    edge: int = 8,
) -> Path:
    """A run that measured `courses` at steps 10, 20, ...; `end` None: it has not ended. An evaluation is value by
    measure, its interval half a unit to either side."""
    folder.mkdir(parents=True)
    (folder / "empty.yaml").write_text("{}")
    experiment = load(folder / "empty.yaml", [f"{key}={value}" for key, value in overrides.items()])
    (folder / "experiment.yaml").write_text(experiment.to_yaml())
    tags = {"mlflow.source.git.commit": "abc1234"}
    records: list[dict[str, Any]] = [{"start": {"name": folder.name, "params": {}, "tags": tags}}]
    records += [{"step": step, "event": kind, "text": text} for step, kind, text in events]
    steps = max(map(len, courses.values()), default=0)
    for i in range(steps):
        records.append({"step": 10 * (i + 1), "metrics": {key: values[i] for key, values in courses.items()}})
    if end:
        records.append({"finish": end, "reason": reason})
    (folder / "journal.jsonl").write_text("".join(json.dumps({"time": 10**12, **record}) + "\n" for record in records))
    if end == "FINISHED":
        (folder / "metrics.json").write_text(json.dumps({"step": 10 * steps, **records[-2].get("metrics", {})}))
    if evaluation:
        found = {
            f"{name}{suffix}": value
            for name, middle in evaluation.items()
            for suffix, value in {"": middle, ".low": middle - 0.5, ".high": middle + 0.5, ".n": 9}.items()
        }
        (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    for step in grids:
        pixels = rng.integers(256, size=(8 * edge, 4 * edge, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"grid-{step:08d}.png", compress_level=1)
    return folder


def evaluated(trained: float, held_out: float, kid: float, diversity: float = 5.0) -> dict[str, float]:
    return {"reward/pocket_preference": trained, "reward/pocket_judge": held_out, "kid": kid, "diversity": diversity}


WATCHED = {
    "reward/pocket_preference": [3.0, 4.0],
    "held_out/pocket_judge": [2.0, 2.5],
    "x0_gap": [0.2, 0.3],
    "overoptimization/unexplained": [0.5, 1.5],
    "overoptimization/variety": [1.0, 0.8],
}
"""Courses of a run with the watch on."""


def sweep(folder: Path, weights: tuple[float, ...] = (0.5, 1.0), scales: tuple[float, ...] = (1.0, 2.0), **more: Any) -> Path:
    """weights x scales x seeds 0 and 1, finished and evaluated: held-out reward and KID rise with scale / weight."""
    for weight in weights:
        for scale in scales:
            for seed in (0, 1):
                ratio = scale / weight
                run(
                    folder / f"w{weight:g}-r{scale:g}-s{seed}",
                    {"objective.regularization_weight": weight, "objective.reward_scale": scale, "seed": seed},
                    evaluation=evaluated(3 + ratio, 2 + ratio / 2 + seed / 10, ratio),
                    courses=WATCHED,
                    **more,
                )
    return folder
