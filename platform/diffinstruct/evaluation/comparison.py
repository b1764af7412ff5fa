"""Two runs side by side, `diffinstruct compare`: the keys that differ between them, and every metric of both, paired
over prompts and noise. Differences are the second run minus the first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load_run
from diffinstruct.evaluation import REFERENCE_PICTURES, SEED, generators
from diffinstruct.evaluation.evaluate import Evaluation, compare
from diffinstruct.metrics import REWARD, Metric
from diffinstruct.models.export import draw
from diffinstruct.reports import page, plots

SHOWN = 8  # prompts, evenly spaced in the table


@dataclass(frozen=True)
class Comparison:
    """changes: key -> (the first run's value, the second's), where they differ. evaluations: by the run's name, the
    first run first. pictures: name -> those of `prompts`, made of the noise that was measured."""

    changes: Mapping[str, tuple[Any, Any]]
    evaluations: Mapping[str, Evaluation]
    prompts: Sequence[str]
    pictures: Mapping[str, Sequence[Image.Image]]

    def text(self) -> str:
        """Markdown: the keys, both runs' metrics, the paired differences."""
        one, other = self.evaluations
        keys = "".join(f"| {key} | {before} | {now} |\n" for key, (before, now) in self.changes.items())
        head = f"| key | {one} | {other} |\n| --- | --- | --- |\n{keys}" if keys else "Their configurations are the same.\n"
        return f"{head}\n{generators.report(self.evaluations)}"

    def page(self) -> str:
        """The same as HTML, with the pictures."""
        (one, first), (other, second) = self.evaluations.items()
        differences = compare(second, first)
        ours, theirs = first.summary(), second.summary()
        metrics = first.columns() | first.distances()
        rows = [
            {
                "metric": metrics[name],
                "one": ours[name],
                "other": theirs[name],
                "difference": difference,
                "wins": differences.get(name.replace(REWARD, "wins/")) if name.startswith(REWARD) else None,
            }
            for name, difference in differences.items()
            if name in metrics
        ]
        return page.render(
            "comparison.html",
            title=f"{one} and {other}",
            names=(one, other),
            changes=self.changes,
            rows=rows,
            seed=first.seed,
            pictures=page.side_by_side(self.prompts, self.pictures),
        )

    def save(self, out: Path) -> None:
        """A page, where `out` ends in .html; else a folder: `table.md`, `pictures.png`, a .csv a run."""
        if out.suffix == ".html":
            page.save(out, self.page())
            return
        generators.save(self.evaluations, out)
        (out / "table.md").write_text(self.text(), encoding="utf-8")
        plots.picture_grid(self.prompts, self.pictures, out / "pictures.png")


def compare_runs(
    folders: Sequence[Path | str],
    prompts: str | None = None,
    rewards: Sequence[str] = (),
    reference_pictures: int = REFERENCE_PICTURES,
    seed: int = SEED,
    metrics: Sequence[str | Metric] = (),
) -> Comparison:
    """Two finished runs, measured as `evaluate_generators` does; it raises the same errors."""
    paths = [Path(folder) for folder in folders]
    one, other = (load_run(path) for path in paths)
    evaluations = generators.evaluate_generators(paths, prompts, rewards, reference_pictures, seed, metrics)
    texts = next(iter(evaluations.values())).table["prompt"].tolist()
    chosen = np.unique(np.linspace(0, len(texts) - 1, min(len(texts), SHOWN)).round().astype(int)).tolist()
    pictures = {
        name: _pictures(path / "export", run, texts, chosen, seed)
        for name, path, run in zip(evaluations, paths, (one, other), strict=True)
    }
    return Comparison(other.changes(one), evaluations, [texts[i] for i in chosen], pictures)


def _pictures(export: Path, run: Experiment, texts: Sequence[str], chosen: Sequence[int], seed: int) -> list[Image.Image]:
    """The pictures of some rows of the table, of the noise that `evaluate` gave them."""
    sample, latent_shape = generators.sampler(
        export, run.precision, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    noise = torch.randn(len(texts), *latent_shape, generator=torch.Generator().manual_seed(seed))
    return draw(sample, [texts[i] for i in chosen], noise[chosen])
