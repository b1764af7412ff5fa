"""What rank 0 shows and keeps: progress line, journal, picture grid, exported model."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import read_prompts
from diffinstruct.method.rewards import NotFinite
from diffinstruct.method.step import Metrics
from diffinstruct.models.denoiser import OneStepGenerator
from diffinstruct.models.pipeline import Reference
from diffinstruct.models.sampling import EVALUATION_SEED, sample_latents
from diffinstruct.reward_service.monitor import Alarm, ProbeHistory
from diffinstruct.run_folder import signals
from diffinstruct.tracking.journal import Journal, Parent
from diffinstruct.training.guards import GO_ON, LOWER_SCALE, SKIPS, SPIKE, STOP
from diffinstruct.training.resume import keep_configuration

GRID_NOISES = 3


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder, the exported pipeline in it, the last metrics, the tracker's address."""

    folder: Path
    export: Path
    metrics: Metrics
    tracking: str


class Window:
    """Metrics since the last row of the journal, and the pace."""

    def __init__(self, experiment: Experiment) -> None:
        self.experiment = experiment
        self.rows: list[Metrics] = []
        self.shared = 0  # of them
        self.usual: Metrics = {}  # gradient norms, means of the window before
        self.since = time.perf_counter()

    def add(self, metrics: Metrics) -> list[str]:
        """A round's; what is unusual in it."""
        held_out = {f"reward/{name}": f"held_out/{name}" for name in self.experiment.rewards.held_out}
        self.rows.append({held_out.get(key, key): value for key, value in metrics.items()})
        return [
            f"{key} is {metrics[key]:.3g}, {metrics[key] / usual:.0f} times what is usual"
            for key, usual in self.usual.items()
            if metrics[key] > SPIKE * usual > 0
        ]

    def mean(self) -> Metrics:
        """The mean of each metric and images per second over the window, which starts anew."""
        now, rows = time.perf_counter(), self.rows
        self.rows, self.shared, began, self.since = [], 0, self.since, now
        if not rows:  # all of its steps were left out
            return {}
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        norms = [f"gradient_norm/{player}" for player in ("generator", "score_network")]
        self.usual = {key: mean[key] for key in norms if key in mean}
        mean |= {f"{key}_max": max(row[key] for row in rows) for key in self.usual}
        if mean["time/reward"]:
            mean["time/reward_hidden_fraction"] = 1 - min(1.0, mean["time/reward_exposed"] / mean["time/reward"])
        mean["throughput/images_per_second"] = len(rows) * self.experiment.global_batch_size / (now - began)
        return mean

    def share(self, average: Callable[[Metrics], Metrics]) -> None:
        """Make the rows those of all workers, so that whoever goes on with them, as whichever worker, has the same
        means. Each
        row once: a mean of means has other last bits, and a save between two rows of the journal would show."""
        self.rows[self.shared :] = [average(row) for row in self.rows[self.shared :]]
        self.shared = len(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "usual": self.usual}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.usual = list(state["rows"]), dict(state["usual"])
        self.shared = len(self.rows)


class Grid:
    """The pictures that show how a run goes. Rows are prompts; the first column is the starting generator, then the
    current one on the same and on more noise."""

    def __init__(self, experiment: Experiment, reference: Reference, start: nn.Module) -> None:
        table = read_prompts(experiment.prompts.grid, column=experiment.prompts.column)["prompt"].tolist()
        self.experiment, self.reference = experiment, reference
        self.prompts = table[: experiment.logging.grid_prompts]
        noise = torch.Generator().manual_seed(EVALUATION_SEED)
        self.noise = torch.randn(GRID_NOISES, len(self.prompts), *reference.latent_shape, generator=noise)
        self.start = self._latents(start, 0)

    def columns(self, generator: nn.Module) -> list[Tensor]:
        """Latents."""
        return [self.start, *(self._latents(generator, i) for i in range(GRID_NOISES))]

    def _latents(self, generator: nn.Module, noise: int) -> Tensor:
        own = self.noise[noise].to(self.reference.device)
        return sample_latents(self.experiment, self.reference, generator, own, self.prompts)


