"""What a run shows and keeps: progress line, journal, sample grid, exported model.

Rank 0 has a RunLog, the others a SilentRunLog: the loop calls both alike.
"""

import json
import shlex
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.method.precision import DTYPES
from diffinstruct.method.step import Metrics
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.sampling import EVALUATION_SEED, LatentSampler
from diffinstruct.run_folder import signals
from diffinstruct.tracking.journal import Journal, Parent
from diffinstruct.training.guards import MAX_SKIPS_IN_A_ROW
from diffinstruct.training.resume import keep_configuration

GRID_NOISES = 3
GRID_PIXELS = 2**22
"""The most pixels of a sample grid, 32 pictures of 362 pixels a side: its PNG stays below 13 MB."""


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder, the exported pipeline in it, the last metrics, the tracker's address."""

    folder: Path
    export: Path
    metrics: Metrics
    tracking: str


class SampleGrid:
    """Samples that show how a run goes. Rows are prompts, columns the starting generator, then the current one on the
    same and on more noise."""

    def __init__(self, prompts: Sequence[str], sample: LatentSampler, start: nn.Module) -> None:
        self.prompts, self.sample = prompts, sample
        generator = torch.Generator().manual_seed(EVALUATION_SEED)
        noise = torch.randn(GRID_NOISES, len(prompts), *sample.reference.latent_shape, generator=generator)
        self.noise = noise.to(sample.reference.device)
        self.start = sample(start, self.noise[0], prompts)

    def columns(self, generator: nn.Module) -> list[Tensor]:
        """The grid's latents by column; a collective call where the generator is sharded."""
        return [self.start, *(self.sample(generator, noise, self.prompts) for noise in self.noise)]