class Output:
    """What rank 0 shows and keeps: the progress line, the journal, the picture grid, the exported model."""

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        reference: Reference,
        parent: Parent | None,
        where: str,
        done: int,
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
        self.last: Metrics = {}
        at = f"  from step {done}{', its last' * (done == experiment.steps)}" if done else ""
        print(f"run {folder}{at}  tracking {self.tracker.url}{self.where}", flush=True)

    def metrics(self, step: int, metrics: Metrics) -> None:
        self.last = self.last | metrics  # of a window in which all steps were left out there is little
        self.tracker.metrics(step, metrics)
        now = time.perf_counter()
        self.first_step = step if self.first_step is None else self.first_step
        pace = (now - self.started) / max(1, step - self.first_step + self.experiment.logging.every)
        left, speed = pace * (self.experiment.steps - step), "throughput/images_per_second"
        line = (
            f"step {step}/{self.experiment.steps}"
            + "".join(f"  {key} {metrics[key]:.4g}" for key in metrics if key.startswith(("reward/", "held_out/")))
            + (f"  divergence {metrics['x0_gap']:.4g}" if "x0_gap" in metrics else "")
            + (f"  {metrics[speed]:.1f} images/s" if speed in metrics else "")
            + (f"  skipped {metrics['steps/skipped']:.0f}" if metrics["steps/skipped"] else "")
            + f"  ETA {int(left // 60)}:{int(left % 60):02d}"
        )
        live = sys.stdout.isatty() and step < self.experiment.steps
        print(f"\r\x1b[K{line}" if sys.stdout.isatty() else line, end="" if live else "\n", flush=True)

    def said(self, step: int, kind: str, text: str) -> None:
        """Something has happened: a line for whoever watches, an event for whoever comes later."""
        print(f"step {step}: {text}", flush=True)
        self.tracker.event(step, kind, text)

    def went_back(self, step: int, lost: int) -> None:
        """After SKIPS steps in a row that were left out."""
        text = f"{SKIPS} steps in a row were not finite: back to the checkpoint of step {step}, on with other prompts and noise"
        print(f"step {lost}: {text}", flush=True)
        self.tracker.back_to(step, lost, text)

    def looked(self, step: int, look: Callable[[], tuple[Metrics, Alarm | None]], watch: ProbeHistory) -> int:
        """Keep what a look has seen; what follows from it. Rewards that have no finite score for its pictures see
        nothing."""
        try:
            figures, alarm = look()
        except NotFinite as error:
            self.said(step, "blind", f"no look: {error}")
            return GO_ON
        self.tracker.metrics(step, figures)
        if watch.best.get("step") == step:
            gained = f"{watch.best['held_out']:.3g} spreads gained by the held-out rewards"
            self.tracker.event(step, "best", f"of the checkpoints so far: {gained}")
        if alarm is None:
            return GO_ON
        self.said(step, "overoptimization", f"reward over-optimization: {alarm.line}")
        return {"warn": GO_ON, "lower_scale": LOWER_SCALE, "stop": STOP}[self.experiment.overoptimization.on_alarm]

    @torch.no_grad()
    def grid(self, step: int, columns: Sequence[Tensor]) -> None:
        """Show a Grid's columns."""
        self.tracker.image("grid", step, tile([self._decoded(latents) for latents in columns]))

    def _decoded(self, latents: Tensor) -> Tensor:
        """One at a time: a decoder takes more for a grid than a round does for its micro-batch."""
        return torch.cat([self.reference.decode(latent).cpu() for latent in latents.split(1)])

    def finished(self, step: int, average: OneStepGenerator, best: int) -> Result:
        """Export the averaged generator as a stock pipeline, hand model and last metrics to the tracker."""
        from diffinstruct.models.export import export

        folder = export(self.experiment.reference.model, average, self.folder / "export")
        table = self.folder / "metrics.json"
        table.write_text(json.dumps({"step": step, **self.last}, indent=2) + "\n")
        self.tracker.artifact(folder)
        self.tracker.artifact(table)
        self.tracker.finish("FINISHED")
        if best < step:
            how = f"diffinstruct export {shlex.quote(str(self.folder))} --step best -o FOLDER"
            print(f"the checkpoint that held-out rewards like best is that of step {best}: {how}")
        print(f"done: run {self.folder}  model {folder}  tracking {self.tracker.url}{self.where}", flush=True)
        return Result(self.folder, folder, self.last, self.tracker.url)

    def failed(self, error: BaseException) -> None:
        status = "KILLED" if isinstance(error, KeyboardInterrupt | signals.Paused) else "FAILED"
        self.tracker.finish(status, f"{type(error).__name__}: {error}", hurry=isinstance(error, KeyboardInterrupt))


def tile(columns: Sequence[Tensor]) -> Any:
    """Columns of pictures, each [rows, 3, H, W] in [0, 1] -> one uint8 array [rows * H, columns * W, 3]."""
    rows = torch.cat([torch.cat(list(column), dim=1) for column in columns], dim=2)
    return (rows.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