class RunLog:
    """The run log of rank 0: the progress line, the journal, the sample grid, the exported model."""

    def __init__(
        self, experiment: Experiment, folder: Path, reference: Reference, parent: Parent | None, where: str, start: int
    ) -> None:
        self.experiment, self.folder, self.reference = experiment, folder, reference
        self.where = f"  {where}" if where else ""
        keep_configuration(experiment, folder)
        self.tracker = Journal(
            experiment.tracking.uri,
            experiment.tracking.experiment,
            parent.child if parent else folder.name,
            folder,
            params=experiment.without_secrets().to_params(),
            tags={"diffinstruct.experiment_id": experiment.config_hash},
            parent_run_id=parent.run_id if parent else None,
            also=experiment.tracking.also,
        )
        self.started = time.perf_counter()
        self.first_step: int | None = None
        at = f"  from step {start}{', its last' * (start == experiment.steps)}" if start else ""
        print(f"run {folder}{at}  tracking {self.tracker.url}{self.where}", flush=True)

    def event(self, step: int, kind: str, text: str) -> None:
        """Print a line for whoever watches, and keep it as an event of the journal."""
        print(f"step {step}: {text}", flush=True)
        self.tracker.event(step, kind, text)

    def metrics(self, step: int, metrics: Metrics) -> None:
        """Keep the metrics of a window, and show a line of progress."""
        self.tracker.metrics(step, metrics)
        live = sys.stdout.isatty() and step < self.experiment.steps
        line = self._progress(step, metrics)
        print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, end="" if live else "\n", flush=True)

    def _progress(self, step: int, metrics: Metrics) -> str:
        self.first_step = step if self.first_step is None else self.first_step
        pace = (time.perf_counter() - self.started) / max(1, step - self.first_step + self.experiment.logging.every)
        left, speed = pace * (self.experiment.steps - step), "throughput/images_per_second"
        return (
            f"step {step}/{self.experiment.steps}"
            + "".join(f"  {key} {metrics[key]:.4g}" for key in metrics if key.startswith(("reward/", "held_out/")))
            + (f"  x0_gap {metrics['x0_gap']:.4g}" if "x0_gap" in metrics else "")
            + (f"  {metrics[speed]:.1f} images/s" if speed in metrics else "")
            + (f"  skipped {metrics['steps/skipped']:.0f}" if metrics["steps/skipped"] else "")
            + f"  ETA {int(left // 60)}:{int(left % 60):02d}"
        )

    def probe(self, step: int, metrics: Metrics, best: dict[str, Any]) -> None:
        """Keep the metrics of a probe, and that it is the best so far where it is."""
        self.tracker.metrics(step, metrics)
        if best.get("step") == step:
            gain = f"{best['held_out']:.3g} within-prompt std gained by the held-out rewards"
            self.tracker.event(step, "best", f"of the checkpoints so far: {gain}")

    def rolled_back(self, step: int, failed_step: int) -> None:
        """Say that the run goes on from an earlier step."""
        where = f"back to the checkpoint of step {step}, on with other prompts and noise"
        text = f"{MAX_SKIPS_IN_A_ROW} steps in a row were not finite: {where}"
        print(f"step {failed_step}: {text}", flush=True)
        self.tracker.back_to(step, failed_step, text)

    @torch.no_grad()
    def grid(self, step: int, columns: Sequence[Tensor]) -> None:
        """Show a SampleGrid's columns, decoded one sample at a time, which takes no more memory than a round."""
        pictures = (self.reference.decode(latent)[0] for column in columns for latent in column.split(1))
        self.tracker.image("grid", step, tile(pictures, len(columns[0]), len(columns)))

    def finish(self, step: int, ema: OneStepGenerator, best_step: int, metrics: Metrics) -> Result:
        """Export the generator's EMA as a stock pipeline; hand the last metrics to the tracker."""
        from diffinstruct.models.export import export

        experiment = self.experiment
        folder = export(experiment.reference.model, ema, self.folder / "export", DTYPES[experiment.export.dtype])
        table = self.folder / "metrics.json"
        table.write_text(json.dumps({"step": step, **metrics}, indent=2) + "\n", encoding="utf-8")
        self.tracker.artifact(table)
        self.tracker.finish("FINISHED")
        if best_step < step:
            command = f"diffinstruct export {shlex.quote(str(self.folder))} --step best -o FOLDER"
            print(f"the checkpoint with the best held-out rewards is that of step {best_step}: {command}")
        print(f"done: run {self.folder}  model {folder}  tracking {self.tracker.url}{self.where}", flush=True)
        return Result(self.folder, folder, metrics, self.tracker.url)

    def fail(self, error: BaseException) -> None:
        """Close the run in the tracker: an error or an interruption has ended it."""
        status = "KILLED" if isinstance(error, KeyboardInterrupt | signals.Paused) else "FAILED"
        self.tracker.finish(status, f"{type(error).__name__}: {error}", hurry=isinstance(error, KeyboardInterrupt))


class SilentRunLog:
    """The run log of every rank but the first shows and keeps nothing."""

    def event(self, step: int, kind: str, text: str) -> None: ...

    def metrics(self, step: int, metrics: Metrics) -> None: ...

    def probe(self, step: int, metrics: Metrics, best: dict[str, Any]) -> None: ...

    def rolled_back(self, step: int, failed_step: int) -> None: ...

    def grid(self, step: int, columns: Sequence[Tensor]) -> None: ...

    def finish(self, step: int, ema: OneStepGenerator, best_step: int, metrics: Metrics) -> Result | None: ...

    def fail(self, error: BaseException) -> None: ...


def tile(pictures: Iterable[Tensor], rows: int, columns: int) -> np.ndarray:
    """Pictures, each [3, H, W] in [0, 1], column by column -> one array of uint8 [rows * H, columns * W, 3]. Where that
    is more than GRID_PIXELS, each is shrunk by the same whole number before the next one is asked for."""
    grid = np.empty((0, 0, 3), np.uint8)
    for i, picture in enumerate(pictures):
        pixels = rows * columns * picture[0].numel()
        small = F.avg_pool2d(picture, min(ceil(sqrt(pixels / GRID_PIXELS)), *picture.shape[1:]))
        height, width = small.shape[1:]
        if i == 0:
            grid = np.empty((rows * height, columns * width, 3), np.uint8)
        column, row = divmod(i, rows)
        cell = grid[row * height : (row + 1) * height, column * width : (column + 1) * width]
        cell[:] = (small.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return grid
